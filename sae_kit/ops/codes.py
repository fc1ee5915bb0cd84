"""`SparseCodes`: the few latents that are on in each row, and the operations that read nothing else."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


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

    @classmethod
    def from_dense(cls, acts: Float[Tensor, "... d_sae"]) -> "SparseCodes":
        """The non-zero entries of `acts`; values keep their gradient."""
        rows = acts.reshape(-1, acts.shape[-1])
        row, index = rows.nonzero(as_tuple=True)
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=acts.device)
        torch.cumsum(torch.bincount(row, minlength=len(rows)), 0, out=offsets[1:])
        return cls(rows[row, index], index, acts.shape[-1], tuple(acts.shape[:-1]), offsets)

    def to_dense(self) -> Float[Tensor, "... d_sae"]:
        """Dense codes of shape [*leading, d_sae], or [*leading, *latent_shape]; differentiable in the values."""
        rows = self.values.new_zeros(self.n_rows, self.d_sae)
        if self.row_offsets is None:
            dense = rows.scatter_add(1, self.indices, self.values)
        else:
            dense = rows.index_put((self._row_of_entry(), self.indices), self.values, accumulate=True)
        return dense.reshape(*self.leading, *(self.latent_shape or (self.d_sae,)))

    def decode(self, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "... d_out"]:
        """Sum over a row's entries of value · decoder row, without a dense code: [*leading, d_out]."""
        flat = F.embedding_bag(
            self.indices,
            W_dec,
            self.row_offsets,
            mode="sum",
            per_sample_weights=self.values.to(W_dec.dtype),
            include_last_offset=self.row_offsets is not None,
        )
        return flat.reshape(*self.leading, W_dec.shape[1])

    def between(self, first: int, last: int) -> "SparseCodes":
        """The codes of latents `first` to `last - 1` alone, numbered from 0; the entries of all others have value 0.

        As many entries as before: to leave any out the host would have to know how many.
        """
        inside = (self.indices >= first) & (self.indices < last)
        values, indices = torch.where(inside, self.values, 0.0), torch.where(inside, self.indices - first, 0)
        return dataclasses.replace(self, values=values, indices=indices, d_sae=last - first)

    def scale(self, factor: Float[Tensor, " d_sae"]) -> "SparseCodes":
        """Every value times the factor of its latent."""
        return self._with(self.values * factor[self.indices].to(self.values.dtype))

    def detach(self) -> "SparseCodes":
        """The same codes outside the graph."""
        return self._with(self.values.detach())

    def firing_counts(self) -> Int[Tensor, " d_sae"]:
        """In how many rows each latent is non-zero."""
        fired = (self.values != 0).reshape(-1).to(torch.int64)
        counts = torch.zeros(self.d_sae, dtype=torch.int64, device=fired.device)
        return counts.index_add_(0, self.indices.reshape(-1), fired)

    def l0(self) -> Int[Tensor, " rows"]:
        """Number of non-zero entries of each row."""
        active = (self.values != 0).to(torch.int64)
        if self.row_offsets is None:
            return active.sum(dim=1)
        return torch.zeros(self.n_rows, dtype=torch.int64, device=active.device).index_add_(
            0, self._row_of_entry(), active
        )

    @property
    def n_rows(self) -> int:
        return len(self.values) if self.row_offsets is None else len(self.row_offsets) - 1

    def _with(self, values: Float[Tensor, "*entries"]) -> "SparseCodes":
        return dataclasses.replace(self, values=values)

    def _row_of_entry(self) -> Int[Tensor, " entries"]:
        assert self.row_offsets is not None
        rows = torch.arange(self.n_rows, device=self.indices.device)
        return rows.repeat_interleave(self.row_offsets.diff(), output_size=len(self.indices))


Codes = SparseCodes | Float[Tensor, "... d_sae"]
"""Codes in the form in which an architecture makes them."""


def to_dense(codes: Codes) -> Float[Tensor, "... d_sae"]:
    return codes.to_dense() if isinstance(codes, SparseCodes) else codes


def decode(codes: Codes, W_dec: Float[Tensor, "d_sae d_out"]) -> Float[Tensor, "... d_out"]:
    """codes · W_dec, by gathering rows where codes are sparse and by a matrix product where they are dense."""
    return codes.decode(W_dec) if isinstance(codes, SparseCodes) else codes @ W_dec


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
