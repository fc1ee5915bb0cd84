"""`SparseCodes`: the few latents that are on in each row, and the operations that read nothing else.

What is written for `Codes` works on both forms, a tensor [rows, latents] and the entries of `SparseCodes`: an
architecture says once what it does with pre-activations, whatever form they come in.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.ops import sums
from sae_kit.ops.layout import Layout


@dataclass(frozen=True)
class SparseCodes:
    """Values and latent indices of the entries of each row; rows of any leading shape are flattened.

    With `row_offsets=None` every row has the same number of entries and `values` is [rows, k]. Otherwise `values` is
    [entries], and row r owns the entries from `row_offsets[r]` to `row_offsets[r + 1]`. An entry of value 0 is allowed
    and is inactive; a latent is active at most once in a row.
    """

    values: Float[Tensor, "*entries"]
    indices: Int[Tensor, "*entries"]
    d_sae: int
    leading: tuple[int, ...]
    """shape in front of the latent axis: the product is the number of rows"""
    row_offsets: Int[Tensor, " rows_plus_1"] | None = None
    latent_shape: tuple[int, ...] | None = None
    """shape of the latent axis where it is more than one: (layers, d_sae) of a cross-layer transcoder"""
    context: Any = None
    """what decoding needs beside the codes, of an SAE that has something: see `sae_kit.sae.RowContext`"""
    layout: Layout = field(default=None, repr=False, compare=False)  # pyright: ignore[reportAssignmentType]
    """where the entries are, shared by codes that differ in their values alone; made here if it is left out"""

    def __post_init__(self) -> None:
        if self.layout is None:  # pyright: ignore[reportUnnecessaryComparison]
            offsets = self.row_offsets
            if offsets is None:
                rows, k = self.values.shape
                offsets = torch.arange(rows + 1, device=self.values.device) * k
            object.__setattr__(self, "layout", Layout(self.indices.reshape(-1), offsets, self.d_sae))

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "... d_sae"]) -> "SparseCodes":
        """The non-zero entries of `acts`; values keep their gradient."""
        rows = acts.reshape(-1, acts.shape[-1])
        row, index = rows.nonzero(as_tuple=True)
        bounds = torch.arange(len(rows) + 1, device=acts.device)
        offsets = torch.searchsorted(row, bounds)
        return cls(rows[row, index], index, acts.shape[-1], tuple(acts.shape[:-1]), offsets)

    @classmethod
    def from_keys(
        cls, keys: Int[Tensor, " entries"], values: Float[Tensor, " entries"], n_rows: int, d_sae: int
    ) -> "SparseCodes":
        """Codes [n_rows, d_sae] of entries in the order of their keys, row · d_sae + latent."""
        offsets = torch.searchsorted(keys, torch.arange(n_rows + 1, device=keys.device) * d_sae)
        return cls(values, keys % d_sae, d_sae, (n_rows,), offsets)

    def to_dense(self) -> Float[Tensor, "... d_sae"]:
        """Dense codes of shape [*leading, d_sae], or [*leading, *latent_shape]; differentiable in the values."""
        rows = self.values.new_zeros(self.n_rows, self.d_sae)
        if self.row_offsets is None:
            dense = rows.scatter_add(1, self.indices, self.values)
        else:
            dense = rows.index_put((self.layout.bag, self.indices), self.values, accumulate=True)
        return dense.reshape(*self.leading, *(self.latent_shape or (self.d_sae,)))

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "... d_out"]:
        """Sum over a row's entries of value · decoder row, without a dense code: [*leading, d_out]."""
        flat = sums.decode(self.values.reshape(-1).to(W_dec.dtype), W_dec, self.layout)
        return flat.reshape(*self.leading, W_dec.shape[1])

    def between(self, first: int, last: int) -> "SparseCodes":
        """The codes of latents `first` to `last - 1` alone, numbered from 0; the entries of all others have value 0.

        As many entries as before: to leave any out the host would have to know how many.
        """
        inside = (self.indices >= first) & (self.indices < last)
        # The others are spread over all latents: none should have to wait for the many entries of one.
        indices = (self.indices - first) % (last - first)
        values = torch.where(inside, self.values, 0.0)
        return SparseCodes(values, indices, last - first, self.leading, self.row_offsets)

    def at_levels(self, widths: tuple[int, ...]) -> "SparseCodes":
        """The same entries with a row for each level: [*leading, levels], level g having the latents up to widths[g]
        that the level before has not. The entries of a row must be ragged and in the order of their latents."""
        assert self.row_offsets is not None
        assert widths[-1] == self.d_sae
        rows = torch.arange(self.n_rows, device=self.indices.device) * self.d_sae
        # Numbers of the host go into kernels as they are; as a tensor they would have to wait for the device.
        starts = torch.stack([rows + start for start in (0, *widths[:-1])], dim=1).reshape(-1)
        bounds = torch.cat([starts, rows.new_full((1,), self.n_rows * self.d_sae)])
        offsets = torch.searchsorted(self.layout.bag * self.d_sae + self.indices, bounds)
        return SparseCodes(self.values, self.indices, self.d_sae, (*self.leading, len(widths)), offsets)

    def scale(self, factor: Float[Tensor, " d_sae"]) -> "SparseCodes":
        """Every value times the factor of its latent."""
        return self.with_values(self.values * factor[self.indices].to(self.values.dtype))

    def detach(self) -> "SparseCodes":
        """The same codes outside the graph."""
        return self.with_values(self.values.detach())

    def with_values(self, values: Float[Tensor, "*entries"]) -> "SparseCodes":
        """Other values for the same entries."""
        return dataclasses.replace(self, values=values)

    def taken_from(self, dense: Float[Tensor, "rows d_sae"]) -> "SparseCodes":
        """The same entries with the values of a tensor, in its graph."""
        fixed = self.row_offsets is None
        return self.with_values(dense.gather(1, self.indices) if fixed else dense[self.layout.bag, self.indices])

    def firing_counts(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent is non-zero."""
        fired = (self.values != 0).reshape(-1).to(torch.int64)
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=fired.device)
        return counts.index_add_(0, self.layout.indices, fired)

    def l0(self) -> Int[Tensor, " rows"]:
        """Number of non-zero entries of each row."""
        return self._row_sums((self.values != 0).to(torch.int64))

    def row_sums(self) -> Float[Tensor, " rows"]:
        """Σ of the values of each row."""
        return self._row_sums(self.values)

    def _row_sums(self, numbers: Tensor) -> Tensor:
        if self.row_offsets is None:
            return numbers.sum(dim=1)
        # index_put and not index_add: on CUDA the order of the latter's sums varies.
        return numbers.new_zeros(self.n_rows).index_put((self.layout.bag,), numbers, accumulate=True)

    def latent_sums(self) -> Float[Tensor, " d_sae"]:
        """Σ of the values of each latent."""
        values = self.values.reshape(-1)
        return values.new_zeros(self.d_sae).index_put((self.layout.indices,), values, accumulate=True)

    @property
    def n_rows(self) -> int:
        return len(self.values) if self.row_offsets is None else len(self.row_offsets) - 1


Codes = SparseCodes | Float[Tensor, "... d_sae"]
"""Codes in the form in which an architecture makes them."""


def to_dense(codes: Codes) -> Float[Tensor, "... d_sae"]:
    return codes.to_dense() if isinstance(codes, SparseCodes) else codes


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "... d_out"]:
    """codes · W_dec, by gathering rows where codes are sparse and by a matrix product where they are dense."""
    return codes.decode(W_dec) if isinstance(codes, SparseCodes) else codes @ W_dec


def values_of(codes: Codes) -> Float[Tensor, "*entries"]:
    """The numbers themselves: of all latents in dense codes, of the entries in sparse ones."""
    return codes.values if isinstance(codes, SparseCodes) else codes


def with_values(codes: Codes, values: Float[Tensor, "*entries"]) -> Codes:
    """Codes of the same form with other numbers, those of `values_of`."""
    return codes.with_values(values) if isinstance(codes, SparseCodes) else values


def of_latents(per_latent: Float[Tensor, " d_sae"], codes: Codes) -> Float[Tensor, "..."]:
    """A number for each latent, in a shape that goes with `values_of(codes)`."""
    return per_latent[codes.indices] if isinstance(codes, SparseCodes) else per_latent


def scale(codes: Codes, factor: Float[Tensor, " d_sae"]) -> Codes:
    """Every value times the factor of its latent."""
    return with_values(codes, values_of(codes) * of_latents(factor, codes))


def row_sums(codes: Codes) -> Float[Tensor, " rows"]:
    """Σ over the latents of each row."""
    return codes.row_sums() if isinstance(codes, SparseCodes) else codes.reshape(-1, codes.shape[-1]).sum(dim=1)


def latent_means(codes: Codes) -> Float[Tensor, " d_sae"]:
    """Mean over the rows of each latent."""
    if isinstance(codes, SparseCodes):
        return codes.latent_sums() / codes.n_rows
    return codes.reshape(-1, codes.shape[-1]).mean(dim=0)


def firing_counts(codes: Codes) -> Int[Tensor, " d_sae"]:
    """In how many rows each latent is non-zero."""
    return (
        codes.firing_counts()
        if isinstance(codes, SparseCodes)
        else (codes != 0).reshape(-1, codes.shape[-1]).sum(dim=0)
    )


def l0(codes: Codes) -> Int[Tensor, " rows"]:
    """Number of non-zero latents of each row."""
    return codes.l0() if isinstance(codes, SparseCodes) else (codes != 0).reshape(-1, codes.shape[-1]).sum(dim=1)


def widen(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """float32 where the tensor is narrower: losses and norms are never summed in half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
