"""In which order the rows of a cache are read: pure functions of seed, epoch and position, so that these are the state.

`Shuffled` is a permutation of all rows that is computed and not stored: a Feistel network, which is a bijection
whatever its round function is, over the smallest power of two that holds all rows, walked on until it meets one. Ten
rows or a trillion take the same memory. `Blocks` reads consecutive rows of a few shards in turn, for disks on which
single rows are dear; a buffer has to mix them.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int, UInt

from sae_kit.seeding import generator

ROUNDS = 8
AHEAD = 65_536
"""row numbers computed at a time: calls on arrays this long cost a third of those on one batch"""
BLOCK = 4_096
"""consecutive rows that `Blocks` takes from a shard before it turns to the next"""
NONE = np.empty(0, dtype=np.int64)


class Order(Protocol):
    """Where the rows of each epoch stand."""

    def numbers(self, epoch: int, start: int, stop: int) -> Int[np.ndarray, " rows"]:
        """Numbers, in the order of the text, of the rows at positions `start` to `stop` of an epoch."""
        ...


class Permutation:
    """A random bijection of 0 ... size-1, as a function of arrays."""

    def __init__(self, size: int, seed: int, index: int = 0) -> None:
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low = bits // 2
        self._dtype: type[np.unsignedinteger] = np.uint32 if bits <= 32 else np.uint64
        self._drop = self._dtype(13 if bits <= 32 else 29)  # low bits of a product are the worst mixed
        keys = torch.randint(2**31, (ROUNDS, 2), generator=generator(seed, "cache", index=index))
        self._keys = [(self._dtype(add), self._dtype(int(times) | 1)) for add, times in keys.tolist()]
        self._masks = (self._dtype(2 ** (bits - self._low) - 1), self._dtype(2**self._low - 1))

    def __call__(self, positions: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
        """Where each position goes; positions below `size`."""
        found = self._once(positions.astype(self._dtype))
        while len(outside := np.flatnonzero(found >= self.size)):
            found[outside] = self._once(found[outside])
        return found.astype(np.int64)

    def _once(self, numbers: UInt[np.ndarray, " rows"]) -> UInt[np.ndarray, " rows"]:
        shift = self._dtype(self._low)
        halves = [numbers >> shift, numbers & self._masks[1]]
        for turn, (add, times) in enumerate(self._keys):
            mixed = halves[1 - turn % 2] + add
            mixed *= self._dtype(0x9E3779B1)
            mixed ^= mixed >> self._drop
            mixed *= times
            mixed >>= self._drop
            mixed &= self._masks[turn % 2]
            halves[turn % 2] ^= mixed
        halves[0] <<= shift
        halves[0] |= halves[1]
        return halves[0]


class Shuffled:
    """All rows in one random order, another one in each epoch."""

    def __init__(self, rows: int, seed: int) -> None:
        self._rows, self._seed = rows, seed
        self._known: tuple[int, int, Int[np.ndarray, " rows"]] = (-1, 0, NONE)

    def numbers(self, epoch: int, start: int, stop: int) -> Int[np.ndarray, " rows"]:
        parts = [NONE]
        while start < stop:
            first = start // AHEAD * AHEAD
            if self._known[:2] != (epoch, first):
                positions = np.arange(first, min(first + AHEAD, self._rows))
                self._known = (epoch, first, Permutation(self._rows, self._seed, epoch)(positions))
            parts.append(self._known[2][start - first : stop - first])
            start += len(parts[-1])
        return np.concatenate(parts)


class Blocks:
    """Shards in random order, `open_shards` of them a block at a time in turn; another order in each epoch."""

    def __init__(self, rows: Sequence[int], open_shards: int, seed: int) -> None:
        self._rows, self._open, self._seed = rows, open_shards, seed
        self._first_of = np.cumsum([0, *rows])
        self._epoch = -1
        self._starts = self._ends = NONE

    def numbers(self, epoch: int, start: int, stop: int) -> Int[np.ndarray, " rows"]:
        if epoch != self._epoch:
            self._starts, self._ends, self._epoch = *self._plan(epoch), epoch
        parts = [NONE]
        block = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self._ends[block]))
            # Counted from its end: the block's last row is the last before `_ends`.
            shift = int(self._starts[block]) - (int(self._ends[block - 1]) if block else 0)
            parts.append(np.arange(start + shift, end + shift))
            start, block = end, block + 1
        return np.concatenate(parts)

    def _plan(self, epoch: int) -> tuple[Int[np.ndarray, " blocks"], Int[np.ndarray, " blocks"]]:
        """First row of each block, and how many rows there are up to its end."""
        waiting = Permutation(len(self._rows), self._seed, epoch)(np.arange(len(self._rows))).tolist()[::-1]
        starts: list[int] = []
        sizes: list[int] = []
        opened: list[list[int]] = []
        while waiting or opened:
            while waiting and len(opened) < self._open:
                shard = waiting.pop()
                opened.append([int(self._first_of[shard]), int(self._first_of[shard + 1])])
            for rest in opened:
                starts.append(rest[0])
                sizes.append(min(BLOCK, rest[1] - rest[0]))
                rest[0] += sizes[-1]
            opened = [rest for rest in opened if rest[0] < rest[1]]
        return np.array(starts, dtype=np.int64), np.cumsum(sizes)
