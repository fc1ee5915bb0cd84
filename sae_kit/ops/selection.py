"""The largest of very many numbers, and those above a bound."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BLOCK = 64
"""numbers whose maximum is looked at before any of them"""


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
    """The largest of numbers that come in parts, each with a value and a key that go with it."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._bound: Float[Tensor, ""] | None = None

    @property
    def values(self) -> Float[Tensor, " found"]:
        assert self._kept is not None
        return self._kept[1]

    @property
    def keys(self) -> Int[Tensor, " found"]:
        assert self._kept is not None
        return self._kept[2]

    def add(self, numbers: Tensor, values: Tensor, first_key: int, row_stride: int) -> None:
        """A part [rows, width] of numbers and of values; entry (r, j) has the key first_key + r · row_stride + j."""
        flat, width = numbers.reshape(-1), numbers.shape[1]
        found = largest(flat, self.wanted, self._bound)
        keys = first_key + found // width * row_stride + found % width
        new = (flat[found], values.reshape(-1)[found], keys)
        if self._kept is not None:
            new = tuple(torch.cat(pair) for pair in zip(self._kept, new, strict=True))
            if len(new[0]) > self.wanted:
                best = new[0].topk(self.wanted, sorted=False).indices
                new = tuple(each[best] for each in new)
        numbers, values, keys = new
        self._kept = (numbers, values, keys)
        if len(numbers) == self.wanted:
            self._bound = numbers.min()
