"""The training loop: one pass over batches, any number of SAEs.

A step, for each SAE: rates and coefficients from the tokens seen → losses → backward → decoder projection → clip →
Adam → constraints → metrics. It waits for the device only where metrics are logged, and where AuxK renews its list of
dead latents.
"""

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_kit.config import resolve_tokens
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError, DataError, NonFiniteError, ShapeError
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback, Callbacks, Console
from sae_kit.training.config import RunConfig
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses, training_pass
from sae_kit.training.metrics import TrainingMetrics
from sae_kit.training.optim import (
    clip_gradients,
    clipped_parameters,
    project_decoder_gradient,
    set_learning_rate,
)
from sae_kit.training.schedules import linear_warm_up

log = logging.getLogger(__name__)

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

    `batches` yields tensors [batch, d_in], mappings from site to such tensors (each SAE takes the site of its entry's
    `hook`, or the one in its `cfg.metadata.hook_name`), or `Batch(x, y)`. `evaluate` is called after the last step, and
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
        device = pick_device(cfg.train.device)
        self._evaluate = evaluate
        self._sites = {
            name: cfg.saes[name].hook if name in cfg.saes else sae.cfg.metadata.hook_name
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
        if isinstance(item, Mapping):
            site = self._sites[name]
            if site is None or site not in item:
                raise DataError(f"SAE {name!r} reads {site!r}, the batch holds {', '.join(map(repr, item))}")
            item = item[site]
        x, y = (item.x, item.y) if isinstance(item, Batch) else (item, item)
        if x.ndim != 2 or x.shape[1] != sae.d_in:
            raise ShapeError(f"SAE {name!r} expects rows of shape [batch, {sae.d_in}], found {list(x.shape)}")
        if y.shape != x.shape:
            raise ShapeError(
                f"SAE {name!r} reproduces rows of shape {list(x.shape)}, found a target of {list(y.shape)}"
            )
        return Batch(x.to(sae.device, non_blocking=True), y.to(sae.device, non_blocking=True))

    def _with_statistics(self) -> Iterator[Item]:
        """All batches, the first of which have already served each SAE to estimate its normalisation."""
        waiting = {name: part.sae for name, part in self.in_training.items() if part.sae.norm_in.needs_estimate}
        stream = iter(self._batches)
        if waiting:
            peek = getattr(self._batches, "peek", None)
            if peek is not None:
                sample = peek(self.cfg.buffer.norm_estimate_tokens)
            else:
                sample = next(stream, None)
                if sample is None:
                    return stream
                stream = itertools.chain([sample], stream)
            for name, sae in waiting.items():
                sae.norm_in.estimate(self._batch(sample, name, sae).x)
        return stream

    def _metrics(self) -> dict[str, float | int]:
        """One row; with several SAEs each name is prefixed by the SAE's."""
        row: dict[str, float | int] = {"details/n_training_samples": self.tokens}
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


class SAEInTraining:
    """One SAE with its optimizer, counters and metrics."""

    def __init__(self, cfg: RunConfig, name: str, sae: SAE) -> None:
        total = cfg.train.tokens
        entry = cfg.saes.get(name)
        optim = cfg.optim if entry is None or entry.lr is None else dataclasses.replace(cfg.optim, lr=entry.lr)
        self.sae = sae
        self.optimizer = optim.build(sae)
        self.clip = optim.clip_grad_norm
        self.dead = DeadLatents(sae, dead_after(sae, cfg), listed=sae.cfg.aux_coefficient > 0)
        self.metrics = TrainingMetrics(sae, self.dead, cfg.train.density_window_tokens)
        self.details: dict[str, float] = {}
        self._clipped = clipped_parameters(sae)
        self._coefficients = {
            key: (c.value, resolve_tokens(c.warm_up, total, f"{key}_warm_up_tokens"))
            for key, c in sae.cfg.coefficients().items()
        }

    def step(self, batch: Batch, tokens: int, lr_factor: float) -> None:
        """One step on `batch`, after `tokens` rows; `lr_factor` scales the learning rates."""
        sae = self.sae
        lr = set_learning_rate(self.optimizer, lr_factor)
        coefficients = {
            key: value * linear_warm_up(tokens, length) for key, (value, length) in self._coefficients.items()
        }
        run = training_pass(sae, batch)
        self.dead.observe(run.encoding.codes.detach(), len(batch.x), tokens)
        terms = training_losses(sae, run, coefficients, self.dead)
        torch.stack(list(terms.values())).sum().backward()
        project_decoder_gradient(sae)
        grad_norm = clip_gradients(self._clipped, self.clip)
        self.optimizer.step()
        sae.restore_constraints()
        self.optimizer.zero_grad(set_to_none=True)
        self.metrics.update(run, terms, batch.y, grad_norm, self.clip)
        self.details = {"details/current_learning_rate": lr}
        self.details |= {f"details/{key}_coefficient": value for key, value in coefficients.items()}

    def dead_fraction(self) -> float:
        """Share of latents that have been silent for `dead_after_tokens` of training."""
        return self.dead.mask().double().mean().item()


def dead_after(sae: SAE, cfg: RunConfig) -> int:
    """Tokens of silence after which a latent counts as dead."""
    wanted = sae.cfg.dead_after_tokens if sae.cfg.dead_after_tokens is not None else cfg.train.dead_after_tokens
    if wanted is None:
        return max(min(10_000_000, cfg.train.tokens // 10), 1)
    return max(resolve_tokens(wanted, cfg.train.tokens, "dead_after_tokens"), 1)


def pick_device(name: str) -> torch.device:
    """`auto` is cuda where there is one, else cpu: statistics are in float64, which mps lacks.

    Raises:
        ConfigError: no such device.
    """
    cuda = torch.cuda.is_available()
    try:
        device = torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"train.device: {name!r} is not a device; use auto, cpu, cuda or cuda:1") from error
    if device.type == "cuda" and not cuda:
        raise ConfigError(f"train.device: {name!r} was asked for, but this torch finds no cuda device")
    return device
