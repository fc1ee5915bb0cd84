"""The base of all architectures: what an SAE is, whatever switches its latents on.

One pass (notation of the docs: u raw, x normalised, h pre-activation, c code):

    x = N(u)        h = (x − a·b_dec) W_enc + b_enc        c = f(h)        û = N⁻¹(c W_dec + b_dec)

An architecture file supplies f (`encoding`) and its sparsity loss (`sparsity_losses`); everything else is here:
shapes, dtypes, normalisation, hook points, the error term, folds. The same class trains and is used.
"""

import copy
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit import config as trees
from sae_kit.config import Tokens
from sae_kit.errors import ConfigError, ShapeError
from sae_kit.hooks import HookPoint
from sae_kit.metadata import SAEMetadata
from sae_kit.normalization import Normalization, NormalizationMode
from sae_kit.ops import Codes, SparseCodes, decode, to_dense, widen
from sae_kit.registry import get_architecture
from sae_kit.seeding import generator

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
LATENTS_PER_BLOCK = 1_024  # initial weights are drawn per block, so that they do not depend on how latents are sharded
SMALLEST_NORM = 1e-8


def training_only(default: Any) -> Any:
    """A config field that shapes training alone: files for inference keep it in their metadata instead."""
    return field(default=default, metadata={"training_only": True})


class Coefficient(NamedTuple):
    """Weight of one loss term, reached linearly over the first tokens of a run."""

    value: float
    warm_up: Tokens


class Encoding(NamedTuple):
    """What one pass of the encoder leaves for the decoder and the losses."""

    codes: Codes
    """what the decoder multiplies; with `rescale_acts_by_decoder_norm` this is c / n, not yet the user's c"""
    pre: Float[Tensor, "... d_sae"]
    """pre-activations that the sparsity loss reads"""


@dataclass(frozen=True, kw_only=True)
class SAEConfig(ABC):
    """Fields of every architecture. `d_in` may be left to the hook of a run; all but `d_sae` have a default."""

    architecture: ClassVar[str] = ""

    d_in: int | None = None
    """width of the activations; None = the hook's"""
    d_sae: int
    """number of latents"""
    dtype: Literal["float32", "float64", "float16", "bfloat16"] = "float32"
    """dtype of the parameters"""
    device: str = "cpu"
    """where the SAE is built"""
    apply_b_dec_to_input: bool = True
    """subtract b_dec from the input of the encoder"""
    normalize_activations: NormalizationMode | None = None
    """scale of the activations; None = expected_average_only_in in a run, none elsewhere"""
    reshape_activations: Literal["none", "hook_z"] = "none"
    """hook_z: inputs are [..., heads, d_head] with heads · d_head = d_in"""
    decoder_init_norm: float | None = training_only(0.1)
    """norm of the decoder rows at the start; None = as drawn"""
    decoder_norm_constraint: Literal["free", "unit"] = training_only("free")
    """unit: decoder rows keep norm 1 throughout training"""
    aux_coefficient: float = training_only(0.0)
    """weight of AuxK, the loss in which dead latents explain what the living ones miss; 0 = off"""
    aux_k: int | None = training_only(None)
    """dead latents that AuxK lets speak in each row; None = d_in // 2"""
    dead_after_tokens: Tokens | None = training_only(None)
    """a latent silent for so many tokens is dead; None = the smaller of 10M and a tenth of the run"""
    metadata: SAEMetadata = field(default_factory=SAEMetadata)
    """where the SAE comes from"""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ConfigError(f"{name} must be at least 1, found {size}")
        if self.decoder_init_norm is not None and self.decoder_init_norm <= 0:
            raise ConfigError(f"decoder_init_norm must be positive or None, found {self.decoder_init_norm}")
        if self.aux_k is not None and self.aux_k < 1:
            raise ConfigError(f"aux_k must be at least 1, found {self.aux_k}")
        if not self.aux_coefficient >= 0:
            raise ConfigError(f"aux_coefficient must be at least 0, found {self.aux_coefficient}")
        for name, coefficient in self.coefficients().items():
            if not coefficient.value >= 0:
                raise ConfigError(f"{name}_coefficient must be at least 0, found {coefficient.value}")
            trees.resolve_tokens(coefficient.warm_up, 1, f"{name}_warm_up_tokens")
        if self.dead_after_tokens is not None:
            trees.resolve_tokens(self.dead_after_tokens, 1, "dead_after_tokens")

    def coefficients(self) -> dict[str, Coefficient]:
        """Weights of the architecture's own loss terms, by name."""
        return {}

    def build(self, seed: int = 0) -> "SAE":
        """A freshly initialised SAE of this architecture."""
        return get_architecture(self.architecture).sae(self, seed=seed)

    def for_inference(self) -> "SAEConfig":
        """The same config; fields that only shape training move to `metadata.training_architecture_details`."""
        fields = [f for f in dataclasses.fields(self) if f.metadata.get("training_only")]
        metadata = copy.deepcopy(self.metadata)
        metadata.training_architecture = metadata.training_architecture or self.architecture
        details = {f.name: getattr(self, f.name) for f in fields}
        if metadata.training_architecture_details is None or any(details[f.name] != f.default for f in fields):
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


class SAE(nn.Module, ABC):
    """A sparse autoencoder: activations in, sparse codes and a reconstruction out. Trained and used by the same class.

    Parameters have the public shapes W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_in], b_dec [d_in]. Counters of
    training (`tokens_since_fired`, `firing_count`, `tokens_seen`) are buffers and travel with it.
    """

    config_class: ClassVar[type[SAEConfig]]
    exact_dtype_tensors: ClassVar[frozenset[str]] = frozenset({"norm_in.scale"})
    """names of tensors that stay in float32 or wider whatever the dtype of the SAE"""
    threshold_names: ClassVar[frozenset[str]] = frozenset()
    """parameters whose gradient is a kernel estimate: an optimizer group of their own, outside the gradient norm"""
    norm_fold_is_exact: ClassVar[bool] = True
    """whether f works latent by latent, so that scaling one latent cannot change which others are on"""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    tokens_since_fired: Tensor
    firing_count: Tensor
    tokens_seen: Tensor

    def __init__(self, cfg: SAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(cfg, self.config_class):
            raise ConfigError(f"{type(self).__name__} needs a {self.config_class.__name__}, found {type(cfg).__name__}")
        if cfg.d_in is None:
            raise ConfigError(
                f"{type(cfg).__name__}.d_in is not set; outside a run nothing else can say how wide the input is"
            )
        self.cfg = dataclasses.replace(cfg, metadata=copy.deepcopy(cfg.metadata))  # folds write into it
        self.d_in, self.d_sae = cfg.d_in, cfg.d_sae
        self.use_error_term = False
        wide = _exact_dtype(DTYPES[cfg.dtype])
        self.norm_in = Normalization(cfg.normalize_activations or "none", self.d_in, wide)
        for name, shape in self.parameter_shapes().items():
            dtype = wide if name in self.exact_dtype_tensors else DTYPES[cfg.dtype]
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))
        self.register_buffer("tokens_since_fired", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("firing_count", torch.zeros(self.d_sae, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.hook_sae_input = HookPoint()
        self.hook_sae_acts_pre = HookPoint()
        self.hook_sae_acts_post = HookPoint()
        self.hook_sae_output = HookPoint()
        self.hook_sae_recons = HookPoint()
        self.hook_sae_error = HookPoint()
        if not self.W_dec.is_meta:
            self.initialize(seed)
            self.to(cfg.device)

    # ---- what an architecture defines ------------------------------------------------------------------------------

    @abstractmethod
    def encoding(self, x: Float[Tensor, "... d_in"], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        """Codes of normalised rows; `on_pre` sees, and may replace, the pre-activations."""

    def sparsity_losses(
        self,
        encoding: Encoding,
        y: Float[Tensor, "batch d_out"],
        coefficients: Mapping[str, float],
    ) -> dict[str, Float[Tensor, ""]]:
        """The architecture's own loss terms, each with its coefficient; `y` is the target in training space."""
        return {}

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters, in the order of files."""
        d, s = self.d_in, self.d_sae
        return {"W_enc": (d, s), "b_enc": (s,), "W_dec": (s, d), "b_dec": (d,)}

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random decoder directions of norm `decoder_init_norm`, the encoder their transpose, biases zero."""
        bound = (3 / self.d_in) ** 0.5  # uniform with the variance that gives rows of expected squared norm 1
        for block, rows in enumerate(self.W_dec.split(LATENTS_PER_BLOCK)):
            drawn = torch.empty(rows.shape, dtype=torch.float32)
            drawn.uniform_(-bound, bound, generator=generator(seed, "init", index=block))
            norm = 1.0 if self.cfg.decoder_norm_constraint == "unit" else self.cfg.decoder_init_norm
            if norm is not None:
                drawn *= norm / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
            rows.copy_(drawn)
        self.W_enc.copy_(self.W_dec.T)

    @torch.no_grad()
    def restore_constraints(self) -> None:
        """What holds after every optimizer step: unit decoder rows, where they are asked for."""
        if self.cfg.decoder_norm_constraint == "unit":
            self.W_dec /= self.decoder_norms().to(self.dtype)[:, None]

    def scale_latents(self, factor: Float[Tensor, " d_sae"]) -> None:
        """Scale the encoder so that every code is `factor` times larger (part of the decoder-norm fold)."""
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)

    # ---- use -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def rescales(self) -> bool:
        """Whether latents are ranked and reported as c·n, n the norm of their decoder row."""
        return bool(getattr(self.cfg, "rescale_acts_by_decoder_norm", False))

    def encode(self, u: Float[Tensor, "..."]) -> Float[Tensor, "... d_sae"]:
        """Codes of raw activations: [..., d_in] (hook_z: also [..., heads, d_head]) -> [..., d_sae].

        Raises:
            ShapeError: the last axis is not `d_in`.
        """
        return self._acts(self.hook_sae_input(self._prepare(u)[0]))

    def encode_sparse(self, u: Float[Tensor, "..."]) -> SparseCodes:
        """The same codes without the zeros; nothing of size [..., d_sae] is made for hook points without hooks."""
        seen = self.hook_sae_input(self._prepare(u)[0])
        if self.hook_sae_acts_post.is_listening:
            return SparseCodes.from_dense(self._acts(seen))
        codes = self._encode(seen).codes
        sparse = codes if isinstance(codes, SparseCodes) else SparseCodes.from_dense(codes)
        return sparse.scale(self.decoder_norms()) if self.rescales else sparse

    def decode(self, acts: Float[Tensor, "... codes"] | SparseCodes) -> Float[Tensor, "... d_in"]:
        """Raw activations from codes, dense or sparse: [..., d_sae] -> [..., d_in] (heads stay flat).

        Raises:
            ShapeError: codes of another width.
        """
        width = acts.d_sae if isinstance(acts, SparseCodes) else acts.shape[-1]
        if width != self.d_sae:
            raise ShapeError(f"expected codes of width d_sae = {self.d_sae}, found {width}")
        if self.rescales:
            norms = self.decoder_norms()
            acts = acts.scale(1 / norms) if isinstance(acts, SparseCodes) else acts / norms
        codes = acts if isinstance(acts, SparseCodes) else acts.to(self.dtype)
        return self.norm_in.inverse(self.hook_sae_recons(self.reconstruct(codes)))

    def forward(self, u: Float[Tensor, "..."], *, use_error_term: bool | None = None) -> Float[Tensor, "..."]:
        """Reconstruction of raw activations, in their shape.

        With the error term, what the SAE misses without edits of its internals is added (as a constant), so that
        unedited output equals the input; `None` takes the SAE's own `use_error_term`.
        """
        flat, shape = self._prepare(u)
        seen = self.hook_sae_input(flat)
        if self.hook_sae_acts_post.is_listening:
            out = self.decode(self._acts(seen))
        else:
            out = self.norm_in.inverse(self.hook_sae_recons(self.reconstruct(self._encode(seen).codes)))
        if self.use_error_term if use_error_term is None else use_error_term:
            out = out + self.hook_sae_error(self._error(flat, out))
        return self.hook_sae_output(out.reshape(shape))

    def preactivations(
        self, x: Float[Tensor, "... d_in"], latents: Int[Tensor, " latents"] | None = None
    ) -> Float[Tensor, "... _"]:
        """h = (x − a·b_dec) W_enc + b_enc, of all latents or of some.

        b_dec moves into the bias, so no gradient of the size of x is built for it. Of some latents only (dead ones, in
        AuxK) b_dec is taken as a constant.
        """
        W_enc, b_enc, b_dec = self.W_enc, self.b_enc, self.b_dec
        if latents is not None:
            W_enc, b_enc, b_dec = W_enc[:, latents], b_enc[latents], b_dec.detach()
        if self.cfg.apply_b_dec_to_input:
            b_enc = (widen(b_enc) - widen(b_dec) @ widen(W_enc)).to(self.dtype)
        flat = torch.addmm(b_enc, x.reshape(-1, self.d_in), W_enc)
        return flat.reshape(*x.shape[:-1], len(b_enc))

    def reconstruct(self, codes: Codes) -> Float[Tensor, "... d_in"]:
        """codes · W_dec + b_dec, in training space."""
        return decode(codes, self.W_dec) + self.b_dec

    def decoder_norms(self) -> Float[Tensor, " d_sae"]:
        """n_i = ‖W_dec[i]‖, at least 1e-8, in float32 or wider."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.linalg.vector_norm(self.W_dec, dim=1, dtype=wide).clamp(min=SMALLEST_NORM)

    def _encode(self, seen: Float[Tensor, "... d_in"]) -> Encoding:
        point = self.hook_sae_acts_pre
        return self.encoding(self.norm_in(seen), point if point.is_listening else None)

    def _acts(self, seen: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        acts = to_dense(self._encode(seen).codes)
        if self.rescales:
            acts = acts * self.decoder_norms().to(acts.dtype)
        return self.hook_sae_acts_post(acts)

    @torch.no_grad()
    def _error(self, flat: Float[Tensor, "... d_in"], out: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_in"]:
        internals = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post, self.hook_sae_recons)
        if not any(point.is_listening for point in internals):
            return flat - out
        return flat - self.norm_in.inverse(self.reconstruct(self.encoding(self.norm_in(flat)).codes))

    def _prepare(self, u: Tensor) -> tuple[Float[Tensor, "... d_in"], tuple[int, ...]]:
        """`u` in the SAE's dtype with heads flattened, and the shape that the output gets back."""
        if u.ndim and u.shape[-1] == self.d_in:
            return u.to(self.dtype), tuple(u.shape)
        heads = self.cfg.reshape_activations == "hook_z"
        if heads and u.ndim >= 2 and u.shape[-2] * u.shape[-1] == self.d_in:
            return u.to(self.dtype).flatten(-2), tuple(u.shape)
        wanted = f"[..., {self.d_in}]" + (
            f" or [..., heads, d_head] with heads · d_head = {self.d_in}" if heads else ""
        )
        site = self.cfg.metadata.hook_name
        raise ShapeError(
            f"expected activations of shape {wanted}, found {list(u.shape)}"
            + (f"; this SAE reads {site!r} of {self.cfg.metadata.model_name}" if site else "")
        )

    # ---- folds -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold_decoder_norm(self) -> "SAE":
        """Give every decoder row norm 1 and its latent the scale, in place; the output is unchanged, codes become c·n.

        Raises:
            ConfigError: the architecture compares unscaled latents with each other, so the fold would change which are
                selected.
        """
        if not self._decoder_norm_folds():
            raise ConfigError(
                f"the decoder norms of this {self.cfg.architecture} SAE differ and take no part in its selection: "
                "folding them would change which latents are on"
            )
        norms = self.decoder_norms()
        self.scale_latents(norms)
        self.W_dec.div_(norms[:, None])
        self._record_fold(decoder_norm=True)
        if self.rescales:
            self.cfg = dataclasses.replace(self.cfg, rescale_acts_by_decoder_norm=False)
        return self

    @torch.no_grad()
    def fold_normalization(self) -> "SAE":
        """Move the activations' scale into the weights, in place; codes and output are unchanged.

        Where selection depends on decoder norms these are folded first, because the scale changes them.
        """
        if self.norm_in.mode == "none":
            return self
        if self.rescales:
            self.fold_decoder_norm()
        scale = self.norm_in.scale
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.b_dec.div_(scale)
        self._record_fold(scale_in=scale.item(), scale_out=scale.item())
        self.norm_in = Normalization("none", self.d_in)
        self.cfg = dataclasses.replace(self.cfg, normalize_activations="none")
        return self

    @torch.no_grad()
    def to_inference(self) -> "SAE":
        """A copy to be saved for use: scales and, where that is exact, decoder norms folded. This SAE is left as it is.

        With unit decoder rows a code is the length of its contribution, in units of the raw activations. Fields that
        only shaped training move to `metadata.training_architecture_details`.
        """
        sae = copy.deepcopy(self)
        sae.fold_normalization()
        if sae._decoder_norm_folds():
            sae.fold_decoder_norm()
        sae.cfg = sae.cfg.for_inference()
        return sae

    def _decoder_norm_folds(self) -> bool:
        norms = self.decoder_norms()
        return self.norm_fold_is_exact or self.rescales or torch.allclose(norms, norms[:1], rtol=1e-6, atol=0)

    def _record_fold(self, **facts: float | bool) -> None:
        ours = self.cfg.metadata.extra.setdefault("sae_kit", {})
        ours.setdefault("folded", {}).update(facts)

    # ---- files -----------------------------------------------------------------------------------------------------

    def save_model(self, folder: Path | str) -> Path:
        """Write the SAE into `folder`, in the layout that `sae_kit.io` describes."""
        from sae_kit.io import save

        return save(self, Path(folder))

    @classmethod
    def load_from_disk(
        cls, folder: Path | str, *, device: str | torch.device = "cpu", dtype: str | None = None, strict: bool = True
    ) -> "SAE":
        """The SAE in `folder`, whatever its architecture; `dtype=None` keeps the file's.

        Raises:
            CorruptFileError, FormatTooNewError, UnknownArchitectureError, UnknownConfigKeyError: see `sae_kit.io.load`.
        """
        from sae_kit.io import load

        return load(Path(folder), device=device, dtype=dtype, strict=strict)

    # ---- torch -----------------------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        """`.to(bfloat16)` leaves thresholds and statistics in full precision."""
        exact = {name: tensor.detach() for name, tensor in self._exact_tensors()}
        super()._apply(fn, recurse)
        wide = _exact_dtype(self.dtype)
        for name, tensor in self._exact_tensors():
            if tensor.dtype != wide:
                tensor.data = exact[name].to(device=tensor.device, dtype=wide)
        dtype = str(self.dtype).removeprefix("torch.")
        if dtype != self.cfg.dtype:
            self.cfg = trees.structure_fields(type(self.cfg), {**trees.shallow(self.cfg), "dtype": dtype})
        return self

    def _exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in itertools.chain(self.named_parameters(), self.named_buffers()):
            if name in self.exact_dtype_tensors:
                yield name, tensor

    def extra_repr(self) -> str:
        site = f", {self.cfg.metadata.hook_name}" if self.cfg.metadata.hook_name else ""
        return f"d_in={self.d_in}, d_sae={self.d_sae}, {str(self.dtype).removeprefix('torch.')}{site}"


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of thresholds and statistics in an SAE of `dtype`: float32, or float64 in a float64 SAE."""
    return torch.float64 if dtype == torch.float64 else torch.float32
