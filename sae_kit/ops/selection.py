"""The largest of very many numbers, and those above a bound."""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.ops.codes import widen

BLOCK = 64
"""numbers whose maximum is looked at before any of them"""
ROW_BLOCKS = (16, 8, 4)
"""lengths of such blocks within a row, the first that fits: powers of two"""


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
    if not wanted or (at_least is None and wanted > blocks):
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
        self._numbers: Tensor | None = None
        self._keys: Tensor | None = None

    def add(self, numbers: Float[Tensor, "rows width"], first_key: int, row_stride: int) -> None:
        """A part of which entry (r, j) has the key first_key + r · row_stride + j."""
        flat, width, kept = numbers.reshape(-1), numbers.shape[1], self._numbers
        bound = kept.min() if kept is not None and len(kept) == self.wanted else None
        found = largest(flat, self.wanted, bound)
        new, keys = flat[found], first_key + found // width * row_stride + found % width
        if kept is not None and self._keys is not None:
            new, keys = torch.cat([kept, new]), torch.cat([self._keys, keys])
        if len(new) > self.wanted:
            best = new.topk(self.wanted, sorted=False).indices
            new, keys = new[best], keys[best]
        self._numbers, self._keys = new, keys

    def result(self) -> tuple[Float[Tensor, " found"], Int[Tensor, " found"]]:
        """The largest and their keys, in any order."""
        assert self._numbers is not None
        assert self._keys is not None
        return self._numbers, self._keys


def largest_of_rows(numbers: Float[Tensor, "rows width"], k: int) -> Int[Tensor, "rows k"]:
    """Columns of the k largest of each row, in any order: exact, ties broken arbitrarily. NaN is the largest.

    On a CPU, where to partition all of a row takes as long as to compute it: the k largest lie in the k blocks with the
    largest maxima, which are found in the same way, as are the k largest in them.
    """
    rows, width = numbers.shape
    if numbers.device.type != "cpu" or torch.compiler.is_compiling():
        return numbers.topk(k, dim=1, sorted=False).indices
    sizes = (size for size in ROW_BLOCKS if width % size == 0 and width >= 4 * k * size)
    if not rows or (size := next(sizes, None)) is None:
        # Vectorised, as `topk` is not.
        partitioned = np.argpartition(widen(numbers.detach()).numpy(), width - k, axis=1)
        return torch.from_numpy(partitioned[:, width - k :])  # pyright: ignore[reportUnknownMemberType]
    maxima = F.max_pool1d(numbers.detach()[:, None], size)[:, 0]
    blocks = largest_of_rows(maxima, k)
    inside = blocks + torch.arange(rows)[:, None] * maxima.shape[1]
    candidates = numbers.reshape(-1, size).index_select(0, inside.view(-1)).view(rows, -1)
    best = largest_of_rows(candidates, k)
    # Sizes are powers of two: divisions of integers would be a tenth of the work.
    return blocks.gather(1, best >> (size.bit_length() - 1)) * size + (best & (size - 1))
