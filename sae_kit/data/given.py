"""Rows that a user brings: of images, proteins, anything."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.errors import ConfigError, DataError


class GivenRows(Iterator[dict[str, Tensor]]):
    """Any iterable of tensors [rows, width], or of mappings from site to them, as a link of the stream.

    Tensors alone get the site `site`. Rows that are not finite are dropped and counted. The stream can be resumed if
    the iterable has `state_dict` and `load_state_dict`.
    """

    def __init__(self, rows: Iterable[Tensor | Mapping[str, Tensor]], site: str = "rows") -> None:
        self._given, self._site = rows, site
        self._rows = iter(rows)
        self._dropped = 0

    def __next__(self) -> dict[str, Tensor]:
        while True:
            item = next(self._rows)
            rows = {self._site: item} if isinstance(item, Tensor) else item
            rows = {site: value.detach() for site, value in rows.items()}
            shapes = {site: list(value.shape) for site, value in rows.items()}
            if not rows or len({len(value) for value in rows.values()}) > 1 or any(v.ndim != 2 for v in rows.values()):
                raise DataError(f"expected rows [rows, width], as many at every site, found {shapes}")
            finite = torch.stack([value.isfinite().all(1) for value in rows.values()]).all(0)
            if not bool(finite.all()):
                self._dropped += int((~finite).sum())
                rows = {site: value[finite] for site, value in rows.items()}
            if int(finite.sum()):
                return rows

    @property
    def resumable(self) -> bool:
        """Whether a stream over the same data can go on where this one stops."""
        return hasattr(self._given, "state_dict") and hasattr(self._given, "load_state_dict")

    @property
    def counters(self) -> dict[str, int | float]:
        """Rows dropped because they were not finite."""
        return {"dropped_nonfinite": self._dropped}

    @property
    def provenance(self) -> dict[str, Any]:
        """Nothing is known of rows that were given."""
        return {}

    def state_dict(self) -> State:
        given: Any = self._given
        return {"given": given.state_dict() if self.resumable else None, "dropped": self._dropped}

    def load_state_dict(self, state: State) -> None:
        """Go on where `state` was taken.

        Raises:
            ConfigError: the rows have no state.
        """
        given: Any = self._given
        if not self.resumable or state["given"] is None:
            raise ConfigError(
                f"{type(given).__name__} cannot go on where another one stopped: give rows that have state_dict and "
                "load_state_dict"
            )
        given.load_state_dict(state["given"])
        self._rows, self._dropped = iter(given), state["dropped"]

    def close(self) -> None:
        """Close the rows, if they can be."""
        close = getattr(self._given, "close", None)
        if close is not None:
            close()
