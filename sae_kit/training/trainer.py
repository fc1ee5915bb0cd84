"""The training loop: one pass over batches, any number of SAEs.

A step of each SAE is in `part.py`. Here the loop waits for the device only where metrics are logged.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sae_kit.data.batch import Batch, State
from sae_kit.devices import kernels, pick_device
from sae_kit.errors import ConfigError, DataError, NonFiniteError, ShapeError, did_you_mean
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback, Callbacks, Console
from sae_kit.training.config import RunConfig
from sae_kit.training.optim import OptimizerFactory
from sae_kit.training.part import OwnLoss, SAEInTraining
from sae_kit.training.workers import Workers, at_a_time

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
    """of this fit, from its first row asked for to its last step; evaluating and saving left out"""
    metrics: dict[str, float | int]
    """the last row that was logged"""
    status: dict[str, Literal["trained", "failed"]]
    """of each SAE; one that failed has the weights that were finite last"""
    stopped: str | None = None
    """why a callback ended it before its time"""


class SAETrainer:
    """Trains one SAE, or a mapping of them, on an iterator of activations.

    `batches` yields tensors [batch, *in_shape], mappings from site to [batch, width] (each SAE takes the sites of its
    entry, or those in its metadata), or `Batch(x, y)`. `evaluate` is called after the last step, and
    what it returns is handed to the callbacks. `optimizer` makes another optimizer than `cfg` says, of the parameter
    groups of each SAE, or of those that a mapping names, and `loss` adds terms of your own: fn(sae, batch, run) ->
    {name: scalar}, where `batch` holds raw rows and `run` what a pass made of them. Of `cfg` only deterministic, saes,
    optim, schedule, train, log and buffer.norm_estimate_tokens are read here.

    `state_dict()`, the tensors of the SAEs and the state of the batches are together all that a run is: new objects
    that are given them go on bit for bit.
    """

    def __init__(
        self,
        cfg: RunConfig,
        saes: SAE | Mapping[str, SAE],
        batches: Iterable[Item],
        *,
        callbacks: Sequence[Callback] | None = None,
        evaluate: Callable[[], Mapping[str, float | None]] | None = None,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
        loss: OwnLoss | None = None,
    ) -> None:
        self.cfg = cfg
        self.saes: dict[str, SAE] = {"sae": saes} if isinstance(saes, SAE) else dict(saes)
        if not self.saes:
            raise ConfigError("there is no SAE to train: pass one, or a mapping from names to SAEs")
        for (one, sae), (other, same) in itertools.combinations(self.saes.items(), 2):
            if sae is same:
                raise ConfigError(f"{one!r} and {other!r} are one SAE: train it under one name, or pass a copy")
        self.steps = 0
        self.tokens = 0
        self.row: dict[str, float | int] = {}
        """the row of metrics that is logged, or was last"""
        self.total_tokens = cfg.train.tokens // cfg.train.batch_tokens * cfg.train.batch_tokens
        self.callbacks = Callbacks([Console()] if callbacks is None and cfg.log.console else list(callbacks or ()))
        self.batches = batches
        device = pick_device(cfg.train.device, "train.device")
        self._evaluate = evaluate
        self._sites = {
            name: cfg.saes[name].sites if name in cfg.saes else sae.cfg.metadata.sites
            for name, sae in self.saes.items()
        }
        optimizers = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(self.saes, optimizer)
        if unknown := optimizers.keys() - self.saes.keys():
            name = min(unknown)
            raise ConfigError(
                f"optimizer: there is no SAE {name!r} in this run, it has {', '.join(self.saes)}."
                f"{did_you_mean(name, self.saes)}"
            )
        self.in_training = {
            name: SAEInTraining(cfg, name, sae.to(device), optimizer=optimizers.get(name), loss=loss)
            for name, sae in self.saes.items()
        }
        self._workers: Workers | None = None
        # Only what is our own is known to bear threads.
        listens = any(type(callback).on_gradients is not Callback.on_gradients for callback in self.callbacks)
        own = listens or loss is not None or any(factory is not None for factory in optimizers.values())
        self.at_a_time = 1 if own or cfg.train.compile is not None else at_a_time(len(self.saes), device)
        """SAEs whose steps are made side by side"""

    def fit(self, tokens: int | None = None) -> TrainingResult:
        """Train until `train.tokens`, the end of the batches, or `callbacks.stop`, whichever comes first.

        With `tokens` the steps that reach so many more: a stage, after which another call goes on.

        Raises:
            DataError: no batch came at all. ShapeError: rows of another width. NonFiniteError: training diverged.
        """
        with kernels(tf32=self.cfg.train.tf32, deterministic=self.cfg.deterministic):
            return self._fit(self.total_tokens if tokens is None else min(self.tokens + tokens, self.total_tokens))

    def _fit(self, end: int) -> TrainingResult:
        self.row = {}
        started = logged = time.perf_counter()  # filling the buffer is part of the work
        before = tokens_logged = self.tokens
        every = self.cfg.log.every_tokens
        try:
            self.callbacks.call("on_start", self)
            stream = self._with_statistics()
            while self.tokens < end and self.callbacks.stop_reason is None:
                item = next(stream, None)
                if item is None:
                    log.warning("the data ended after %s of %s tokens", f"{self.tokens:,}", f"{end:,}")
                    break
                self.callbacks.call("on_step_start", self)
                rows = self.step(item)
                if self.tokens >= self.total_tokens or self.tokens // every > (self.tokens - rows) // every:
                    self.row = self._metrics()
                    now = time.perf_counter()
                    self.row["perf/tokens_per_second"] = (self.tokens - tokens_logged) / (now - logged)
                    logged, tokens_logged = now, self.tokens
                    added = self.callbacks.metrics(self)
                    self.row |= {name: value for name, value in added.items() if value is not None}
                    self.callbacks.call("on_log", self, self.row)
                    self._stop_diverged()
                trained = time.perf_counter()
                self.callbacks.call("on_step_end", self)
                aside = time.perf_counter() - trained
                started, logged = started + aside, logged + aside
            seconds = time.perf_counter() - started
            if self.steps == 0:
                raise DataError("the stream of activations is empty: expected at least one batch, found none")
            if self._evaluate is not None and (row := self._evaluate()):
                self.callbacks.call("on_eval", self, row)
            self.callbacks.call("on_end", self)
        except BaseException as error:
            self.callbacks.call("on_exception", self, error)
            raise
        finally:
            self.callbacks.close()
            if self._workers is not None:
                self._workers.close()
                self._workers = None
        return TrainingResult(
            self.saes,
            self.tokens,
            self.steps,
            (self.tokens - before) / seconds,
            self.row,
            {name: "failed" if part.failed else "trained" for name, part in self.in_training.items()},
            self.callbacks.stop_reason,
        )

    def step(self, item: Item) -> int:
        """One optimizer step of every SAE on one batch; returns its number of rows.

        The event `on_gradients` comes once for each SAE: the one that has gradients then.
        """
        rows, shared = 0, dict[Any, Batch]()  # SAEs of the same sites have one batch, and what is found of it once
        steps: list[Callable[[], None]] = []
        for name, part in self.in_training.items():
            geometry = part.sae.geometry
            key = (self._sites[name], geometry.in_shape, geometry.out_shape, geometry.same_site)
            if key not in shared:
                shared[key] = self._batch(item, name, part.sae)
            rows = len(shared[key].x)
            if not part.failed:
                steps.append(partial(part.step, shared[key], self.tokens, on_gradients=self._on_gradients))
        if self.at_a_time == 1:
            for step in steps:
                step()
        else:
            self._workers = self._workers or Workers(self.at_a_time)
            self._workers.run(steps)
        self.steps += 1
        self.tokens += rows
        return rows

    def _on_gradients(self) -> None:
        self.callbacks.call("on_gradients", self)

    def state_dict(self) -> State:
        """What the trainer needs to go on after this step, as JSON values and tensors."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "saes": {name: part.state_dict() for name, part in self.in_training.items()},
            "callbacks": self.callbacks.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from there, with the SAEs and the batches as they were then.

        Raises:
            ConfigError: the state is of other SAEs, or of others of their settings.
        """
        if state["saes"].keys() != self.in_training.keys():
            raise ConfigError(f"the state is of SAEs {', '.join(state['saes'])}, found {', '.join(self.in_training)}")
        for name, part in self.in_training.items():
            try:
                part.load_state_dict(state["saes"][name])
            except ConfigError as error:
                raise ConfigError(f"SAE {name!r}: {error}") from error
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])
        self.callbacks.load_state_dict(state["callbacks"])

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
        # Only to CUDA is memory that is given back waited for: elsewhere a copy under way would read what comes next.
        asynchronous = sae.device.type == "cuda"
        moved = x.to(sae.device, non_blocking=asynchronous)
        return Batch(moved, moved if y is x else y.to(sae.device, non_blocking=asynchronous))

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
        stream = iter(self.batches)
        if not waiting:
            return stream
        wanted = self.cfg.buffer.norm_estimate_tokens
        peek = getattr(self.batches, "peek", None)
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
        """One row; with several SAEs each name is prefixed by the SAE's. Those that failed are left out."""
        row: dict[str, float | int] = {"details/n_training_samples": self.tokens}
        row |= {f"data/{name}": count for name, count in getattr(self.batches, "counters", {}).items()}
        for name, part in self.in_training.items():
            prefix = "" if len(self.in_training) == 1 else f"{name}/"
            if not part.failed:
                row |= {f"{prefix}{key}": value for key, value in part.row().items()}
        return row

    def _stop_diverged(self) -> None:
        """Freeze SAEs whose last steps were all skipped.

        Raises:
            NonFiniteError: none is left, or the run is to stop.
        """
        stop = self.cfg.train.nonfinite == "stop" or (self.cfg.train.nonfinite == "auto" and len(self.in_training) == 1)
        for name, part in self.in_training.items():
            if part.failed or not part.health.diverged:
                continue
            part.failed = True
            message = (
                f"SAE {name!r} diverged by step {self.steps:,} ({self.tokens:,} tokens): {part.health.report()}. "
                "A lower optim.lr or a longer warm-up usually helps"
            )
            if stop or all(other.failed for other in self.in_training.values()):
                raise NonFiniteError(message)
            log.warning("%s. It is frozen with its last finite weights; the others go on", message)


def _first(stream: Iterator[Item], rows: int) -> list[Item]:
    """The first items of a stream, at least so many rows together."""
    taken: list[Item] = []
    count = 0
    while count < rows and (item := next(stream, None)) is not None:
        taken.append(item)
        values = item.x if isinstance(item, Batch) else item if isinstance(item, Tensor) else next(iter(item.values()))
        count += len(values)
    return taken
