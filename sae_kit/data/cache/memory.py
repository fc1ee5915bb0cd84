"""Tensors over memory that others own, such as mapped files, and many of them seen as one.

All shards of a cache lie in one address space. So a row of any of them is some multiple of a step away from the lowest
one, and a tensor with that step as its stride, whose rows overlap, has every row of every shard among its own: a batch
is one call, whichever shards its rows are in, and comes out in the order that was asked for.
"""

import ctypes
import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

SPARE = 4
"""pieces of memory that wait to be used again: what a thread that reads ahead has in hand, and the batch trained on"""
TABLE_BITS = 14
"""the table of `Places` stays in the first cache of a processor, nearly"""


def tensor_at(address: int, size: int, dtype: torch.dtype, owner: object) -> Shaped[Tensor, " numbers"]:
    """`size` bytes at an address, for reading; `owner` lives as long as the tensor."""
    memory = (ctypes.c_byte * size).from_address(address)
    memory.owner = owner  # pyright: ignore[reportAttributeAccessIssue]
    return torch.frombuffer(memory, dtype=dtype)


class Column:
    """Tensors anywhere in memory, [rows, width] each: row r of tensor s is row `first[s] + r * step` of all."""

    def __init__(self, parts: Sequence[Shaped[Tensor, "_ width"]]) -> None:
        width, dtype = parts[0].shape[1], parts[0].dtype
        row = width * dtype.itemsize
        lowest = min(part.data_ptr() for part in parts)
        span = max(part.data_ptr() + part.nbytes for part in parts) - lowest
        unit = math.gcd(row, *(part.data_ptr() - lowest for part in parts))
        memory = tensor_at(lowest, span, dtype, parts)
        self._all = memory.as_strided(((span - row) // unit + 1, width), (unit // dtype.itemsize, 1))
        self._first = np.array([(part.data_ptr() - lowest) // unit for part in parts])
        self._step = row // unit

    def gather(
        self, shards: Int[np.ndarray, " rows"], places: Int[np.ndarray, " rows"], out: Tensor | None = None
    ) -> Shaped[Tensor, "rows width"]:
        """Row `places[i]` of tensor `shards[i]`, for each i, in `out` or in new memory."""
        numbers = places * self._step
        numbers += self._first[shards]
        return torch.index_select(self._all, 0, torch.from_numpy(numbers), out=out)

    @property
    def dtype(self) -> torch.dtype:
        return self._all.dtype


class Places:
    """Numbers of rows, counted over tensors of these lengths -> which tensor, and which of its rows.

    Numbers in random order are what binary search is worst at: it takes as long as to read the rows. A table of the
    tensor in which each run of `2 ** shift` numbers begins is right at once for nearly all.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._starts = np.cumsum([0, *lengths])
        self._shift = max(0, int(self._starts[-1]).bit_length() - TABLE_BITS)
        runs = np.arange((int(self._starts[-1]) >> self._shift) + 1) << self._shift
        self._table = np.searchsorted(self._starts[1:], runs, side="right")

    def __call__(self, numbers: Int[np.ndarray, " rows"]) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
        found = self._table[numbers >> self._shift]
        while (later := numbers >= self._starts[found + 1]).any():
            found += later
        return found, numbers - self._starts[found]


class Recycled:
    """Memory for tensors of one shape, used again when no tensor lies in it any more.

    New memory beyond 32 MB comes from the system page by page, which takes several times as long as to fill it.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        self._blocks: list[np.ndarray] = []

    def tensor(self) -> Shaped[Tensor, "rows width"]:
        """A tensor of anything; whoever holds it or a part of it, such as a graph of autograd, keeps it as it is."""
        # A tensor over a numpy array holds a reference to it for as long as its storage lives. What else counts one:
        # the list, and the argument of the call that counts.
        free = [i for i in range(len(self._blocks)) if sys.getrefcount(self._blocks[i]) == 2]
        for index in reversed(free[SPARE:]):  # many batches were held for a while
            del self._blocks[index]
        if not free:
            size = self._shape[0] * self._shape[1] * self._dtype.itemsize
            self._blocks.append(np.empty(size, dtype=np.uint8))
        block = self._blocks[free[0] if free else -1]
        return torch.from_numpy(block).view(self._dtype).view(self._shape)
