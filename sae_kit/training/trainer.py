"""The training loop: one pass over batches, any number of SAEs.

A step of each SAE is in `part.py`. Here the loop waits for the device only where metrics are logged.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.devices import pick_device
from sae_kit.errors import ConfigError, DataError, NonFiniteError, ShapeError
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback, Callbacks, Console
from sae_kit.training.config import RunConfig
from sae_kit.training.part import SAEInTraining

log = logging.getLogger(__name__)

SAMPLE_ROWS = 32_768
"""Rows that serve for estimates where batches come from an iterator that cannot show what it will give."""

Item = Tensor | Mapping[str, Tensor] | Batch
"""What a stream hands out: rows, rows by site, or what is read and what is to be reproduced."""


@dataclass(frozen=True)
class TrainingResult:
    """What `fit` leaves."""

    saes: dict[str, SAE]
    tokens: int
    steps: int
    tokens_per_second: float
    """of this fit, from its first row asked for to its last step; evaluation left out"""
    metrics: dict[str, float | int]
    """the last row that was logged"""


class SAETrainer:
    """Trains one SAE, or a mapping of them, on an iterator of activations.

    `batches` yields tensors [batch, *in_shape], mappings from site to [batch, width] (each SAE takes the sites of its
    entry, or those in its metadata), or `Batch(x, y)`. `evaluate` is called after the last step, and
    what it returns is handed to the callbacks. Of `cfg` only saes, optim, schedule, train, log and
    buffer.norm_estimate_tokens are read here.
    """

    def __init__(
        self,
        cfg: RunConfig,
        saes: SAE | Mapping[str, SAE],
        batches: Iterable[Item],
        *,
        callbacks: Sequence[Callback] | None = None,
        evaluate: Callable[[], Mapping[str, float | None]] | None = None,
    ) -> None:
        self.cfg = cfg
        self.saes: dict[str, SAE] = {"sae": saes} if isinstance(saes, SAE) else dict(saes)
        if not self.saes:
            raise ConfigError("there is no SAE to train: pass one, or a mapping from names to SAEs")
        self.steps = 0
        self.tokens = 0
        self.total_tokens = cfg.train.tokens // cfg.train.batch_tokens * cfg.train.batch_tokens
        self.callbacks = Callbacks([Console()] if callbacks is None and cfg.log.console else list(callbacks or ()))
        self._batches = batches
        self._schedule = cfg.schedule.build(cfg.train.tokens)
        device = pick_device(cfg.train.device, "train.device")
        self._evaluate = evaluate
        self._sites = {
            name: cfg.saes[name].sites if name in cfg.saes else sae.cfg.metadata.sites
            for name, sae in self.saes.items()
        }
        self.in_training = {name: SAEInTraining(cfg, name, sae.to(device)) for name, sae in self.saes.items()}

    def fit(self) -> TrainingResult:
        """Train until `train.tokens` or the end of the batches, whichever comes first.

        Raises:
            DataError: no batch came at all. ShapeError: rows of another width. NonFiniteError: training diverged.
        """
        last: dict[str, float | int] = {}
        started = logged = time.perf_counter()  # filling the buffer is part of the work
        before = tokens_logged = self.tokens
        try:
            self.callbacks.call("on_start", self)
            stream = self._with_statistics()
            while self.tokens < self.total_tokens:
                item = next(stream, None)
                if item is None:
                    log.warning("the data ended after %s of %s tokens", f"{self.tokens:,}", f"{self.total_tokens:,}")
                    break
                rows = self.step(item)
                ended = self.tokens >= self.total_tokens
                if (
                    ended
                    or self.tokens // self.cfg.log.every_tokens > (self.tokens - rows) // self.cfg.log.every_tokens
                ):
                    last = self._metrics()
                    now = time.perf_counter()
                    last["perf/tokens_per_second"] = (self.tokens - tokens_logged) / (now - logged)
                    logged, tokens_logged = now, self.tokens
                    self.callbacks.call("on_log", self, last)
                self.callbacks.call("on_step_end", self)
            seconds = time.perf_counter() - started
            if self.steps == 0:
                raise DataError("the stream of activations is empty: expected at least one batch, found none")
            if self._evaluate is not None:
                self.callbacks.call("on_eval", self, self._evaluate())
            self.callbacks.call("on_end", self)
        finally:
            self.callbacks.close()
        return TrainingResult(self.saes, self.tokens, self.steps, (self.tokens - before) / seconds, last)

    def step(self, item: Item) -> int:
        """One optimizer step of every SAE on one batch; returns its number of rows."""
        rows = 0
        for name, part in self.in_training.items():
            batch = self._batch(item, name, part.sae)
            rows = len(batch.x)
            part.step(batch, self.tokens, self._schedule.factor(self.tokens, rows))
        self.steps += 1
        self.tokens += rows
        return rows

    def _batch(self, item: Item, name: str, sae: SAE) -> Batch:
        """What this SAE reads and is to reproduce, on its device."""
        geometry = sae.geometry
        if isinstance(item, Mapping):
            reads, writes = self._sites[name]
            x = self._rows_at(item, name, reads)
            item = x if geometry.same_site else Batch(x, self._rows_at(item, name, writes))
        elif isinstance(item, Tensor) and not geometry.same_site:
            raise DataError(
                f"SAE {name!r} is a {geometry.kind}: it needs what is to be reproduced beside what it reads, as "
                "Batch(x, y) or as a mapping from sites to rows"
            )
        x, y = (item.x, item.y) if isinstance(item, Batch) else (item, item)
        for what, rows, shape in (("rows", x, geometry.in_shape), ("a target", y, geometry.out_shape)):
            if rows.shape[1:] != shape or len(rows) != len(x):
                wanted = ", ".join(map(str, ("batch" if rows is x else len(x), *shape)))
                raise ShapeError(f"SAE {name!r} expects {what} of shape [{wanted}], found {list(rows.shape)}")
        if not len(x):
            raise DataError(f"SAE {name!r} was given an empty batch: expected at least one row")
        moved = x.to(sae.device, non_blocking=True)
        return Batch(moved, moved if y is x else y.to(sae.device, non_blocking=True))

    def _rows_at(self, item: Mapping[str, Tensor], name: str, sites: tuple[str, ...]) -> Tensor:
        missing = [site for site in sites or (None,) if site not in item]
        if missing:
            raise DataError(f"SAE {name!r} reads {missing[0]!r}, the batch holds {', '.join(map(repr, item))}")
        rows = [item[site] for site in sites]
        several = len(self.saes[name].geometry.in_shape) > 1
        return torch.stack(rows, dim=1) if several else rows[0]

    def _with_statistics(self) -> Iterator[Item]:
        """All batches, the first of which have already served each SAE for its normalisation and its start."""
        waiting = {name: part for name, part in self.in_training.items() if part.needs_sample}
        stream = iter(self._batches)
        if not waiting:
            return stream
        wanted = self.cfg.buffer.norm_estimate_tokens
        peek = getattr(self._batches, "peek", None)
        if peek is not None:
            samples = [peek(wanted)]
        else:
            samples = _first(stream, min(wanted, SAMPLE_ROWS))
            stream = itertools.chain(samples, stream)
        if not samples:
            return stream
        for name, part in waiting.items():
            batches = [self._batch(sample, name, part.sae) for sample in samples]
            x = torch.cat([batch.x for batch in batches]) if len(batches) > 1 else batches[0].x
            same = all(batch.y is batch.x for batch in batches)
            part.start_from(Batch(x, x if same else torch.cat([batch.y for batch in batches])))
        return stream

    def _metrics(self) -> dict[str, float | int]:
        """One row; with several SAEs each name is prefixed by the SAE's."""
        row: dict[str, float | int] = {"details/n_training_samples": self.tokens}
        row |= {f"data/{name}": count for name, count in getattr(self._batches, "counters", {}).items()}
        for name, part in self.in_training.items():
            metrics = part.metrics.take() | part.details
            if not metrics["losses/overall_loss"] < float("inf"):
                raise NonFiniteError(
                    f"SAE {name!r} diverged: its loss became {metrics['losses/overall_loss']} within the "
                    f"{self.steps:,} steps ({self.tokens:,} tokens) so far. A lower optim.lr or a longer warm-up "
                    "usually helps"
                )
            row |= {key if len(self.in_training) == 1 else f"{name}/{key}": value for key, value in metrics.items()}
        return row


def _first(stream: Iterator[Item], rows: int) -> list[Item]:
    """The first items of a stream, at least so many rows together."""
    taken: list[Item] = []
    count = 0
    while count < rows and (item := next(stream, None)) is not None:
        taken.append(item)
        values = item.x if isinstance(item, Batch) else item if isinstance(item, Tensor) else next(iter(item.values()))
        count += len(values)
    return taken
