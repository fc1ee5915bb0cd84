"""Whole contexts in the order of the text, for losses that run the model on them once more.

Nothing is mixed, and no batch is made ahead: the text of the batch in hand stays known, and no forward made ahead
passes through what such a loss does to the model.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.data.batch import Harvested, Resumable, State, TokenBatch
from sae_kit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

TOKENS_WITH_LOGITS = 4_096  # of a forward that ends in logits, [tokens, vocabulary]


@runtime_checkable
class Forwards(Resumable, Protocol):
    """Activations forward by forward, as a `Harvest` gives them."""

    def __next__(self) -> Harvested: ...

    @property
    def counters(self) -> Mapping[str, int | float]: ...

    @property
    def provenance(self) -> Mapping[str, Any]: ...


class WholeContexts(Iterator[dict[str, Tensor]]):
    """Batches of whole contexts: site -> [rows, width], the activations of `forwards` forwards that pass the filters.

    Batches therefore differ in length. With `train_tokens` exactly so many rows are given: positions of the last
    batch that are too many count as filtered out.
    """

    def __init__(self, source: Forwards, *, forwards: int = 1, train_tokens: int | None = None) -> None:
        self.source, self.forwards = source, forwards
        self.current: list[Harvested] = []
        """the text that the last batch is from, forward by forward, with its rows"""
        self._shown: list[Harvested] = []  # by `peek`, and not handed out yet
        self._wanted, self._given = train_tokens, 0

    def __next__(self) -> dict[str, Float[Tensor, "rows _"]]:
        found, self._shown = self._shown or self._read(), []
        room = None if self._wanted is None else self._wanted - self._given
        self.current = found if room is None else _cut(found, room)
        if not self.current:
            raise StopIteration
        self._given += sum(len(each.kept) for each in self.current)
        return _joined(self.current)

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The first `number` rows, at most those of one batch; nothing is removed."""
        self._shown = self._shown or self._read()
        return {site: rows[:number] for site, rows in _joined(self._shown).items()}

    @property
    def counters(self) -> dict[str, int | float]:
        """Those of the source."""
        return dict(self.source.counters)

    @property
    def provenance(self) -> dict[str, Any]:
        return dict(self.source.provenance)

    def state_dict(self) -> State:
        return {
            "source": self.source.state_dict(),
            "shown": [_as_state(each) for each in self._shown],
            "given": self._given,
            "forwards": self.forwards,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken, perhaps to a later end.

        Raises:
            ConfigError: it belongs to batches of another size, to batches that were mixed, or the source refuses it.
        """
        if state.get("forwards") != self.forwards:
            raise ConfigError(
                f"the saved stream has batches of {state.get('forwards', 'mixed rows, not of whole')} forwards, this "
                f"one of {self.forwards}; use the same train.batch_tokens and data.rows_per_forward"
            )
        self.source.load_state_dict(state["source"])
        self._shown = [_from_state(each) for each in state["shown"]]
        self._given, self.current = state["given"], []

    def close(self) -> None:
        """Close the source."""
        self._shown, self.current = [], []
        self.source.close()

    def _read(self) -> list[Harvested]:
        """What the next forwards give; fewer at the end of the text."""
        if self._given == self._wanted:
            return []
        found = [each for _ in range(self.forwards) if (each := next(self.source, None)) is not None]
        if not found and not self._given:
            raise DataError("there is no text: expected at least one context, found none")
        if not found and self._wanted is not None:
            log.warning("the text ends after %d of %d activations", self._given, self._wanted)
        return found


def split_contexts(batch_tokens: int, context_size: int, rows_per_forward: int | None = None) -> tuple[int, int]:
    """Forwards of a batch of at most `batch_tokens` ids, and contexts of each.

    Raises:
        ConfigError: not one context fits.
    """
    contexts = batch_tokens // context_size
    if not contexts:
        raise ConfigError(
            f"train.batch_tokens: a step on whole contexts takes at least one of {context_size} ids "
            f"(data.context_size), found {batch_tokens}"
        )
    each = min(rows_per_forward or max(1, TOKENS_WITH_LOGITS // context_size), contexts)
    forwards = -(-contexts // each)
    return forwards, contexts // forwards


def _joined(found: list[Harvested]) -> dict[str, Tensor]:
    if len(found) == 1:
        return dict(found[0].rows)
    return {site: torch.cat([each.rows[site] for each in found]) for site in (found[0].rows if found else ())}


def _cut(found: list[Harvested], room: int) -> list[Harvested]:
    """The first `room` rows, with the text that they are from."""
    kept: list[Harvested] = []
    for each in found:
        number = min(room, len(each.kept))
        room -= number
        if number:
            rows = {site: values[:number] for site, values in each.rows.items()}
            kept.append(Harvested(rows, each.tokens, each.kept[:number]))
    return kept


def _as_state(found: Harvested) -> State:
    tokens = found.tokens
    return {"rows": dict(found.rows), "ids": tokens.ids, "lengths": tokens.lengths, "kept": found.kept}


def _from_state(state: State) -> Harvested:
    return Harvested(state["rows"], TokenBatch(state["ids"], state["lengths"]), state["kept"])
