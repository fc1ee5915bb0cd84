"""The token rows of one source: its documents, their ids, made ahead, and the packer that cuts them."""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor

import numpy as np
import torch
from jaxtyping import Int

from sae_kit.data.batch import State
from sae_kit.data.documents import Documents, Kind
from sae_kit.data.packing import Packer
from sae_kit.data.tokenizing import Encoder, ReadAhead
from sae_kit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Ids = Int[np.ndarray, " _"]


class SourceRows(Iterator[Ids]):
    """The token rows of one source; a row under the packer's `context_size` is to be padded."""

    def __init__(
        self,
        documents: Documents,
        encoder: Encoder,
        packer: Packer,
        *,
        tokenize_batch: int = 1000,
        pool: Executor | None = None,
        ahead: int = 1,
    ) -> None:
        self.documents, self.packer = documents, packer
        self.rows = 0
        """rows handed out"""
        self.used = 0
        """documents that they were made of, those of a row begun included"""
        self.passes = 0
        """passes that were complete before the documents in use"""
        self._skipped = 0
        self._batches = ReadAhead(documents, encoder, tokenize_batch, pool=pool, depth=ahead)
        self._before: State | None = None  # where reading stood before the batch in use
        self._ids: list[Ids] = []
        self._kind: Kind | None = None
        self._used = 0  # documents of it
        self._ready: deque[Ids] = deque()
        self._ended = False

    @property
    def counters(self) -> dict[str, int]:
        """Documents and ids that were left out so far, by reason."""
        return {"skipped_documents": self._skipped, **self.packer.counters}

    def __next__(self) -> Ids:
        while not self._ready:
            if self._used < len(self._ids):
                self._ready.extend(self._pack(self._ids[self._used]))
                self._used += 1
                self.used += 1
            elif self._ended:
                raise StopIteration
            else:
                self._advance()
        self.rows += 1
        return self._ready.popleft()

    def state_dict(self) -> State:
        """Where this source stands, after the last row."""
        ready = np.concatenate([np.empty(0, np.int32), *self._ready])
        return {
            "documents": self.documents.state_dict() if self._before is None else self._before,
            "used": self._used,
            "packer": self.packer.state_dict(),
            "ready": torch.from_numpy(ready),
            "ready_lengths": [len(row) for row in self._ready],
            "rows": self.rows,
            "documents_used": self.used,
            "passes": self.passes,
            "skipped": self._skipped,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on after that row.

        Raises:
            ConfigError: an iterator without a state of its own, unless both are at their beginning.
        """
        begun = state["rows"] or state["used"] or state["documents"]["read"]
        if not self.documents.resumable and (begun or self._before is not None):
            raise ConfigError(
                f"{self.documents.name}: an iterator cannot go back to where a former run stood; give a list, another "
                "iterable, or an object that has state_dict and load_state_dict"
            )
        self._batches.stop()
        self.documents.load_state_dict(state["documents"])
        self.packer.load_state_dict(state["packer"])
        self._before, self._used, self._ids = state["documents"], state["used"], []
        ready = np.asarray(state["ready"], np.int32).copy()
        self._ready = deque(np.split(ready, np.cumsum(state["ready_lengths"])[:-1]) if len(ready) else ())
        self.rows, self.used = state["rows"], state["documents_used"]
        self.passes, self._skipped = state["passes"], state["skipped"]
        self._ended = False

    def close(self) -> None:
        """Forget what threads have read ahead; the state is still that after the last row."""
        self._batches.stop()

    def _advance(self) -> None:
        encoded = self._batches.next()
        passes = encoded.batch.passes
        if passes and not self.rows and not (passes == self.documents.epochs and self.packer.tail == "pad"):
            raise DataError(self._why_none())
        # 0, unless a state was loaded: then the batch in use is read again, perhaps as several smaller ones.
        self._used -= len(self._ids)
        self._before, self._ids, self._kind = encoded.before, encoded.ids, encoded.batch.kind
        self.passes, self._skipped = passes, encoded.batch.skipped
        if encoded.batch.news:
            log.info(encoded.batch.news)
        if not encoded.ids:
            self._ended = True
            self._ready.extend(self.packer.finish())

    def _pack(self, ids: Ids) -> list[Ids]:
        if self._kind != "tokens":
            return self.packer.add(ids)
        if len(ids) < self.packer.context_size and not self.packer.pack and self.packer.short == "drop":
            raise DataError(
                f"{self.documents.name}: expected rows of at least data.context_size={self.packer.context_size} ids "
                f"without data.pack, found one of {len(ids)}; set a smaller data.context_size, data.pack=true or "
                "data.short=pad"
            )
        return self.packer.add_row(ids)

    def _why_none(self) -> str:
        held_out = self.documents.held_out
        size, name = self.packer.context_size, self.documents.name
        if not self.packer.pack:
            return (
                f"{name}: each of its {'held-out ' if held_out else ''}documents has fewer than {size} ids; "
                "set a smaller data.context_size, data.pack=true or data.short=pad"
            )
        return (
            f"{name}: all its {'held-out ' if held_out else ''}text fills {len(self.packer.row)} of the {size} places "
            f"of one row; give more text, {'a larger data.holdout ' if held_out else ''}or a smaller data.context_size"
        )
