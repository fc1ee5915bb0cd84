"""Rows of metrics as files that grow: lines of JSON, and a table.

A run that is killed and continued writes to the same files, each time with the next attempt number. What it had logged
beyond its last checkpoint is logged again; readers keep the later row.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kit.atomic import write_text
from sae_kit.data.batch import State
from sae_kit.errors import CorruptFileError
from sae_kit.training.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer

COUNTERS = ("step", "tokens", "time", "attempt")
"""columns of every row: optimizer steps, activation rows, seconds of training, and the process that trains, from 1"""


class _Rows(Callback, ABC):
    """Writes each row at once, with its counters in front."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempt = 1
        self._is_under_way = False  # between the stages of a pipeline nothing is begun anew
        self._seconds, self._start = 0.0, time.perf_counter()

    def on_start(self, trainer: SAETrainer) -> None:
        if self.path.exists():
            _cut_torn_line(self.path)
            if not self._is_under_way:
                self.attempt = max(self.attempt, self._last_attempt() + 1)
        self._is_under_way = True

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._add(trainer, metrics)

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._add(trainer, metrics)

    def state_dict(self) -> State:
        return {"attempt": self.attempt, "seconds": self._elapsed()}

    def load_state_dict(self, state: State) -> None:
        self.attempt, self._is_under_way = state["attempt"] + 1, False
        self._seconds, self._start = state["seconds"], time.perf_counter()

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._start

    def _add(self, trainer: SAETrainer, metrics: Metrics) -> None:
        finite = {name: v if v is not None and math.isfinite(v) else None for name, v in metrics.items()}
        counters = (trainer.steps, trainer.tokens, round(self._elapsed(), 3), self.attempt)
        self._write({**dict(zip(COUNTERS, counters, strict=True)), **finite})

    @abstractmethod
    def _last_attempt(self) -> int: ...

    @abstractmethod
    def _write(self, row: dict[str, Any]) -> None: ...


class JSONL(_Rows):
    """Every row of metrics as one line of JSON; `read_metrics` reads them."""

    def _write(self, row: dict[str, Any]) -> None:
        _append(self.path, json.dumps(row, allow_nan=False) + "\n")

    def _last_attempt(self) -> int:
        return max((row.get("attempt", 1) for row in _parsed(self.path)), default=0)


class CSV(_Rows):
    """Every row of metrics as a row of a table; a metric that comes later adds a column."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._columns: list[str] = []

    def on_start(self, trainer: SAETrainer) -> None:
        super().on_start(trainer)
        if self.path.exists():
            self._columns = list(self._table()[0])

    def _write(self, row: dict[str, Any]) -> None:
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = self._table() if self.path.exists() else ([], [])
            self._columns += new
            write_text(self.path, _csv_lines(self._columns, [*rows, row], header=True))
        else:
            _append(self.path, _csv_lines(self._columns, [row]))

    def _last_attempt(self) -> int:
        return max((int(row["attempt"]) for row in self._table()[1] if row.get("attempt")), default=0)

    def _table(self) -> tuple[list[str], list[dict[str, Any]]]:
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, one for each step: what is logged and evaluated after the same step is joined.

    Where a run was continued, what a later attempt logged takes the place of what the earlier ones had logged from that
    step on. A last line that is torn, because writing was killed, is left out.

    Raises:
        FileNotFoundError: there is no such file. CorruptFileError: a line is not a row of metrics.
    """
    rows: dict[int, dict[str, Any]] = {}
    attempt = 0
    for row in _parsed(Path(path)):
        step = row["step"]
        if row.get("attempt", 1) > attempt:  # of a new attempt the first row is the earliest
            attempt = row.get("attempt", 1)
            rows = {earlier: kept for earlier, kept in rows.items() if earlier < step}
        rows[step] = rows.get(step, {}) | row
    return [rows[step] for step in sorted(rows)]


def _parsed(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # the last one ended with its newline, or is torn
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CorruptFileError(
                f"{path}, line {number}: expected a row of metrics as JSON, found {line[:80]!r}"
            ) from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise CorruptFileError(
                f"{path}, line {number}: expected a row of metrics with its step, found {line[:80]!r}"
            )
        rows.append(row)
    return rows


def _cut_torn_line(path: Path) -> None:
    """Take away what follows the last newline: the row that was being written when the run was killed."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)


def _csv_lines(columns: list[str], rows: list[dict[str, Any]], *, header: bool = False) -> str:
    """Rows as lines, after one with the names of the columns if there is a `header`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
