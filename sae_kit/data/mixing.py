"""Activations in the order of the text -> batches of unrelated ones."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.data.batch import Harvested, Resumable, State
from sae_kit.data.buffer import BufferConfig, MixingBuffer
from sae_kit.devices import pick_device
from sae_kit.errors import ConfigError, DataError
from sae_kit.seeding import generator

log = logging.getLogger(__name__)

DEVICE_SHARE = 0.3
"""Share of a GPU's memory that a buffer may take before it goes to the host."""
CLUMPED = 16
"""Clumping that is worth a warning: the mean of a batch is as noisy as that of one 16 times smaller."""


@runtime_checkable
class Activations(Resumable, Protocol):
    """What is mixed: activations in their natural order, with or without the contexts that they come from."""

    def __next__(self) -> Harvested | dict[str, Tensor]: ...

    @property
    def counters(self) -> Mapping[str, int | float]: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...


class Mixing(Iterator[dict[str, Tensor]]):
    """Batches from a mixing buffer: site -> [batch_tokens, width].

    The buffer is filled before the first batch, kept full while there is data, and drained at its end. With
    `train_tokens` exactly `train_tokens // batch_tokens` batches are given, and no more is read than they need.
    """

    def __init__(
        self,
        source: Activations,
        cfg: BufferConfig,
        *,
        batch_tokens: int,
        train_tokens: int | None = None,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """`device` is where the rows are made, which a state that was read from a file does not say."""
        self.source, self.cfg, self.batch_tokens, self._device = source, cfg, batch_tokens, device
        self.capacity = cfg.capacity(batch_tokens, train_tokens)
        self._wanted = None if train_tokens is None else train_tokens // batch_tokens * batch_tokens
        self._generator = generator(seed, "buffer")
        self._buffer: MixingBuffer | None = None
        self._pending: dict[str, Tensor] = {}
        self._pending_contexts: Int[np.ndarray, " rows"] = np.empty(0, dtype=np.int32)
        self._contexts = self._entered = self._dropped_last = 0
        self._ended = False

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        self.fill()
        count = 0 if self._buffer is None else self._buffer.count
        if self._buffer is None or count == 0 or (count < self.batch_tokens and self.cfg.drop_last):
            self._dropped_last, self._buffer = self._dropped_last + count, None
            raise StopIteration
        return self._buffer.take(min(self.batch_tokens, count))

    def fill(self) -> None:
        """Read until the buffer is full or the data ends.

        Raises:
            DataError: data that do not give one batch.
        """
        while not self._ended and (self._buffer is None or self._buffer.free):
            if not self._pending and not self._read():
                return
            buffer = self._buffer = self._buffer or self._allocate(self._pending)
            room = buffer.free if self._wanted is None else min(buffer.free, self._wanted - self._entered)
            buffer.put({site: rows[:room] for site, rows in self._pending.items()}, self._pending_contexts[:room])
            waiting = len(self._pending_contexts)
            self._entered += min(room, waiting)
            self._pending_contexts = self._pending_contexts[room:]
            self._pending = {site: rows[room:] for site, rows in self._pending.items()} if waiting > room else {}
            if self._entered == self._wanted:
                self._ended, self._pending = True, {}

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The first `number` activations, or as many as the buffer holds; nothing is removed.

        They are views that hold until the first batch; after it there is no peeking (RuntimeError).
        """
        self.fill()
        return {} if self._buffer is None else self._buffer.peek(number)

    @property
    def counters(self) -> dict[str, int | float]:
        """Those of the source; rows of the last, incomplete batch; and, if contexts are known, clumping of batches."""
        buffer = {} if self._buffer is None or not self._contexts else {"clumping": self._buffer.clumping}
        return {**self.source.counters, "dropped_last": self._dropped_last, **buffer}

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.source.provenance)

    def state_dict(self) -> State:
        return {
            "source": self.source.state_dict(),
            "buffer": None if self._buffer is None else self._buffer.state_dict(),
            "pending": dict(self._pending),
            "pending_contexts": torch.from_numpy(self._pending_contexts.copy()),
            "numbers": [self._contexts, self._entered, self._dropped_last],
            "ended": self._ended,
            "generator": self._generator.get_state(),
            "settings": self._settings,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken, perhaps to a later end; one that is refused changes nothing.

        Raises:
            ConfigError: it belongs to another batch size, capacity, length or order, or the source refuses it.
        """
        grown = self._grown(state)
        for name, value in self._settings.items():
            if state["settings"][name] != value and not (grown and name in ("train.tokens", "buffer.tokens")):
                raise ConfigError(
                    f"{name}: the saved stream has {state['settings'][name]}, this one {value}; use the same"
                )
        # A short run had a buffer no larger than itself, and keeps it.
        capacity = state["settings"]["buffer.tokens"] if grown else self.capacity
        buffer = None
        if state["buffer"] is not None:
            buffer = self._allocate(state["buffer"]["rows"], self._device, capacity)
            buffer.load_state_dict(state["buffer"])
        self.source.load_state_dict(state["source"])
        self._pending = {site: rows.clone() for site, rows in state["pending"].items()}
        self._pending_contexts = state["pending_contexts"].numpy().copy()
        self._contexts, self._entered, self._dropped_last = state["numbers"]
        self._ended, self._buffer, self.capacity = state["ended"] and not grown, buffer, capacity
        self._generator.set_state(state["generator"])

    def close(self) -> None:
        """Give back the buffer's memory and close the source; this is then at its end."""
        self._buffer, self._pending, self._ended = None, {}, True
        self.source.close()

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "batch_tokens": self.batch_tokens,
            "buffer.tokens": self.capacity,
            "buffer.mix": self.cfg.mix,
            "train.tokens": self._wanted,
        }

    def _grown(self, state: State) -> bool:
        """Whether the saved stream was that of a shorter run; what was left of its last forward is then passed over."""
        before = state["settings"]["train.tokens"]
        return before is not None and self._wanted is not None and self._wanted > before

    def _read(self) -> bool:
        """One more item of the source into `_pending`; False at the end."""
        found = next(self.source, None)
        if found is not None:
            self._take_over(found)
            return True
        self._ended = True
        if self._entered == 0 or (self._entered < self.batch_tokens and self.cfg.drop_last):
            raise DataError(f"there are {self._entered:,} activations, fewer than one batch of {self.batch_tokens:,}")
        if self._wanted is not None:
            log.warning("the data end after %d of %d activations", self._entered, self._wanted)
        return False

    def _take_over(self, found: Harvested | dict[str, Tensor]) -> None:
        if not isinstance(found, Harvested):
            self._pending = found
            self._pending_contexts = np.zeros(len(next(iter(found.values()))), dtype=np.int32)  # nobody counts them
            return
        context = found.tokens.ids.shape[1]
        self._pending = dict(found.rows)
        # Numbers begin anew after 2³², long after the rows of the first contexts have left.
        self._pending_contexts = (found.kept // context + self._contexts).numpy().astype(np.int32)
        self._contexts += len(found.tokens)
        if self._buffer is None:
            self._warn_of_clumping(context)

    def _warn_of_clumping(self, context: int) -> None:
        if self.cfg.mix == "none":
            return
        expected = 1 + (context - 1) * self.batch_tokens / (2 * self.capacity - self.batch_tokens)
        if expected > CLUMPED:
            enough = -(-self.batch_tokens * ((context - 1) + (CLUMPED - 1)) // (2 * (CLUMPED - 1)))
            log.warning(
                "a batch of %d from a buffer of %d tokens has about %.0f from each of its contexts: its gradient is as "
                "noisy as that of a batch %.0f times smaller; buffer.tokens=%d brings that to %d",
                self.batch_tokens,
                self.capacity,
                expected,
                expected,
                enough,
                CLUMPED,
            )

    def _allocate(
        self, rows: Mapping[str, Tensor], made_on: torch.device | None = None, capacity: int | None = None
    ) -> MixingBuffer:
        held = capacity or self.capacity
        asked = None if self.cfg.dtype == "auto" else getattr(torch, self.cfg.dtype)
        dtypes = {site: asked or value.dtype for site, value in rows.items()}
        size = sum(held * value.shape[1] * dtypes[site].itemsize for site, value in rows.items())
        source = made_on or next(iter(rows.values())).device
        device = buffer_device(self.cfg.device, source, size)
        return MixingBuffer(
            held,
            {site: value.shape[1] for site, value in rows.items()},
            dtype=dtypes,
            generator=self._generator,
            device=device,
            pinned=device.type == "cpu" and source.type == "cuda",
            shuffle=self.cfg.mix == "stream",
        )


def buffer_device(asked: str, source: torch.device, size: int) -> torch.device:
    """Where a buffer of `size` bytes lies whose rows are made on `source`."""
    if asked != "auto":
        return pick_device(asked, "buffer.device")
    if source.type == "cuda" and size > DEVICE_SHARE * torch.cuda.get_device_properties(source).total_memory:
        return torch.device("cpu")
    return source
