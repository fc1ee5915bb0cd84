"""The largest of very many numbers, and those above a bound."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.ops.codes import widen

BLOCK = 64
"""numbers whose maximum is looked at before any of them"""
MAXIMA = 4
"""maxima that are looked at in each row for each number that is wanted"""


def largest(
    numbers: Float[Tensor, " n"], wanted: int, at_least: Float[Tensor, ""] | None = None
) -> Int[Tensor, " found"]:
    """Positions of the `wanted` largest numbers, in any order: exact, ties broken arbitrarily.

    `at_least`, if given, says that smaller numbers are of no interest: there may then be fewer. NaN is the largest.

    A sort of all would cost as much as the product that gave the numbers. The `wanted` largest maxima of blocks are so
    many numbers themselves, so the least of them is a lower bound of what is wanted, and only few pass it. On CUDA,
    where counting them would stall the host and selection is fast, all are compared.
    """
    wanted = min(wanted, len(numbers))
    if numbers.device.type != "cpu":
        return numbers.topk(wanted, sorted=False).indices
    blocks, rest = len(numbers) // BLOCK, len(numbers) % BLOCK
    if at_least is None and wanted > blocks:
        return numbers.topk(wanted, sorted=False).indices
    if at_least is None or wanted <= blocks:
        maxima = numbers[: len(numbers) - rest].view(blocks, BLOCK).amax(dim=1)
        bound = maxima.kthvalue(blocks - wanted + 1).values
        at_least = bound if at_least is None else torch.maximum(bound, at_least)
    # What is not a number passes: an SAE that has diverged must show it.
    found = (numbers < at_least).logical_not_().nonzero().squeeze(1)
    if len(found) > wanted:
        found = found[numbers[found].topk(wanted, sorted=False).indices]
    return found


class Largest:
    """The `wanted` largest of numbers that come in parts, each with a key that goes with it."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._kept: Kept | None = None

    def add(self, numbers: Float[Tensor, "rows width"], first_key: int, row_stride: int) -> None:
        """A part of which entry (r, j) has the key first_key + r · row_stride + j."""
        flat, width, kept = numbers.reshape(-1), numbers.shape[1], self._kept
        bound = kept.numbers.min() if kept is not None and len(kept.numbers) == self.wanted else None
        found = largest(flat, self.wanted, bound)
        new = _joined(kept, Kept(flat[found], first_key + found // width * row_stride + found % width))
        if len(new.numbers) > self.wanted:
            best = new.numbers.topk(self.wanted, sorted=False).indices
            new = Kept(*(each[best] for each in new))
        self._kept = new

    def result(self) -> "Kept":
        """The largest and their keys, in any order."""
        assert self._kept is not None
        return self._kept


class LargestOfRows:
    """The `k` numbers of each row that are largest in `by`, and their columns, of numbers in parts [rows, width].

    On a CPU only what can be among them is sorted: what is not below a bound of its row, the least that it has kept
    or, in the first part, the k-th largest maximum of blocks. On CUDA that would be a question to the device.
    """

    def __init__(self, k: int, by: Callable[[Tensor], Tensor] = torch.positive) -> None:
        self.k, self.by = k, by
        self._kept: Kept | None = None

    def add(self, numbers: Float[Tensor, "rows width"], first: int) -> None:
        """A part whose columns are numbered from `first`."""
        compared = self.by(numbers)
        bound = self._bound(compared)
        if bound is None:
            best = compared.topk(min(self.k, numbers.shape[1]), dim=1, sorted=False).indices
            new = Kept(numbers.gather(1, best), best + first)
        else:
            new = self._reaching(bound, compared, numbers, first)
        new = _joined(self._kept, new)
        if new.numbers.shape[1] > self.k:
            compared = self.by(new.numbers).masked_fill(new.keys < 0, -torch.inf)
            best = compared.topk(self.k, dim=1, sorted=False).indices
            new = Kept(*(each.gather(1, best) for each in new))
        self._kept = new

    def _bound(self, compared: Float[Tensor, "rows width"]) -> Float[Tensor, " rows"] | None:
        """What the numbers of each row have to reach; None where it is not worth finding out."""
        rows, width = compared.shape
        if not rows or compared.device.type != "cpu":
            return None
        if self._kept is not None and self._kept.numbers.shape[1] == self.k:
            return self.by(self._kept.numbers).amin(dim=1)
        blocks = MAXIMA * self.k
        if width < 2 * blocks:
            return None
        per_block = width // blocks
        # Block b has the columns b, b + blocks, …: neighbours are compared with neighbours.
        maxima = compared[:, : per_block * blocks].unflatten(1, (per_block, blocks)).amax(dim=1)
        partitioned = np.partition(widen(maxima).numpy(), blocks - self.k, axis=1)  # ten times as fast as kthvalue
        return torch.from_numpy(partitioned[:, blocks - self.k]).to(compared.dtype)

    @staticmethod
    def _reaching(bound: Float[Tensor, " rows"], compared: Tensor, numbers: Tensor, first: int) -> "Kept":
        """Those that reach the bound of their row; shorter rows are filled up with keys of -1."""
        rows, width = numbers.shape
        row, column = (compared < bound[:, None]).logical_not_().nonzero(as_tuple=True)  # NaN passes
        starts = torch.searchsorted(row, torch.arange(rows + 1))
        longest = int(starts.diff().max())
        place = row * longest + torch.arange(len(row)) - starts[row]
        new = Kept(numbers.new_zeros(rows, longest), torch.full((rows, longest), -1))
        new.numbers.view(-1)[place] = numbers.reshape(-1)[row * width + column]
        new.keys.view(-1)[place] = column + first
        return new

    def result(self) -> "Kept":
        """The largest of each row and their columns, in any order."""
        assert self._kept is not None
        return self._kept


class Kept(NamedTuple):
    """What has been kept so far."""

    numbers: Tensor
    keys: Tensor


def _joined(kept: Kept | None, new: Kept) -> Kept:
    return new if kept is None else Kept(*(torch.cat(pair, dim=-1) for pair in zip(kept, new, strict=True)))
