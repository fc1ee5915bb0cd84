"""The base of all architectures: what an SAE is, whatever switches its latents on and whatever it reads and writes.

One pass (notation of the docs: u raw, x and y normalised, h pre-activation, c code, v̂ the output):

    x = N_in(u)        h = (x − a·b_dec) W_enc + b_enc        c = f(h)        v̂ = N_out⁻¹(c W_dec + b_dec [+ x W_skipᵀ])

An architecture file supplies f (`encoding`) and its sparsity loss (`sparsity_losses`); `geometry.py` says how weights
connect sites and latents; everything else is here: dtypes, normalisation, hook points, the error term. The same class
trains and is used.
"""

import copy
import dataclasses
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit import config as trees
from sae_kit import folding
from sae_kit.errors import ConfigError, MissingContextError, ShapeError
from sae_kit.hooks import HookPoint
from sae_kit.normalization import PER_ROW, Affine, Normalization
from sae_kit.ops import Codes, SparseCodes, to_dense, widen
from sae_kit.sae_config import DTYPES, SAEConfig
from sae_kit.seeding import generator

LATENTS_PER_BLOCK = 1_024  # initial weights are drawn per block, so that they do not depend on how latents are sharded
STATISTICS = tuple(f"norm_{side}.{name}" for side in ("in", "out") for name in ("scale", "mean", "matrix", "inverse"))


class Encoding(NamedTuple):
    """What one pass of the encoder leaves for the decoder and the losses; all latents lie on the last axis."""

    codes: Codes
    """what the decoder multiplies; with `rescale_acts_by_decoder_norm` this is c / n, not yet the user's c"""
    pre: Float[Tensor, "... n_latents"] | None
    """pre-activations that the sparsity loss reads; None where there are none (matching pursuit)"""
    extra: Float[Tensor, "..."] | None = None
    """output beside the latents: the skip connection, the prediction of a temporal SAE"""
    details: Mapping[str, Float[Tensor, ""]] = {}
    """numbers about this pass for the logs"""


class AuxiliaryTask(NamedTuple):
    """What some dead latents are asked to explain (AuxK)."""

    weight: float
    layer: int
    """block of the latents"""
    latents: Int[Tensor, " latents"]
    """their numbers within the block"""
    residual: Float[Tensor, "rows _"]
    """what the living ones miss of all that the block writes, without gradient"""


class RowContext(NamedTuple):
    """What decoding needs to know of the rows that were encoded, where it needs anything."""

    scale: Float[Tensor, "..."] | None = None
    """per-row normalisation: factor on the output"""
    shift: Float[Tensor, "..."] | None = None
    """per-row normalisation: added after it"""
    extra: Float[Tensor, "..."] | None = None
    """output beside the latents, in training space"""
    heads: tuple[int, int] | None = None
    """axes into which the output is split"""


class SAE(nn.Module, ABC):
    """A sparse autoencoder: activations in, sparse codes and a reconstruction out. Trained and used by the same class.

    Parameters have the public shapes W_enc [d_in, d_sae], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out]; with
    several sites W_enc [sites, d_in, d_sae], W_dec [d_sae, sites, d_out], b_dec [sites, d_out]; a cross-layer
    transcoder has W_enc [layers, d_in, d_sae], b_enc [layers, d_sae] and decoders W_dec[l] [d_sae, layers − l, d_out].
    Per-latent parameters have `latent_shape`. Counters of training (`tokens_since_fired`, `firing_count`,
    `tokens_seen`) are buffers over all latents.
    """

    config_class: ClassVar[type[SAEConfig]]
    exact_dtype_tensors: ClassVar[frozenset[str]] = frozenset(STATISTICS)
    """names of tensors that stay in float32 or wider whatever the dtype of the SAE"""
    threshold_names: ClassVar[frozenset[str]] = frozenset()
    """parameters whose gradient is a kernel estimate: an optimizer group of their own, outside the gradient norm"""
    norm_fold_is_exact: ClassVar[bool] = True
    """whether f works latent by latent, so that scaling one latent cannot change which others are on"""
    trainable: ClassVar[bool] = True
    """whether there is a way to train it; the others are loaded and used"""
    selects_over_batch: ClassVar[bool] = False
    """whether training follows a rule that needs a batch, so that `to_inference` gives another architecture"""
    geometries: ClassVar[frozenset[str]] = frozenset(
        {"sae", "skip", "transcoder", "skip_transcoder", "crosscoder", "clt"}
    )
    """kinds of geometry that the architecture makes sense with"""
    reads_sequences: ClassVar[bool] = False
    """whether the axis before the features is time, so that the code of a row depends on the rows before it"""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    W_skip: Tensor
    tokens_since_fired: Tensor
    firing_count: Tensor
    tokens_seen: Tensor

    def __init__(self, cfg: SAEConfig, *, seed: int = 0) -> None:
        super().__init__()
        if not isinstance(cfg, self.config_class):
            raise ConfigError(f"{type(self).__name__} needs a {self.config_class.__name__}, found {type(cfg).__name__}")
        self.geometry = cfg.geometry()
        if self.geometry.kind not in self.geometries:
            raise ConfigError(
                f"{cfg.architecture} has no {self.geometry.kind} form; it can be: {', '.join(sorted(self.geometries))}"
            )
        # A copy, because folds write into the metadata.
        self.cfg = dataclasses.replace(
            cfg, apply_b_dec_to_input=cfg.subtracts_b_dec, metadata=copy.deepcopy(cfg.metadata)
        )
        self.d_sae, self.d_in, self.d_out = cfg.d_sae, self.geometry.in_shape[-1], self.geometry.out_shape[-1]
        self.use_error_term = False
        self.seed = seed
        """root of the draws that training makes for this SAE"""
        wide = _exact_dtype(DTYPES[cfg.dtype])
        self.norm_in = self.make_normalization(self.geometry.in_shape)
        if not self.geometry.same_site:
            self.norm_out = self.make_normalization(self.geometry.out_shape)
        for name, shape in self.parameter_shapes().items():
            dtype = wide if name in self.exact_dtype_tensors else DTYPES[cfg.dtype]
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
            owner, _, index = name.partition(".")
            if not index:
                self.register_parameter(name, parameter)
            elif owner in self._modules:
                self.get_submodule(owner).append(parameter)  # pyright: ignore[reportCallIssue]
            else:
                self.register_module(owner, nn.ParameterList([parameter]))
        self.register_buffer("tokens_since_fired", torch.zeros(self.geometry.n_latents, dtype=torch.int64))
        self.register_buffer("firing_count", torch.zeros(self.geometry.n_latents, dtype=torch.int64))
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))
        self.hook_sae_input = HookPoint()
        self.hook_sae_acts_pre = HookPoint()
        self.hook_sae_acts_post = HookPoint()
        self.hook_sae_output = HookPoint()
        self.hook_sae_recons = HookPoint()
        self.hook_sae_error = HookPoint()
        if not self.b_dec.is_meta:
            self.initialize(seed)
            self.to(cfg.device)

    # ---- what an architecture defines ------------------------------------------------------------------------------

    @abstractmethod
    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        """Codes of normalised rows [..., *in_shape]; `on_pre` sees, and may replace, the pre-activations."""

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        """The same in training, where a rule may look at the whole batch, or follow a schedule in `values`."""
        return self.encoding(x)

    def reconstruction_loss(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], y_hat: Float[Tensor, "rows ..."]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """E_b ‖ŷ − y‖², summed over all that is written, and parts of it to be logged."""
        return squared_error(y_hat, y), {}

    def sparsity_losses(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], values: Mapping[str, float]
    ) -> dict[str, Float[Tensor, ""]]:
        """The architecture's own loss terms, each with its coefficient; `y` is the target in training space."""
        return {}

    def observe(self, encoding: Encoding, values: Mapping[str, float]) -> None:
        """Statistics of an architecture's own, once per step, from the codes that were trained on."""

    def schedule_settled(self) -> None:
        """Called once, when a schedule that changes the selection has come to its end."""

    def training_state(self) -> dict[str, Float[Tensor, ""]]:
        """Numbers of an architecture's own for the logs."""
        return {}

    def activation(self, pre: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The code of a latent that is on."""
        return torch.relu(pre)

    def auxiliary_tasks(
        self,
        encoding: Encoding,
        y: Float[Tensor, "rows ..."],
        y_hat: Float[Tensor, "rows ..."],
        dead: Int[Tensor, " latents"],
    ) -> Iterator[AuxiliaryTask]:
        """What dead latents (numbers on the axis of all latents) are to explain: the error, block by block."""
        residual = widen(y.detach()) - widen(y_hat.detach())
        for layer, latents in self.geometry.by_layer(dead):
            yield AuxiliaryTask(1.0, layer, latents, self.geometry.written(residual, layer))

    def for_use(self) -> "SAE":
        """An SAE that computes the same at inference; a rule that needs a batch becomes one that does not."""
        return self

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters, in the order of files."""
        return self.geometry.parameter_shapes()

    def make_normalization(self, shape: tuple[int, ...]) -> Normalization:
        """What brings activations of this shape into training space, without statistics yet."""
        mode, wide = self.cfg.normalize_activations or "none", _exact_dtype(DTYPES[self.cfg.dtype])
        return Normalization(mode, shape, wide, self.cfg.norm_statistic)

    @property
    def adds_b_dec(self) -> bool:
        """Whether the output has b_dec; with one matrix both ways it is on both sides or on neither."""
        return True

    def gate_threshold(self) -> Float[Tensor, " n_latents"] | None:
        """θ that a latent's pre-activation must pass, in its units; None is 0."""
        return None

    def reset_latents(self, latents: Int[Tensor, " latents"]) -> None:
        """Biases and thresholds of latents whose directions were drawn anew (resampling) as at the start."""
        for name in ("b_enc", "b_gate", "b_mag", "r_mag"):
            if name in self._parameters:
                self.get_parameter(name).view(-1)[latents] = 0.0

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random decoder directions of norm `decoder_init_norm`, biases and skip zero.

        The encoder is the transpose where the site read is the one written; elsewhere it is drawn by itself.
        """
        norm = 1.0 if self.cfg.decoder_norm_constraint == "unit" else self.cfg.decoder_init_norm
        for layer in range(self.geometry.layers):
            decoder = self.geometry.decoder(self.W_dec, layer)
            _draw(decoder, seed, f"init_{layer}" if layer else "init")
            if norm is not None:
                decoder *= norm / self.geometry.block_norms(decoder)[:, None].to(decoder.dtype)
            if "W_enc" not in self._parameters:
                continue
            encoder = self.geometry.encoder(self.W_enc, layer)
            if self.geometry.same_site:
                encoder.copy_(decoder.T)
            else:
                drawn = torch.empty(encoder.T.shape, dtype=encoder.dtype)
                _draw(drawn, seed, f"init_encoder_{layer}" if layer else "init_encoder")
                if norm is not None:
                    drawn *= norm / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)
                encoder.copy_(drawn.T)

    @torch.no_grad()
    def restore_constraints(self) -> None:
        """What holds after every optimizer step: unit decoder rows, where they are asked for."""
        if self.cfg.decoder_norm_constraint == "unit":
            self.geometry.scale_decoder(self.W_dec, (1 / self.decoder_norms()).to(self.dtype))

    def scale_latents(self, factor: Float[Tensor, " n_latents"]) -> None:
        """Scale the encoder so that every code is `factor` times larger (part of the decoder-norm fold)."""
        factor = factor.reshape(self.latent_shape)
        self.W_enc.mul_(factor[:, None] if self.geometry.cross_layer else factor)
        self.scale_biases(factor)

    def scale_biases(self, factor: Float[Tensor, "..."]) -> None:
        """The part of `scale_latents` beside W_enc; `factor` has `latent_shape`."""
        self.b_enc.mul_(factor)

    def fold_affine(self, read: Affine, written: Affine) -> None:
        """Take in an affine normalisation (see `sae_kit.folding`)."""
        folding.fold_affine(self, read, written)

    def shift_preactivations(self, delta: Float[Tensor, " n_latents"]) -> None:
        """Add to what W_enc gives (part of folding a normalisation that shifts)."""
        self.b_enc.add_(delta.reshape(self.latent_shape))

    # ---- use -------------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.b_dec.dtype

    @property
    def device(self) -> torch.device:
        return self.b_dec.device

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one row of codes: (d_sae,), or (layers, d_sae)."""
        return self.geometry.latent_shape

    @property
    def norm_target(self) -> Normalization:
        """Normalisation of what is written."""
        return self.norm_in if self.geometry.same_site else self.norm_out

    @property
    def rescales(self) -> bool:
        """Whether latents are ranked and reported as c·n, n the norm of their decoder row."""
        return bool(getattr(self.cfg, "rescale_acts_by_decoder_norm", False))

    @property
    def needs_context(self) -> bool:
        """Whether `decode` needs the rows that were encoded, beside their codes."""
        return self.norm_target.mode in PER_ROW or self.geometry.skip

    def encode(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Codes of raw activations: [..., *in_shape] (hook_z: also [..., heads, d_head]) -> [..., *latent_shape].

        Raises:
            ShapeError: the last axes are not `in_shape`.
        """
        return self._acts(self._encode(self.hook_sae_input(self._prepare(u)[0]))[0].codes)

    def encode_sparse(self, u: Float[Tensor, "..."]) -> SparseCodes:
        """The same codes without the zeros; nothing of the size of dense codes is made for hooks that are not there.

        They carry the context that `decode` may need.
        """
        flat, heads = self._prepare(u)
        found, context = self._encode(self.hook_sae_input(flat), heads)
        codes = found.codes
        if self.hook_sae_acts_post.is_listening:
            codes = SparseCodes.from_dense(self._acts(codes).flatten(-len(self.latent_shape)))
        else:
            codes = codes if isinstance(codes, SparseCodes) else SparseCodes.from_dense(codes)
            codes = codes.scale(self.decoder_norms()) if self.rescales else codes
        shape = self.latent_shape if self.geometry.cross_layer else None
        return dataclasses.replace(codes, latent_shape=shape, context=context if self.needs_context else None)

    def decode(
        self, acts: Float[Tensor, "..."] | SparseCodes, context: RowContext | None = None
    ) -> Float[Tensor, "..."]:
        """Raw activations from codes, dense [..., *latent_shape] or sparse: [..., *out_shape].

        `context`, from `row_context`, is needed where a row was scaled by itself or part of the output does not pass
        through the latents; sparse codes carry theirs. It also splits the output into the heads of the input.

        Raises:
            ShapeError: codes of another width. MissingContextError: no context where one is needed.
        """
        if isinstance(acts, SparseCodes):
            context = context or acts.context
            codes: Codes = dataclasses.replace(acts, latent_shape=None)
            width, wanted = (acts.d_sae,), (self.geometry.n_latents,)
        else:
            wanted = self.latent_shape
            width = tuple(acts.shape[-len(wanted) :])
            codes = acts.to(self.dtype).flatten(-len(wanted)) if width == wanted else acts
        if width != wanted:
            raise ShapeError(f"expected codes of width d_sae = {_plain(wanted)}, found {_plain(width)}")
        if self.needs_context and context is None:
            raise MissingContextError(
                "part of the output does not pass through the latents, or is scaled row by row: "
                "decode(acts, context=sae.row_context(u))"
            )
        if self.rescales:
            norms = self.decoder_norms()
            codes = codes.scale(1 / norms) if isinstance(codes, SparseCodes) else (codes / norms).to(self.dtype)
        return self._output(self.reconstruct(codes), context or RowContext())

    def row_context(self, u: Float[Tensor, "..."]) -> RowContext:
        """What `decode` needs of the rows `u` beside their codes."""
        flat, heads = self._prepare(u)
        x, scale, shift = self.norm_in.normalize(flat)
        return RowContext(scale, shift, self.extra_output(x), heads)

    def extra_output(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."] | None:
        """Output in training space that does not pass through the latents."""
        return self.geometry.apply_skip(x, self.W_skip) if self.geometry.skip else None

    def forward(
        self,
        u: Float[Tensor, "..."],
        *,
        target: Float[Tensor, "..."] | None = None,
        use_error_term: bool | None = None,
    ) -> Float[Tensor, "..."]:
        """Raw activations from raw activations: of an SAE the reconstruction, in the shape of its input.

        With the error term, what the SAE misses without edits of its internals is added (as a constant), so that
        unedited output equals the true one; `None` takes the SAE's own `use_error_term`. Where another site is written,
        the true output has to be given as `target`.

        Raises:
            ShapeError: input or target of another shape. ConfigError: an error term without a target.
        """
        flat, heads = self._prepare(u)
        found, context = self._encode(self.hook_sae_input(flat), heads)
        if self.hook_sae_acts_post.is_listening:
            out = self.decode(self._acts(found.codes), context)
        else:
            out = self._output(self.reconstruct(found.codes), context)
        if self.use_error_term if use_error_term is None else use_error_term:
            out = out + self.hook_sae_error(self._error(u, flat, target, out))
        return self.hook_sae_output(out)

    def project(self, x: Float[Tensor, "..."], bias: Tensor) -> Float[Tensor, "... n_latents"]:
        """(x − a·b_dec) W_enc + bias, the bias of `latent_shape`.

        b_dec moves into the bias, so no gradient of the size of x is built for it.
        """
        bias = bias.flatten()
        if self.cfg.apply_b_dec_to_input:
            centre = self.geometry.project(widen(self.b_dec)[None], widen(self.W_enc), torch.zeros_like(widen(bias)))
            bias = (widen(bias) - centre[0]).to(self.dtype)
        leading = self._leading(x)
        flat = self.geometry.project(x.reshape(-1, *self.geometry.in_shape), self.W_enc, bias)
        return flat.reshape(*leading, self.geometry.n_latents)

    def preactivations(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... n_latents"]:
        """h = (x − a·b_dec) W_enc + b_enc."""
        return self.project(x, self.b_enc)

    def project_some(
        self, x: Float[Tensor, "rows ..."], latents: Int[Tensor, " latents"], layer: int = 0
    ) -> Float[Tensor, "rows latents"]:
        """(x − a·b_dec) W_enc of some latents of one block; b_dec is taken as a constant."""
        W_enc = self.geometry.encoder(self.W_enc, layer)[:, latents]
        found = self.geometry.read(x, layer) @ W_enc
        if self.cfg.apply_b_dec_to_input:
            found = found - self.geometry.read(self.b_dec.detach()[None], layer) @ W_enc
        return found

    def preactivations_of(
        self, x: Float[Tensor, "rows ..."], latents: Int[Tensor, " latents"], layer: int = 0
    ) -> Float[Tensor, "rows latents"]:
        """What these latents of block `layer` would say if they were on, with gradient to them alone (AuxK)."""
        return self.project_some(x, latents, layer) + self.geometry.latents(self.b_enc.flatten(), layer)[latents]

    def reconstruct(self, codes: Codes) -> Float[Tensor, "..."]:
        """codes · W_dec + b_dec, in training space: [..., *out_shape]."""
        leading = codes.leading if isinstance(codes, SparseCodes) else tuple(codes.shape[:-1])
        rows = codes if isinstance(codes, SparseCodes) else codes.reshape(-1, self.geometry.n_latents)
        recons = self.geometry.decode(rows, self.W_dec)
        recons = recons + self.b_dec if self.adds_b_dec else recons
        return recons.reshape(*leading, *self.geometry.out_shape)

    def training_space(self, u: Float[Tensor, "..."]) -> Float[Tensor, "rows ..."]:
        """Raw activations, normalised and in rows: [..., *in_shape] -> [rows, *in_shape]."""
        return self.norm_in(self._prepare(u)[0]).reshape(-1, *self.geometry.in_shape)

    def decoder_norms(self) -> Float[Tensor, " n_latents"]:
        """n_i of every latent (‖W_dec[i]‖ of an SAE), at least 1e-8, in float32 or wider."""
        return self.geometry.norms(self.W_dec)

    def _encode(self, seen: Float[Tensor, "..."], heads: tuple[int, int] | None = None) -> tuple[Encoding, RowContext]:
        x, scale, shift = self.norm_in.normalize(seen)
        point = self.hook_sae_acts_pre
        found = self.encoding(x, self._on_pre if point.is_listening else None)
        extra = found.extra if found.extra is not None else self.extra_output(x)
        return found, RowContext(scale, shift, extra, heads)

    def _on_pre(self, pre: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... n_latents"]:
        seen = self.hook_sae_acts_pre(pre.unflatten(-1, self.latent_shape))
        return seen.flatten(-len(self.latent_shape))

    def _acts(self, codes: Codes) -> Float[Tensor, "..."]:
        acts = to_dense(codes)
        if self.rescales:
            acts = acts * self.decoder_norms().to(acts.dtype)
        return self.hook_sae_acts_post(acts.unflatten(-1, self.latent_shape))

    def _output(self, recons: Float[Tensor, "..."], context: RowContext) -> Float[Tensor, "..."]:
        recons = self.hook_sae_recons(recons)
        if context.extra is not None:
            recons = recons + context.extra
        out = self.norm_target.undo(recons, context.scale, context.shift)
        return out.unflatten(-1, context.heads) if context.heads and self.geometry.same_site else out

    @torch.no_grad()
    def _error(
        self, u: Float[Tensor, "..."], flat: Float[Tensor, "..."], target: Tensor | None, out: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        if target is None and not self.geometry.same_site:
            raise ConfigError(
                f"the error term of a {self.geometry.kind} is what it misses of the site that it writes: give the true "
                "values there, sae(u, target=v)"
            )
        true = (u if target is None else target).to(out.dtype)
        if true.shape != out.shape:
            raise ShapeError(f"expected a target of shape {list(out.shape)}, found {list(true.shape)}")
        internals = (self.hook_sae_input, self.hook_sae_acts_pre, self.hook_sae_acts_post, self.hook_sae_recons)
        if not any(point.is_listening for point in internals):
            return true - out
        x, scale, shift = self.norm_in.normalize(flat)
        found = self.encoding(x)
        extra = found.extra if found.extra is not None else self.extra_output(x)
        recons = self.reconstruct(found.codes)
        clean = self.norm_target.undo(recons if extra is None else recons + extra, scale, shift)
        return true - clean.reshape(true.shape)

    def _leading(self, x: Float[Tensor, "..."]) -> tuple[int, ...]:
        return tuple(x.shape[: x.ndim - len(self.geometry.in_shape)])

    def _prepare(self, u: Tensor) -> tuple[Float[Tensor, "..."], tuple[int, int] | None]:
        """`u` in the SAE's dtype with heads flattened, and the heads that it had."""
        shape = self.geometry.in_shape
        if u.shape[-len(shape) :] == shape:
            return u.to(self.dtype), None
        heads = self.cfg.reshape_activations == "hook_z"
        if heads and u.ndim >= 2 and u.shape[-2] * u.shape[-1] == self.d_in:
            return u.to(self.dtype).flatten(-2), (u.shape[-2], u.shape[-1])
        wanted = f"[..., {', '.join(map(str, shape))}]" + (
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
        folding.fold_decoder_norm(self)
        return self

    @torch.no_grad()
    def fold_normalization(self) -> "SAE":
        """Move the normalisation into the weights, in place; codes and output are unchanged.

        Where selection depends on decoder norms these are folded first, because the scale changes them. What scales
        each row by itself stays.
        """
        if self.norm_in.mode != "none" and self.norm_in.mode not in PER_ROW:
            folding.fold_normalization(self)
        return self

    @torch.no_grad()
    def to_inference(self) -> "SAE":
        """A copy to be saved for use: scales and, where that is exact, decoder norms folded. This SAE is left as it is.

        With unit decoder rows a code is the length of its contribution, in units of the raw activations. A rule that
        selects over a batch becomes a threshold. Fields that only shaped training move to
        `metadata.training_architecture_details`.
        """
        sae = copy.deepcopy(self)
        sae.cfg = sae.cfg.for_inference()
        sae = sae.for_use()
        if sae.rescales:
            sae.fold_decoder_norm()
        sae.fold_normalization()
        if sae.decoder_norm_folds():
            sae.fold_decoder_norm()
        sae.cfg = sae.cfg.for_inference()
        return sae

    def decoder_norm_folds(self) -> bool:
        """Whether `fold_decoder_norm` would leave the selection of latents alone."""
        norms = self.decoder_norms()
        return self.norm_fold_is_exact or self.rescales or torch.allclose(norms, norms[:1], rtol=1e-6, atol=0)

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
        kind = self.geometry
        shape = f"d_in={self.d_in}" if kind.kind == "sae" else f"{kind.kind} {kind.in_shape} -> {kind.out_shape}"
        return f"{shape}, d_sae={self.d_sae}, {str(self.dtype).removeprefix('torch.')}{site}"


def _exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of thresholds and statistics in an SAE of `dtype`: float32, or float64 in a float64 SAE."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squared_error(y_hat: Float[Tensor, "rows ..."], y: Float[Tensor, "rows ..."]) -> Float[Tensor, ""]:
    """E_b ‖ŷ − y‖² over all that is written, summed in float32 or wider."""
    return (widen(y_hat) - widen(y)).flatten(1).square().sum(dim=1).mean()


def _draw(rows: Float[Tensor, "latents width"], seed: int, purpose: str) -> None:
    """Fill with uniform numbers of such a variance that rows have expected squared norm 1."""
    bound = math.sqrt(3 / rows.shape[1])
    for block, part in enumerate(rows.split(LATENTS_PER_BLOCK)):
        drawn = torch.empty(part.shape, dtype=torch.float32)
        part.copy_(drawn.uniform_(-bound, bound, generator=generator(seed, purpose, index=block)))


def _plain(shape: tuple[int, ...]) -> int | list[int]:
    return shape[0] if len(shape) == 1 else list(shape)
