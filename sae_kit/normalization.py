"""Normalisation of activations as state of the SAE: statistics are buffers, `encode` and `decode` apply them.

Losses live in the normalised ("training") space; users and models only ever see raw activations. With several sites
each has statistics of its own.

| mode | x of raw u | statistics |
|---|---|---|
| none | u | |
| expected_average_only_in | s·u, s = √d / E‖u‖ (or √d / √E‖u‖²) | scale |
| center_and_scale | s·(u − m), s = √d / E‖u − m‖ | mean, scale |
| covariance_whitening | (u − m) M, cov(u) = E diag(λ) Eᵀ, M = E diag(λ + ε)^(−½) (2511.13981) | mean, matrix, inverse |
| constant_scalar_rescale | f·u with a given f | scale |
| constant_norm_rescale | u·√d / ‖u‖ | of each row |
| layer_norm | (u − μ) / (σ + 1e-5), σ unbiased; undone as ŷσ + μ, the convention of published weights | of each row |
"""

import math
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit.errors import ConfigError, DataError, MissingContextError

NormalizationMode = Literal[
    "none",
    "expected_average_only_in",
    "center_and_scale",
    "covariance_whitening",
    "constant_scalar_rescale",
    "constant_norm_rescale",
    "layer_norm",
]
NormStatistic = Literal["mean", "rms"]
ESTIMATED = frozenset({"expected_average_only_in", "center_and_scale", "covariance_whitening"})
"""Modes whose statistics come from the first rows that training sees; a file that holds them is not folded yet."""
PER_ROW = frozenset({"constant_norm_rescale", "layer_norm"})
"""Modes that need the row itself to be undone, and cannot be folded."""
LAYER_NORM_EPS, SMALLEST_ROW = 1e-5, 1e-6
WHITENING_EPS = 1e-3  # of the mean eigenvalue
WHITENING_ROWS = 10  # for each feature


class Affine(NamedTuple):
    """x = (u − shift) matrix and u = x inverse + shift, site by site; None is zero, or the identity."""

    matrix: Float[Tensor, "*sites d d"]
    inverse: Float[Tensor, "*sites d d"]
    shift: Float[Tensor, "*sites d"] | None


class Normalized(NamedTuple):
    """Rows in training space; per-row modes undo it as x·scale + shift."""

    x: Float[Tensor, "..."]
    scale: Float[Tensor, "..."] | None
    shift: Float[Tensor, "..."] | None


class Normalization(nn.Module):
    """Between raw activations [..., *shape] and training space."""

    scale: Float[Tensor, "..."]
    mean: Float[Tensor, "..."]
    matrix: Float[Tensor, "..."]
    inverse: Float[Tensor, "..."]
    rows: Int[Tensor, ""]

    def __init__(
        self,
        mode: NormalizationMode,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        statistic: NormStatistic = "mean",
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.factor = factor
        """of constant_scalar_rescale, which takes it from the config"""
        self.mode: NormalizationMode = mode
        self.shape = shape
        self._statistic: NormStatistic = statistic
        sites, width = shape[:-1], shape[-1]
        if mode in ("expected_average_only_in", "center_and_scale"):
            self.register_buffer("scale", torch.ones(sites, dtype=dtype))
        if mode in ("center_and_scale", "covariance_whitening"):
            self.register_buffer("mean", torch.zeros(shape, dtype=dtype))
        if mode == "covariance_whitening":
            eye = torch.eye(width, dtype=dtype).expand(*sites, width, width)
            self.register_buffer("matrix", eye.clone())
            self.register_buffer("inverse", eye.clone())
        if mode in ESTIMATED:
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Raw activations to training space."""
        return self.normalize(u).x

    def normalize(self, u: Float[Tensor, "..."]) -> Normalized:
        """Raw activations to training space, with what per-row modes need to come back."""
        if self.mode == "none":
            return Normalized(u, None, None)
        if self.mode in PER_ROW:
            wide = u if u.dtype.itemsize >= 4 else u.float()
            if self.mode == "layer_norm":
                shift, scale = wide.mean(dim=-1, keepdim=True), wide.std(dim=-1, keepdim=True)
                return Normalized(((wide - shift) / (scale + LAYER_NORM_EPS)).to(u.dtype), scale, shift)
            norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=SMALLEST_ROW)
            scale = norm / math.sqrt(self.shape[-1])
            return Normalized((wide / scale).to(u.dtype), scale, None)
        if self.mode == "constant_scalar_rescale":
            return Normalized(u * self.factor, None, None)
        wide = self._wide(u)  # statistics are rounded with the result, not before it
        if self.mode == "covariance_whitening":
            return Normalized(_times(wide - self.mean, self.matrix).to(u.dtype), None, None)
        if self.mode == "center_and_scale":
            wide = wide - self.mean
        return Normalized((wide * self.scale[..., None]).to(u.dtype), None, None)

    def undo(
        self, x: Float[Tensor, "..."], scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Float[Tensor, "..."]:
        """Training space to raw activations; `scale` and `shift` of the rows in the per-row modes.

        Raises:
            MissingContextError: a per-row mode without them.
        """
        if self.mode == "none":
            return x
        if self.mode in PER_ROW:
            if scale is None:
                raise MissingContextError(
                    f"decoding needs the rows that were encoded, because {self.mode} scales each by itself: "
                    "decode(acts, context=sae.row_context(u))"
                )
            out = x * scale.to(x.dtype)
            return out if shift is None else out + shift.to(x.dtype)
        if self.mode == "constant_scalar_rescale":
            return x / self.factor
        wide = self._wide(x)
        if self.mode == "covariance_whitening":
            return (_times(wide, self.inverse) + self.mean).to(x.dtype)
        out = wide / self.scale[..., None]
        return (out + self.mean if self.mode == "center_and_scale" else out).to(x.dtype)

    def _wide(self, rows: Tensor) -> Tensor:
        statistic = self.matrix if self.mode == "covariance_whitening" else self.scale
        return rows.to(torch.promote_types(rows.dtype, statistic.dtype))

    @property
    def needs_estimate(self) -> bool:
        """Whether the statistics are still those of no data at all."""
        return self.mode in ESTIMATED and self.rows.item() == 0

    @property
    def rows_wanted(self) -> int:
        """Fewest rows for an estimate."""
        return WHITENING_ROWS * self.shape[-1] if self.mode == "covariance_whitening" else 1

    def affine(self) -> Affine:
        """The map as matrices, in float64, for folding it into weights.

        Raises:
            ConfigError: a mode without statistics, which is no such map or does not move into weights.
        """
        if self.mode not in ESTIMATED:
            raise ConfigError(f"{self.mode} has no statistics and cannot be folded into weights")
        if self.mode == "covariance_whitening":
            return Affine(self.matrix.double(), self.inverse.double(), self.mean.double())
        scale = self.scale.double()
        eye = torch.eye(self.shape[-1], dtype=torch.float64, device=scale.device)
        shift = self.mean.double() if self.mode == "center_and_scale" else None
        return Affine(eye * scale[..., None, None], eye / scale[..., None, None], shift)

    @torch.no_grad()
    def estimate(self, rows: Float[Tensor, "rows ..."], chunk: int = 8_192) -> None:
        """Set the statistics from a sample of raw rows [rows, *shape]; sums run in float64.

        Raises:
            DataError: there are no rows, or too few of them for a covariance.
        """
        if self.mode not in ESTIMATED:
            return
        if len(rows) < self.rows_wanted:
            if len(rows) == 0:
                raise DataError("cannot estimate the scale of activations from an empty batch")
            raise DataError(
                f"covariance_whitening of {self.shape[-1]} features needs at least {self.rows_wanted:,} rows, found "
                f"{len(rows):,}: give a longer first sample (buffer.tokens, buffer.norm_estimate_tokens) or choose "
                "center_and_scale"
            )
        shift = torch.zeros(self.shape, dtype=torch.float64, device=rows.device)
        if self.mode != "expected_average_only_in":
            shift = sum((part.sum(0, dtype=torch.float64) for part in rows.split(chunk)), shift) / len(rows)
            self.mean.copy_(shift)
        if self.mode == "covariance_whitening":
            self._whiten(rows, shift, chunk)
        else:
            self.scale.copy_(math.sqrt(self.shape[-1]) / self._mean_norm(rows, shift, chunk).clamp(min=1e-12))
        self.rows.fill_(len(rows))

    def _mean_norm(self, rows: Tensor, shift: Tensor, chunk: int) -> Float[Tensor, "..."]:
        total = torch.zeros(self.shape[:-1], dtype=torch.float64, device=rows.device)
        power = 2 if self._statistic == "rms" else 1
        for part in rows.split(chunk):
            total += torch.linalg.vector_norm(part - shift, dim=-1, dtype=torch.float64).pow(power).sum(0)
        return (total / len(rows)) ** (1 / power)

    def _whiten(self, rows: Tensor, shift: Tensor, chunk: int) -> None:
        width = self.shape[-1]
        covariance = torch.zeros(*self.shape, width, dtype=torch.float64, device=rows.device)
        for part in rows.split(chunk):
            centred = part.double() - shift
            covariance += torch.einsum("n...d,n...e->...de", centred, centred)
        covariance /= len(rows)
        values, vectors = torch.linalg.eigh(covariance)
        trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
        floor = (WHITENING_EPS * trace / width).clamp(min=1e-24)[..., None]
        root = (values.clamp(min=0) + floor).sqrt()
        self.matrix.copy_(vectors / root[..., None, :])
        self.inverse.copy_(root[..., :, None] * vectors.mT)


def _times(rows: Float[Tensor, "..."], matrix: Float[Tensor, "*sites d e"]) -> Float[Tensor, "..."]:
    """Every row times the matrix of its site."""
    return rows @ matrix if matrix.ndim == 2 else torch.einsum("...pd,pde->...pe", rows, matrix)
