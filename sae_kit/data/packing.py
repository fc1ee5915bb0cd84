"""Documents of any length -> rows of one length, without loss."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from jaxtyping import Int

Ids = Int[np.ndarray, " _"]


class Packer:
    """Cuts the ids of documents into rows of exactly `context_size` ids.

    A document gets `doc_start` in front; what then begins a row gets `row_start`, what follows another document
    `separator`: each only where the ids do not already begin with it. The rest of a document begins the next row.

    `pack=False` puts one document into a row: it gets `doc_start` (`row_start` if there is none), is cut to
    `context_size`, and dropped or handed out as it is if it is shorter. A row under `context_size` ids is to be padded.
    """

    def __init__(
        self,
        context_size: int,
        *,
        row_start: int | None = None,
        separator: int | None = None,
        doc_start: int | None = None,
        pack: bool = True,
        short: Literal["drop", "pad"] = "drop",
        tail: Literal["drop", "pad"] = "drop",
    ) -> None:
        self.context_size = context_size
        self.row_start, self.separator, self.doc_start = row_start, separator, doc_start
        self.pack, self.short, self.tail = pack, short, tail
        self.counters = {"blank_documents": 0, "short_documents": 0, "cut_ids": 0, "tail_ids": 0}
        """documents without an id, documents that fill no row, ids cut off documents, ids of an unfinished last row"""
        self._row = np.empty(context_size, np.int32)
        self._filled = 0

    @property
    def row(self) -> Ids:
        """The row begun."""
        return self._row[: self._filled]

    def add(self, ids: Ids) -> list[Ids]:
        """Rows that one more document completes."""
        if not len(ids):
            self.counters["blank_documents"] += 1
            return []
        if not self.pack:
            return self._alone(ids)
        return self._append(_after(self.doc_start, ids))

    def add_row(self, ids: Ids) -> list[Ids]:
        """Rows that ids give which were packed before.

        `context_size` ids are a row as they are; what a longer row has beyond them, and a shorter row, is packed like
        the rest of a document and like a document.
        """
        if len(ids) < self.context_size:
            return self.add(ids)
        row, rest = ids[: self.context_size], ids[self.context_size :]
        if self.pack:
            return [row, *self._append(rest)]
        self.counters["cut_ids"] += len(rest)
        return [row]

    def finish(self) -> list[Ids]:
        """The row begun, if it is to be kept, at the end of all documents."""
        rest, self._filled = self.row.copy(), 0
        if not len(rest):
            return []
        if self.tail == "pad":
            return [rest]
        self.counters["tail_ids"] += len(rest)
        return []

    def state_dict(self) -> dict[str, Any]:
        """Where packing stands, as JSON values."""
        return {"row": self.row.tolist(), "counters": dict(self.counters)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()` of a packer of the same options."""
        self.counters = dict(state["counters"])
        self._filled = len(state["row"])
        self._row[: self._filled] = state["row"]

    def _append(self, ids: Ids) -> list[Ids]:
        rows: list[Ids] = []
        place = 0
        while place < len(ids):
            begin = self.separator if self._filled else self.row_start
            if begin is not None and ids[place] != begin:
                self._row[self._filled] = begin
                self._filled += 1
            part = ids[place : place + self.context_size - self._filled]
            self._row[self._filled : self._filled + len(part)] = part
            place += len(part)
            self._filled += len(part)
            if self._filled == self.context_size:
                rows.append(self._row)
                self._row, self._filled = np.empty_like(self._row), 0
        return rows

    def _alone(self, ids: Ids) -> list[Ids]:
        ids = _after(self.row_start if self.doc_start is None else self.doc_start, ids)
        if len(ids) < self.context_size and self.short == "drop":
            self.counters["short_documents"] += 1
            return []
        self.counters["cut_ids"] += max(len(ids) - self.context_size, 0)
        return [ids[: self.context_size]]


def _after(mark: int | None, ids: Ids) -> Ids:
    """The ids with `mark` in front, unless they begin with it."""
    return ids if mark is None or ids[0] == mark else np.concatenate([np.array([mark], ids.dtype), ids])
