"""Token rows -> forwards, stopped at the deepest site -> the activations that pass the filters."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from sae_kit.data.batch import Harvested, State, TokenBatch, TokenRows
from sae_kit.data.capture import Reader
from sae_kit.data.filters import RowFilter
from sae_kit.data.provenance import check_provenance
from sae_kit.data.sites import BoundSite
from sae_kit.errors import DataError, ShapeError

MEDIAN = "median_norm/"
"""Beginning of the counter that says a site's median norm, with which norms are compared."""


class Harvest(Iterator[Harvested]):
    """The activations of one forward after another, in the order of the text.

    Positions that are filtered out still go through the model. A forward that leaves none is counted and passed over;
    it is an error (DataError) only if no other came in two passes over the text.
    """

    def __init__(
        self,
        model: nn.Module | Reader,
        tokens: TokenRows,
        sites: Sequence[BoundSite],
        *,
        rows_per_forward: int,
        filters: RowFilter,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """`facts` say which model this is, for `provenance`."""
        self.tokens, self.filters = tokens, filters
        self.lm_tokens = 0
        """ids that went through the model"""
        self.lm_seconds = 0.0
        """how long forwards took, with their filters, in this process"""
        self.reader = model if isinstance(model, Reader) else Reader(model)
        self._sites, self._rows = sites, rows_per_forward
        self._facts = dict(facts or {})
        self._given = False

    def __next__(self) -> Harvested:
        while len(tokens := self.tokens.take(self._rows)):
            kept = self.filters.positions(tokens)
            self.lm_tokens += tokens.ids.numel()
            started = time.perf_counter()
            harvested = self._read(tokens, kept) if len(kept) else None
            self.lm_seconds += time.perf_counter() - started  # filters wait for the device
            if harvested is not None and len(harvested.kept):
                self._given = True
                return harvested
            if not self._given and self.tokens.passes > 1:
                break  # the text begins again, and again: it would never end
        if self.lm_tokens and not self._given:
            raise DataError(self._why_none())
        raise StopIteration

    @property
    def tokens_per_forward(self) -> int:
        """Ids that go through the model at a time."""
        return self._rows * self.tokens.context_size

    @property
    def counters(self) -> dict[str, int | float]:
        """Ids fed to the model; rows dropped by reason; per site the median norm, and the largest in units of it."""
        return {
            "lm_tokens": self.lm_tokens,
            **{f"dropped_{reason}": count for reason, count in self.filters.dropped.items()},
            **{f"{MEDIAN}{site}": median for site, median in self.filters.medians.items()},
            **{f"max_norm_ratio/{site}": ratio for site, ratio in self.filters.max_ratios.items()},
            **self.tokens.counters,
        }

    @property
    def provenance(self) -> dict[str, Any]:
        """Which activations these are, as JSON values."""
        return {**self._own_provenance, "tokens": dict(self.tokens.provenance)}

    @property
    def _own_provenance(self) -> dict[str, Any]:
        return {
            "model": self._facts,
            "sites": [site.spelling for site in self._sites],
            "filters": self.filters.provenance,
        }

    @property
    def _settings(self) -> dict[str, Any]:
        """What a state is good for: the running median and the last bit of values depend on the forwards, too."""
        return {**self._own_provenance, "rows_per_forward": self._rows}

    def state_dict(self) -> State:
        return {
            "settings": self._settings,
            "tokens": self.tokens.state_dict(),
            "filters": self.filters.state_dict(),
            "lm_tokens": self.lm_tokens,
            "given": self._given,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken.

        Raises:
            ConfigError: it belongs to another model, or to other sites, filters, forwards or token rows.
        """
        check_provenance(self._settings, state["settings"], "the saved stream")
        self.tokens.load_state_dict(state["tokens"])
        self.filters.load_state_dict(state["filters"])
        self.lm_tokens, self._given = state["lm_tokens"], state["given"]

    def close(self) -> None:
        """Close the token rows."""
        self.tokens.close()

    def _read(self, tokens: TokenBatch, kept: Int[Tensor, " kept"]) -> Harvested:
        values = self.reader.capture(self._sites, tokens.ids, tokens.lengths)
        rows = {site: _rows_at(site, value, tokens, kept) for site, value in values.items()}
        usable = self.filters.usable(rows)
        if usable is not None:
            kept = kept[usable]
            rows = {site: value.index_select(0, usable.to(value.device)) for site, value in rows.items()}
        return Harvested(rows, tokens, kept)

    def _why_none(self) -> str:
        reasons = ", ".join(f"{count:,} by {reason}" for reason, count in self.filters.dropped.items() if count)
        if not any(count for reason, count in self.filters.dropped.items() if reason != "special"):
            return f"all {self.lm_tokens:,} ids of the text are excluded from training; see data.exclude"
        return f"none of the {self.lm_tokens:,} activations of the text passed the filters: {reasons}"


def _rows_at(site: str, value: Tensor, tokens: TokenBatch, kept: Tensor) -> Tensor:
    rows, context = tokens.ids.shape
    if value.ndim != 3 or value.shape[:2] != (rows, context):
        raise ShapeError(f"expected [{rows}, {context}, width] at {site!r}, found {tuple(value.shape)}")
    flat = value.reshape(rows * context, -1)
    return flat if len(kept) == len(flat) else flat.index_select(0, kept.to(value.device))
