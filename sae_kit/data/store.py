"""The activation stream: token rows -> forward, stopped at the deepest site -> filters -> mixing buffer -> batches.

`Harvest` gives the activations of one forward after another, in the order of the text; `ActivationsStore` mixes
them, and knows when to begin and when to stop.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit.data.batch import TokenBatch
from sae_kit.data.buffer import BufferConfig, MixingBuffer
from sae_kit.data.capture import BoundSite, ModelConfig, Spelling, capture, device_of, load_model, max_context, resolve
from sae_kit.data.tokens import DataConfig, TokenStream, excluded_ids
from sae_kit.errors import ConfigError, DataError, NonFiniteError, ShapeError
from sae_kit.seeding import generator

log = logging.getLogger(__name__)

TOKENS_PER_FORWARD = 16_384  # stopped at the deepest site, so no logits take memory
LONGEST_ROW = 1_024  # unless asked for


@runtime_checkable
class TokenRows(Protocol):
    """What the store reads: the next rows of ids, fewer at the end and then none."""

    context_size: int

    def take(self, number: int) -> TokenBatch: ...


class Harvest(Iterator[dict[str, Tensor]]):
    """The activations of one forward after another, without excluded ids and rows that are not finite.

    Site -> [rows, width]; row i of every site is the same token. Excluded positions still go through the model. A
    forward all of whose ids are excluded is counted and passed over; it is an error (DataError) only if no other came
    in two passes over the text.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: TokenRows,
        sites: Sequence[BoundSite],
        *,
        rows_per_forward: int,
        excluded: Sequence[int] = (),
    ) -> None:
        self.lm_tokens = self.dropped_special = self.dropped_nonfinite = 0
        self._model, self._tokens, self._sites, self._rows = model, tokens, sites, rows_per_forward
        self._device = device_of(model)
        self._excluded = torch.tensor(sorted(excluded), dtype=torch.int64)

    def __next__(self) -> dict[str, Tensor]:
        while len(batch := self._tokens.take(self._rows)):
            ids = batch.ids
            values = capture(self._model, self._sites, ids.to(self._device))
            # The ids are still on the CPU, so this costs the device no wait.
            kept = torch.isin(ids.flatten(), self._excluded, invert=True).nonzero().squeeze(1)
            self.lm_tokens += ids.numel()
            self.dropped_special += ids.numel() - len(kept)
            if len(kept):
                return self._kept(values, ids, kept)
            if self.lm_tokens == self.dropped_special and getattr(self._tokens, "passes", 0) > 1:
                break  # the text begins again, and again: it would never end
        if self.lm_tokens and self.lm_tokens == self.dropped_special:
            raise DataError(f"all {self.lm_tokens:,} ids of the text are excluded from training; see data.exclude")
        raise StopIteration

    def _kept(
        self, values: dict[str, Tensor], ids: Int[Tensor, "rows context"], kept: Int[Tensor, " kept"]
    ) -> dict[str, Tensor]:
        rows = {site: _rows(site, value, ids).index_select(0, kept.to(value.device)) for site, value in values.items()}
        return self._finite(rows)

    def _finite(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        # A sum is finite only if every term is: one pass and one wait, and nearly always the answer.
        if torch.stack([value.sum(dtype=torch.float32) for value in rows.values()]).isfinite().all():
            return rows
        finite = torch.stack([value.isfinite().all(-1) for value in rows.values()]).all(0).cpu()
        number = int(finite.sum())
        if number == len(finite):
            return rows
        self.dropped_nonfinite += len(finite) - number
        if not number:
            raise NonFiniteError(f"no activation of a forward was finite at {', '.join(rows)}; try another model.dtype")
        return {site: value[finite.to(value.device)] for site, value in rows.items()}


class ActivationsStore(Iterator[dict[str, Tensor]]):
    """Batches of mixed activations: site -> [batch_tokens, width].

    The buffer is filled before the first batch, kept full while there is data, and drained at its end. With
    `train_tokens` exactly `train_tokens // batch_tokens` batches are given, and no more is harvested than they need.
    A batch is the caller's own memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: TokenRows,
        sites: Sequence[Spelling],
        *,
        batch_tokens: int,
        train_tokens: int | None = None,
        buffer: BufferConfig | None = None,
        rows_per_forward: int | None = None,
        excluded: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """Find the sites and check the sizes; nothing is read before the first batch, `fill` or `peek`.

        Raises:
            HookNotFoundError: a site that is not in the model.
            ConfigError: rows longer than the model can read, or sizes that do not fit each other.
        """
        self.sites = tuple(resolve(model, site) for site in sites)
        limit = max_context(model)
        if limit is not None and tokens.context_size > limit:
            raise ConfigError(
                f"data.context_size: expected at most {limit}, the model's maximum, found {tokens.context_size}"
            )
        self.cfg = buffer or BufferConfig()
        self.batch_tokens = batch_tokens
        self.capacity = self.cfg.capacity(batch_tokens, train_tokens)
        self.excluded = tuple(excluded)
        self.tokens = tokens
        rows = rows_per_forward or max(1, TOKENS_PER_FORWARD // tokens.context_size)
        self._harvest = Harvest(model, tokens, self.sites, rows_per_forward=rows, excluded=excluded)
        self._wanted = None if train_tokens is None else train_tokens // batch_tokens * batch_tokens
        self._generator = generator(seed, "buffer")
        self._buffer: MixingBuffer | None = None
        self._pending: dict[str, Tensor] = {}
        self._entered = self._dropped_last = 0
        self._ended = False

    @classmethod
    def from_config(
        cls,
        model: ModelConfig | nn.Module,
        data: DataConfig,
        buffer: BufferConfig | None = None,
        *,
        sites: Sequence[Spelling],
        train_tokens: int | None,
        batch_tokens: int,
        seed: int = 0,
        tokenizer: Any = None,
        documents: Any = None,
    ) -> "ActivationsStore":
        """Load what is given as config and connect it; a model object needs its `tokenizer`.

        `documents`, an iterable of strings or a dataset, takes the place of `data.sources`.
        """
        if isinstance(model, ModelConfig):
            model, own = load_model(model)
            tokenizer = tokenizer or own
        if tokenizer is None:
            raise ConfigError("expected the tokenizer of the model that was given, found None")
        for site in sites:  # before the text is opened, which may take longer
            resolve(model, site)
        stream = TokenStream.from_config(
            data, tokenizer, context_size=default_context(model), documents=documents, seed=seed
        )
        return cls(
            model,
            stream,
            sites,
            batch_tokens=batch_tokens,
            train_tokens=train_tokens,
            buffer=buffer,
            rows_per_forward=data.rows_per_forward,
            excluded=excluded_ids(data.exclude, tokenizer),
            seed=seed,
        )

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        self.fill()
        count = 0 if self._buffer is None else self._buffer.count
        if self._buffer is None or count == 0 or (count < self.batch_tokens and self.cfg.drop_last):
            self._dropped_last, self._buffer = self._dropped_last + count, None
            raise StopIteration
        return self._buffer.take(min(self.batch_tokens, count))

    def fill(self) -> None:
        """Harvest until the buffer is full or the data ends.

        Raises:
            DataError: text that does not give one batch.
        """
        while not self._ended and (self._buffer is None or self._buffer.free):
            self._pending = self._pending or self._next_rows()
            if not self._pending:
                return
            buffer = self._buffer = self._buffer or self._allocate(self._pending)
            room = buffer.free if self._wanted is None else min(buffer.free, self._wanted - self._entered)
            buffer.put({site: rows[:room] for site, rows in self._pending.items()})
            waiting = len(next(iter(self._pending.values())))
            self._entered += min(room, waiting)
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
    def counters(self) -> Mapping[str, int]:
        """Tokens fed to the model, activations dropped by reason, and documents skipped because they were empty."""
        return {
            "lm_tokens": self._harvest.lm_tokens,
            "dropped_special": self._harvest.dropped_special,
            "dropped_nonfinite": self._harvest.dropped_nonfinite,
            "dropped_last": self._dropped_last,
            "skipped_documents": getattr(self.tokens, "skipped_documents", 0),
        }

    @property
    def holdout(self) -> tuple[float, ...]:
        """Share of its documents that each source keeps for evaluation; none where rows came from elsewhere."""
        return getattr(self.tokens, "holdout", ())

    def close(self) -> None:
        """Give back the buffer's memory; the store is then at its end."""
        self._buffer, self._pending, self._ended = None, {}, True

    def _next_rows(self) -> dict[str, Tensor]:
        rows = next(self._harvest, {})
        if not rows:
            self._ended = True
            if self._entered == 0 or (self._entered < self.batch_tokens and self.cfg.drop_last):
                raise DataError(
                    f"the text gives {self._entered:,} activations, fewer than one batch of {self.batch_tokens:,}"
                )
            if self._wanted is not None:
                log.warning("the text ends after %d of %d activations", self._entered, self._wanted)
        return rows

    def _allocate(self, rows: Mapping[str, Tensor]) -> MixingBuffer:
        first = next(iter(rows.values()))
        asked = None if self.cfg.dtype == "auto" else getattr(torch, self.cfg.dtype)
        return MixingBuffer(
            self.capacity,
            {site: value.shape[1] for site, value in rows.items()},
            dtype={site: asked or value.dtype for site, value in rows.items()},
            generator=self._generator,
            device=first.device,
            shuffle=self.cfg.mix == "stream",
        )


def default_context(model: nn.Module) -> int:
    """Ids per row where the config names none: the model's maximum, at most 1,024."""
    return min(LONGEST_ROW, max_context(model) or LONGEST_ROW)


def _rows(site: str, value: Tensor, ids: Tensor) -> Tensor:
    if value.ndim != 3 or value.shape[:2] != ids.shape:
        raise ShapeError(f"expected [{ids.shape[0]}, {ids.shape[1]}, width] at {site!r}, found {tuple(value.shape)}")
    return value.reshape(ids.numel(), -1)
