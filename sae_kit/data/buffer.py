"""The mixing buffer: neighbouring tokens go in, unrelated tokens come out.

Rows of one context are alike, so a batch of neighbours has a noisy mean. The buffer holds C rows; each batch is
drawn uniformly from them and its places are refilled in order. Two rows of one context then share a batch of B
with probability B / (2C - B) only, as if a window of almost twice the memory were shuffled. Each row is written
once, read once and never moved: only slot numbers are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.errors import ConfigError, ShapeError

Rows = Mapping[str, Float[Tensor, "rows _"]]
"""Site -> rows; row i of every site is the same token."""

BATCHES = 128
"""Capacity of a buffer that is sized by itself, in batches."""


@dataclass(frozen=True, kw_only=True)
class BufferConfig:
    """The buffer that mixes activations before they are trained on."""

    tokens: int | Literal["auto"] = "auto"
    """capacity in tokens; auto = 128 batches, but never more than the run needs"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of the stored activations; auto = the model's; bfloat16 takes half the memory of float32"""
    mix: Literal["stream", "none"] = "stream"
    """none: activations in the order of the text, for tests and debugging"""
    device: str = "auto"
    """where they are stored; auto = with the model, or in pinned host memory if it would take over 30% of a GPU"""
    drop_last: bool = True
    """leave out a last batch that is not full; otherwise it is trained on as it is"""
    norm_filter: float | None = 10.0
    """rows whose norm is above this multiple of the site's median are dropped (attention sinks); None = off"""
    norm_estimate_tokens: int = 1_000_000
    """activations, the first of the run, from which normalisation is estimated; at most as many as the buffer holds"""
    prefetch: int | Literal["auto"] = "auto"
    """batches made ready ahead by a thread of its own; 0 = none; auto = 2 if the model is on a GPU, else 0"""

    def __post_init__(self) -> None:
        if self.prefetch != "auto" and self.prefetch < 0:
            raise ConfigError(f"prefetch: expected 0 or more batches, found {self.prefetch}")
        if self.norm_filter is not None and not self.norm_filter > 1:
            raise ConfigError(f"norm_filter: expected a multiple above 1, or null for none, found {self.norm_filter}")
        for name in ("tokens", "norm_estimate_tokens"):
            value = getattr(self, name)
            if value != "auto" and value < 1:
                raise ConfigError(f"{name}: expected a positive number of tokens, found {value}")

    def capacity(self, batch_tokens: int, train_tokens: int | None = None) -> int:
        """Rows that the buffer of a run holds.

        Raises:
            ConfigError: a size given that is under two batches, or a run that is under one.
        """
        if self.tokens != "auto" and self.mix == "stream" and self.tokens < 2 * batch_tokens:
            raise ConfigError(
                f"buffer.tokens: expected at least two batches of {batch_tokens:,}, found {self.tokens:,}; "
                "a smaller buffer mixes nothing"
            )
        wanted = (
            batch_tokens if self.mix == "none" else BATCHES * batch_tokens if self.tokens == "auto" else self.tokens
        )
        if train_tokens is None:
            return wanted
        if train_tokens < batch_tokens:
            raise ConfigError(
                f"train.tokens: expected at least one batch of {batch_tokens:,} tokens, found {train_tokens:,}"
            )
        return min(wanted, train_tokens // batch_tokens * batch_tokens)


class MixingBuffer:
    """`capacity` rows per site in memory that is allocated once.

    `put` fills free slots; `take` draws occupied ones uniformly and frees them, so that every row leaves exactly
    once. `shuffle=False` takes rows in the order of arrival.
    """

    def __init__(
        self,
        capacity: int,
        widths: Mapping[str, int],
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype],
        generator: torch.Generator,
        device: torch.device | str = "cpu",
        pinned: bool = False,
        shuffle: bool = True,
    ) -> None:
        dtypes = dtype if isinstance(dtype, Mapping) else dict.fromkeys(widths, dtype)
        self.capacity = capacity
        self.count = 0
        """occupied slots"""
        self._pinned = pinned
        with torch.inference_mode(False):  # rows are written in that mode and out of it
            self._rows = {
                site: torch.empty(capacity, width, dtype=dtypes[site], device=device, pin_memory=pinned)
                for site, width in widths.items()
            }
        # The numbers of all slots, first the occupied ones, then the free ones. In numpy: the draw is the same on
        # every device and waits for none, and so small an operation is not worth torch's threads.
        self._slots = np.arange(capacity, dtype=np.int32)
        self._scratch = np.empty(capacity, dtype=np.int32)
        self._contexts = np.zeros(capacity, dtype=np.int32)
        self._generator = generator
        self._shuffle = shuffle
        self._untouched = True
        self._taken = self._alike = 0

    @property
    def free(self) -> int:
        """Slots that `put` may still fill."""
        return self.capacity - self.count

    @property
    def clumping(self) -> float:
        """How much rows of one context inflate the variance of a batch's mean: 1 when no two share a batch.

        The number of rows of the batch, itself included, that come from a row's context; its mean over all rows taken.
        """
        return self._alike / max(self._taken, 1)

    def put(self, rows: Rows, contexts: Int[np.ndarray, " rows"] | None = None) -> None:
        """Copy rows into free slots; `contexts` number the contexts that they come from, which `clumping` counts.

        Raises:
            ShapeError: more rows than `free`, other sites, or a site of another width or number of rows.
        """
        if rows.keys() != self._rows.keys():
            raise ShapeError(f"expected rows of {sorted(self._rows)}, found {sorted(rows)}")
        number = len(next(iter(rows.values())))
        if number > self.free:
            raise ShapeError(f"{number} rows do not fit: {self.free} of {self.capacity} slots are free")
        places = self._slots[self.count : self.count + number]
        slots = torch.from_numpy(places.astype(np.int64))
        for site, stored in self._rows.items():
            if rows[site].shape != (number, stored.shape[1]):
                raise ShapeError(f"expected {(number, stored.shape[1])} at {site!r}, found {tuple(rows[site].shape)}")
            stored.index_copy_(0, slots.to(stored.device), rows[site].to(stored))
        self._contexts[places] = places if contexts is None else contexts  # slots: no two alike
        self.count += number

    def take(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """Remove `number` rows, drawn uniformly without replacement, in random order; the tensors are the caller's."""
        if not 0 < number <= self.count:
            raise ShapeError(f"expected to take 1 to {self.count} rows, found {number}")
        self._untouched = False
        drawn = self._draw(number)
        _, together = np.unique(self._contexts[drawn], return_counts=True)
        self._taken, self._alike = self._taken + number, self._alike + int((together.astype(np.int64) ** 2).sum())
        slots = torch.from_numpy(drawn.astype(np.int64))
        return {site: self._gather(stored, slots) for site, stored in self._rows.items()}

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The first `number` rows that were put (fewer if there are fewer), as views that hold until the next `take`.

        Raises:
            RuntimeError: rows have been taken already, so the first ones are gone.
        """
        if not self._untouched:
            raise RuntimeError("peek shows the first rows: call it before the first batch is taken")
        return {site: stored[: min(number, self.count)] for site, stored in self._rows.items()}

    def state_dict(self) -> State:
        """Rows and slot numbers as they lie in memory, not copied. The generator is the caller's."""
        return {
            "rows": dict(self._rows),
            "slots": torch.from_numpy(self._slots),
            "contexts": torch.from_numpy(self._contexts),
            "count": self.count,
            "untouched": self._untouched,
            "clumping": [self._taken, self._alike],
        }

    def load_state_dict(self, state: State) -> None:
        """Take over the rows of a buffer of the same capacity, sites and precision.

        Raises:
            ConfigError: it was another one.
        """
        found = {site: (tuple(rows.shape), rows.dtype) for site, rows in state["rows"].items()}
        expected = {site: (tuple(rows.shape), rows.dtype) for site, rows in self._rows.items()}
        if found != expected:
            raise ConfigError(
                f"the saved buffer holds {found}, this one {expected}: use the settings it was saved with"
            )
        for site, rows in state["rows"].items():
            self._rows[site].copy_(rows)
        self._slots[:], self._contexts[:] = state["slots"].numpy(), state["contexts"].numpy()
        self.count, self._untouched = state["count"], state["untouched"]
        self._taken, self._alike = state["clumping"]

    def _gather(self, stored: Tensor, slots: Int[Tensor, " rows"]) -> Tensor:
        if not self._pinned:
            return stored.index_select(0, slots.to(stored.device))
        batch = torch.empty(len(slots), stored.shape[1], dtype=stored.dtype, pin_memory=True)
        return torch.index_select(stored, 0, slots, out=batch)

    def _draw(self, number: int) -> Int[np.ndarray, " number"]:
        if not self._shuffle:
            drawn = self._slots[:number].copy()
            self._slots = np.roll(self._slots, -number)
            self.count -= number
            return drawn
        places = self._sample(number)
        drawn = self._slots[places]
        # The drawn numbers change places with those at the end of the occupied part, which then becomes free.
        edge = self.count - number
        stays = np.ones(number, dtype=bool)
        stays[places[places >= edge] - edge] = False
        movers = np.flatnonzero(stays) + edge
        holes = places[places < edge]
        self._slots[holes], self._slots[movers] = self._slots[movers], self._slots[holes]
        self.count = edge
        return drawn

    def _sample(self, number: int) -> Int[np.ndarray, " number"]:
        """Distinct integers below `count`, every arrangement equally likely; O(number) while that is a small share."""
        if 4 * number > self.count:
            return torch.randperm(self.count, generator=self._generator)[:number].numpy()
        while True:
            # Independent draws without their repetitions are a sample without replacement. A quarter of the population
            # takes 1.15 draws a number, fewer take less, so this surplus is practically always enough.
            draws = torch.randint(self.count, (number + number // 4 + 64,), generator=self._generator).numpy()
            turns = np.arange(len(draws), dtype=np.int32)
            self._scratch[draws] = turns  # of a number drawn twice, its last turn stays
            distinct = draws[self._scratch[draws] == turns]
            if len(distinct) >= number:
                return distinct[:number]
