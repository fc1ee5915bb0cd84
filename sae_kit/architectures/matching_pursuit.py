"""Matching pursuit: latents are chosen one after the other, each for what those before it left (arXiv 2506.03093).

Encoder and decoder are one matrix of unit rows d_i. From r = x − a·b_dec, each row by itself, repeats

    i = argmax_j ⟨r, d_j⟩        w = relu⟨r, d_i⟩        c_i ← c_i + w        r ← r − w d_i

until w = 0, the support of c stays the same, or ‖r‖ falls below a threshold. Rows that are done leave the batch, at
the price of waiting for the device once in every iteration. The choice i has no gradient; w has one to r and to d_i.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sae_kit.errors import ConfigError
from sae_kit.normalization import Affine
from sae_kit.ops import SparseCodes, widen
from sae_kit.registry import register
from sae_kit.sae import SAE, Encoding
from sae_kit.sae_config import SAEConfig, training_only


@dataclass(frozen=True, kw_only=True)
class MatchingPursuitSAEConfig(SAEConfig):
    """As many latents as a row needs to be explained, chosen greedily; no encoder of its own."""

    # Whitening cannot be folded into a matrix that is both encoder and decoder.
    normalizations = SAEConfig.normalizations - {"covariance_whitening"}

    residual_threshold: float = 1e-2
    """norm of what is left of a row, in training space, below which it is done"""
    max_iterations: int | None = None
    """latents chosen at most in a row, one that is chosen twice counted twice; None = d_in"""
    stop_on_duplicate_support: bool = True
    """a row is done when it chooses a latent for the second time"""
    decoder_init_norm: float | None = training_only(1.0)
    """norm of the decoder rows, which is always 1"""
    decoder_norm_constraint: Literal["free", "unit"] = training_only("unit")
    """decoder rows always keep norm 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, fixed in (("decoder_init_norm", 1.0), ("decoder_norm_constraint", "unit")):
            if getattr(self, name) != fixed:
                raise ConfigError(
                    f"decoder rows of matching pursuit have norm 1: {name} must be {fixed!r}, found "
                    f"{getattr(self, name)!r}"
                )
        if not self.residual_threshold >= 0:
            raise ConfigError(f"residual_threshold must be at least 0, found {self.residual_threshold}")
        if self.max_iterations is not None and self.max_iterations < 1:
            raise ConfigError(f"max_iterations must be at least 1 or None, found {self.max_iterations}")
        for name in ("aux_coefficient", "pre_act_loss_coefficient"):
            if getattr(self, name):
                raise ConfigError(f"{name} needs pre-activations, which matching pursuit has none of: leave it out")
        if self.normalize_activations == "center_and_scale" and not self.subtracts_b_dec:
            raise ConfigError(
                "center_and_scale shifts activations, and without apply_b_dec_to_input nothing in a matching pursuit "
                "SAE can take in the shift: set apply_b_dec_to_input or choose expected_average_only_in"
            )


@register("matching_pursuit", MatchingPursuitSAEConfig)
class MatchingPursuitSAE(SAE):
    """Greedy selection against one matrix of unit rows: ‖r‖ never grows, c ≥ 0, x − a·b_dec = c W_dec + r."""

    cfg: MatchingPursuitSAEConfig
    geometries = frozenset({"sae"})
    norm_fold_is_exact = False
    has_preactivations = False

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes()
        return {name: shapes[name] for name in ("W_dec", "b_dec")}

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A view of the decoder."""
        return self.W_dec.T

    @property
    def adds_b_dec(self) -> bool:
        return bool(self.cfg.apply_b_dec_to_input)

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        return Encoding(self._pursue(x)[0])

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        codes, left = self._pursue(x)
        if not len(left):
            return Encoding(codes)
        l0, norms = codes.l0(), torch.linalg.vector_norm(left, dim=1)
        details = {
            "max_l0": l0.max(),
            "min_l0": l0.min(),
            "residual_norm": norms.mean(),
            "residual_threshold_converged_portion": (norms < self.cfg.residual_threshold).to(norms.dtype).mean(),
        }
        return Encoding(codes, details={name: value.to(norms.dtype) for name, value in details.items()})

    def _pursue(self, x: Float[Tensor, "... d_in"]) -> tuple[SparseCodes, Float[Tensor, "rows d_in"]]:
        """Codes, and what they leave of each row (without gradient)."""
        rows = widen(x).reshape(-1, self.d_in)  # residuals are sums of many terms: never in half precision
        if self.cfg.apply_b_dec_to_input:
            rows = rows - widen(self.b_dec)
        cfg = self.cfg
        stop = Stop(cfg.max_iterations or self.d_in, cfg.residual_threshold, cfg.stop_on_duplicate_support)
        values, row, latent, left = _Pursuit.apply(rows, self.W_dec, stop)
        codes = collected(values.to(self.dtype), row, latent, len(rows), self.d_sae)
        return dataclasses.replace(codes, leading=tuple(x.shape[:-1])), left

    # ---- folds: the one matrix keeps its unit rows, so what changes is the unit of the codes -------------------------

    def fold_decoder_norm(self) -> "MatchingPursuitSAE":
        """Decoder rows have norm 1 already."""
        return self

    @torch.no_grad()
    def fold_affine(self, read: Affine, written: Affine) -> None:
        """With x = s(u − m): b_dec ← b_dec/s + m, the threshold is divided by s, and with it every code."""
        scale = read.matrix[0, 0]
        b_dec = self.b_dec.double() / scale
        self.b_dec.copy_(b_dec if read.shift is None else b_dec + read.shift)
        threshold = self.cfg.residual_threshold / scale.item()
        self.cfg = dataclasses.replace(self.cfg, residual_threshold=threshold)


class Stop(NamedTuple):
    """When a row is done, beside choosing a latent that adds nothing."""

    iterations: int
    threshold: float
    on_duplicate: bool


class _Pursuit(torch.autograd.Function):
    """Rows x [rows, d] -> what every iteration adds, as entries (value, row, latent), and what is left [rows, d].

    Only the values have a gradient. With r' and d' the gradients of r and d_i, backwards through the iterations:

        g = (w' − ⟨r', d_i⟩)·1[w > 0]        d_i' ← d_i' + g r − w r'        r' ← r' + g d_i

    where r, the residual before the iteration, is rebuilt as (residual after it) + w d_i, so that no iteration is kept
    in memory, and the gradient of W_dec is one matrix, not one for each iteration.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, W_dec: Tensor, stop: Stop) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        left, active = x.clone(), torch.arange(len(x), device=x.device)
        support = torch.zeros(len(x) if stop.on_duplicate else 0, len(W_dec), dtype=torch.bool, device=x.device)
        steps: list[tuple[Tensor, Tensor, Tensor]] = []
        while len(active) and len(steps) < stop.iterations:
            r = left[active]
            latent = (r.to(W_dec.dtype) @ W_dec.T).argmax(dim=1)
            directions = W_dec[latent].to(r.dtype)
            w = torch.relu((r * directions).sum(dim=1))
            r = r - w[:, None] * directions
            left[active] = r
            steps.append((w, active, latent))
            goes_on = (w > 0) & (torch.linalg.vector_norm(r, dim=1) >= stop.threshold)
            if stop.on_duplicate:
                goes_on &= ~support[active, latent]
                support[active, latent] = True
            active = active[goes_on]
        parts = zip(*steps, strict=True) if steps else ((x.new_zeros(0),), (active,), (active,))
        values, row, latent = (torch.cat(part) for part in parts)
        ctx.save_for_backward(W_dec, left, values, row, latent)
        ctx.sizes = [len(w) for w, _, _ in steps]
        ctx.mark_non_differentiable(row, latent, left)
        return values, row, latent, left

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        W_dec, left, *entries = ctx.saved_tensors
        left, to_x = left.clone(), torch.zeros_like(left)
        to_W = torch.zeros_like(W_dec, dtype=left.dtype) if ctx.needs_input_grad[1] else None
        steps = zip(*(part.split(ctx.sizes) for part in (*entries, grads[0])), strict=True)
        for w, row, latent, to_w in reversed(list(steps)):
            directions, to_r = W_dec[latent].to(left.dtype), to_x[row]
            before = left[row] + w[:, None] * directions
            g = (to_w - (to_r * directions).sum(dim=1)) * (w > 0)
            if to_W is not None:
                _add_rows(to_W, latent, g[:, None] * before - w[:, None] * to_r)
            left[row], to_x[row] = before, to_r + g[:, None] * directions
        return to_x, None if to_W is None else to_W.to(W_dec.dtype), None


def _add_rows(total: Float[Tensor, "n d"], index: Int[Tensor, " rows"], rows: Float[Tensor, "rows d"]) -> None:
    """total[index] += rows, in an order that is always the same: on CUDA that of `index_put`, elsewhere `index_add`."""
    if total.is_cuda:
        total.index_put_((index,), rows, accumulate=True)
    else:
        total.index_add_(0, index, rows)


def collected(
    values: Float[Tensor, " entries"],
    row: Int[Tensor, " entries"],
    latent: Int[Tensor, " entries"],
    n_rows: int,
    d_sae: int,
) -> SparseCodes:
    """Entries in any order as codes; what a row gave to one latent in several of them is added up."""
    key, order = (row * d_sae + latent).sort(stable=True)
    key, counts = key.unique_consecutive(return_counts=True)
    sums = torch.segment_reduce(values[order], "sum", lengths=counts, unsafe=True)
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=key.device)
    torch.cumsum(torch.bincount(key // d_sae, minlength=n_rows), 0, out=offsets[1:])
    return SparseCodes(sums, key % d_sae, d_sae, (n_rows,), offsets)
