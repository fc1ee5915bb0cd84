"""The config that all architectures share: what is read and written, and what every one may be trained with."""

import copy
import dataclasses
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch

from sae_kit import config as trees
from sae_kit.annealing import PAnnealing, linear_warm_up
from sae_kit.config import Tokens
from sae_kit.errors import ConfigError
from sae_kit.geometry import CrosscoderNorm, Geometry
from sae_kit.metadata import SAEMetadata
from sae_kit.normalization import PER_ROW, NormalizationMode, NormStatistic
from sae_kit.registry import get_architecture

if TYPE_CHECKING:
    from sae_kit.sae import SAE

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def training_only(default: Any) -> Any:
    """A config field that shapes training alone: files for inference keep it in their metadata instead."""
    return field(default=default, metadata={"training_only": True})


class Coefficient(NamedTuple):
    """Weight of one loss term, reached linearly over the first tokens of a run."""

    value: float
    warm_up: Tokens

    def length(self, name: str, total: int) -> int:
        """Tokens of the warm-up in a run of `total`; `name` is that of the coefficient."""
        return trees.resolve_tokens(self.warm_up, total, f"{name.removesuffix('_coefficient')}_warm_up_tokens")


@dataclass(frozen=True, kw_only=True)
class SAEConfig(ABC):
    """Fields of every architecture. `d_in` may be left to the hook of a run; all but `d_sae` have a default."""

    architecture: ClassVar[str] = ""
    normalizations: ClassVar[frozenset[str]] = frozenset(get_args(NormalizationMode)) - {"constant_scalar_rescale"}
    """modes of normalisation that the architecture makes sense with"""

    d_in: int | None = None
    """width of the activations; None = the hook's"""
    d_sae: int
    """number of latents; of a cross-layer transcoder, for each layer"""
    in_shape: tuple[int, ...] | None = None
    """what is read: None = (d_in,); (sites, d_in) for a crosscoder"""
    out_shape: tuple[int, ...] | None = None
    """what is written: None = the same site; (d_out,) makes it a transcoder"""
    skip: bool = False
    """add a linear map of the input to the output"""
    cross_layer: bool = False
    """sites are layers: one encoder each, decoders to this and all later layers"""
    crosscoder_norm: CrosscoderNorm = "sum"
    """norm of a latent that writes several sites: the sum of its norms there, or their joint norm"""
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    """dtype of the parameters"""
    device: str = "cpu"
    """where the SAE is built"""
    apply_b_dec_to_input: bool | None = None
    """subtract b_dec from the input of the encoder; None = for an SAE, and for nothing else"""
    normalize_activations: NormalizationMode | None = None
    """scale of the activations; None = expected_average_only_in in a run, none elsewhere"""
    norm_statistic: NormStatistic = training_only("mean")
    """the norm of activations that a scale brings to sqrt(d): their mean norm, or the root of the mean square"""
    reshape_activations: Literal["none", "hook_z"] = "none"
    """hook_z: inputs are [..., heads, d_head] with heads · d_head = d_in"""
    decoder_init_norm: float | None = training_only(0.1)
    """norm of the decoder rows at the start, 1 where rows are kept at it; None = as drawn"""
    decoder_norm_constraint: Literal["free", "unit"] = training_only("free")
    """unit: decoder rows keep norm 1 throughout training"""
    reconstruction_loss: Literal["mse", "fvu"] = training_only("mse")
    """squared error, or the squared error divided by the variance of the batch"""
    aux_coefficient: float = training_only(0.0)
    """weight of AuxK, the loss in which dead latents explain what the living ones miss; 0 = off"""
    aux_k: int | None = training_only(None)
    """dead latents that AuxK lets speak in each row; None = d_out // 2"""
    pre_act_loss_coefficient: float | None = training_only(None)
    """weight of the loss that pulls latents towards their threshold from below; None = off"""
    pre_act_on: Literal["dead", "all"] = training_only("dead")
    """which latents it pulls"""
    dead_after_tokens: Tokens | None = training_only(None)
    """a latent silent for so many tokens is dead; None = the smaller of 10M and a tenth of the run"""
    metadata: SAEMetadata = field(default_factory=SAEMetadata)
    """where the SAE comes from"""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"{name} must be at least 1, found {size}")
        self._check_geometry()
        if (self.normalize_activations or "none") not in self.normalizations:
            raise ConfigError(
                f"{self.architecture} has no normalize_activations={self.normalize_activations!r}; it can be: "
                f"{', '.join(sorted(self.normalizations))}"
            )
        if self.decoder_init_norm is not None and self.decoder_init_norm <= 0:
            raise ConfigError(f"decoder_init_norm must be positive or None, found {self.decoder_init_norm}")
        if self.aux_k is not None and self.aux_k < 1:
            raise ConfigError(f"aux_k must be at least 1, found {self.aux_k}")
        for name in ("aux_coefficient", "pre_act_loss_coefficient"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be at least 0, found {value}")
        for name, coefficient in self.coefficients().items():
            if not coefficient.value >= 0:
                raise ConfigError(f"{name} must be at least 0, found {coefficient.value}")
            coefficient.length(name, 1)
        target = self.controlled_l0()
        if target is not None and not 0 < target <= self.d_sae:
            raise ConfigError(f"target_l0 must lie between 0 and d_sae = {self.d_sae}, found {target}")
        if target is not None and not all(coefficient.value > 0 for coefficient in self.coefficients().values()):
            raise ConfigError(f"target_l0 moves {', '.join(self.coefficients())}, which has to begin above 0")
        if self.dead_after_tokens is not None:
            trees.resolve_tokens(self.dead_after_tokens, 1, "dead_after_tokens")

    def _check_geometry(self) -> None:
        for name in ("in_shape", "out_shape"):
            shape = getattr(self, name)
            if shape is not None and (len(shape) not in (1, 2) or min(shape) < 1):
                raise ConfigError(f"{name} must be (width,) or (sites, width), found {shape}")
        read, written = self.in_shape, self.out_shape
        if read is not None and self.d_in not in (None, read[-1]):
            raise ConfigError(f"in_shape {read} and d_in {self.d_in} disagree: leave one of them out")
        several = read is not None and len(read) == 2
        if written is not None and several and len(written) != 2:
            raise ConfigError(
                f"several sites are read, in_shape {read}: out_shape needs (sites, width), found {written}"
            )
        if written is not None and len(written) == 2 and not several:
            raise ConfigError(
                f"several sites are written, out_shape {written}: in_shape needs (sites, d_in), found {read}"
            )
        if self.cross_layer and not several and self.known_in_shape is not None:  # else the hooks of a run say it
            raise ConfigError("a cross-layer transcoder reads several layers: set in_shape to (layers, d_in)")
        if self.cross_layer and written is not None and read is not None and written[0] != read[0]:
            raise ConfigError(f"a cross-layer transcoder writes the layers it reads, found {read} and {written}")
        if self.skip and several and not self.cross_layer:
            raise ConfigError("a crosscoder has no skip connection: it writes the sites that it reads")
        if self.reshape_activations == "hook_z" and several:
            raise ConfigError("reshape_activations='hook_z' is for one site, found several")
        if self.normalize_activations in PER_ROW and written is not None:
            raise ConfigError(
                f"normalize_activations={self.normalize_activations!r} undoes the scale of the row that was read: it "
                "has no meaning where another site is written. Choose expected_average_only_in or center_and_scale"
            )
        if self.apply_b_dec_to_input and (self.cross_layer or (written is not None and self.known_in_shape != written)):
            raise ConfigError("apply_b_dec_to_input needs an output of the shape of the input: set it to false")

    @property
    def known_in_shape(self) -> tuple[int, ...] | None:
        """What is read, as far as the config says."""
        return self.in_shape or (None if self.d_in is None else (self.d_in,))

    @property
    def subtracts_b_dec(self) -> bool:
        """`apply_b_dec_to_input` with its default."""
        if self.apply_b_dec_to_input is not None:
            return self.apply_b_dec_to_input
        return self.out_shape is None and len(self.in_shape or (0,)) == 1

    def geometry(self) -> Geometry:
        """What is read and written.

        Raises:
            ConfigError: the width is left to a hook.
        """
        read = self.known_in_shape
        if read is None or (self.cross_layer and len(read) == 1):
            raise ConfigError(
                f"{type(self).__name__}.d_in is not set; outside a run nothing else can say how wide the input is"
            )
        same = self.out_shape is None and not self.cross_layer
        written = self.out_shape or read
        return Geometry(read, written, self.d_sae, same, self.skip, self.cross_layer, self.crosscoder_norm)

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of the architecture's own loss terms, by the name of their field."""
        return {}

    def values(self, tokens: int, total: int) -> dict[str, float]:
        """Coefficients, and whatever else a schedule moves, of the step after `tokens` of a run of `total`."""
        found: dict[str, float] = {}
        for name, coefficient in self.coefficients().items():
            found[name] = coefficient.value * linear_warm_up(tokens, coefficient.length(name, total))
        if (annealing := self.penalty_annealing()) is not None:
            found["p"] = annealing.p(tokens, total)
        return found

    def penalty_annealing(self) -> PAnnealing | None:
        """How p of the penalty falls, if it does."""
        return None

    def controlled_l0(self) -> float | None:
        """The mean L0 to which the coefficients are steered, if they are."""
        return None

    def build(self, seed: int = 0) -> "SAE":
        """A freshly initialised SAE of this architecture."""
        return get_architecture(self.architecture).sae(self, seed=seed)

    def for_inference(self) -> "SAEConfig":
        """The same config; fields that only shape training move to `metadata.training_architecture_details`."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("training_only")]
        metadata = copy.deepcopy(self.metadata)
        metadata.training_architecture = metadata.training_architecture or self.architecture
        details = {f.name: trees.unstructure(getattr(self, f.name)) for f in fields}
        if metadata.training_architecture_details is None or any(getattr(self, f.name) != f.default for f in fields):
            metadata.training_architecture_details = details
        return dataclasses.replace(self, **{f.name: f.default for f in fields}, metadata=metadata)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with the architecture's name first."""
        return {"architecture": self.architecture, **trees.fields_to_dict(self)}

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> "SAEConfig":
        """The config of the architecture that `data["architecture"]` names; a final class needs no name.

        Raises:
            UnknownArchitectureError, UnknownConfigKeyError, ConfigError: with the path `where` in the message.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where or 'sae'}: expected the fields of an SAE config, found {data!r}")
        fields = dict(data)
        name = fields.pop("architecture", cls.architecture)
        if not name:
            raise ConfigError(f"{where or 'sae'}: an SAE config needs its architecture, e.g. architecture: topk")
        found = get_architecture(name).config
        if not issubclass(found, cls):
            raise ConfigError(f"{where or 'sae'}: expected architecture {cls.architecture!r}, found {name!r}")
        return trees.structure_fields(found, fields, where)
