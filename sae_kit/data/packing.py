"""Documents of any length -> rows of one length, without loss."""

from collections.abc import Sequence


class Packer:
    """Cuts the ids of documents into rows of exactly `context_size` ids.

    A document gets `doc_start` in front; what then begins a row gets `row_start`, what follows another document
    `separator`: each only where the ids do not already begin with it. The rest of a document begins the next row.
    """

    def __init__(
        self,
        context_size: int,
        *,
        row_start: int | None = None,
        separator: int | None = None,
        doc_start: int | None = None,
    ) -> None:
        self.context_size = context_size
        self.row_start, self.separator, self.doc_start = row_start, separator, doc_start
        self.row: list[int] = []
        """the row begun"""

    def add(self, ids: Sequence[int]) -> list[list[int]]:
        """Rows that one more document completes."""
        if not ids:
            return []
        if self.doc_start is not None and ids[0] != self.doc_start:
            ids = [self.doc_start, *ids]
        rows, place = [], 0
        while place < len(ids):
            begin = self.separator if self.row else self.row_start
            if begin is not None and ids[place] != begin:
                self.row.append(begin)
            room = self.context_size - len(self.row)
            self.row += ids[place : place + room]
            place += room
            if len(self.row) == self.context_size:
                rows.append(self.row)
                self.row = []
        return rows
