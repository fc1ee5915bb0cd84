"""Saving the whole of a run while it trains: at its times, when a signal asks for an end, when an SAE diverges."""

import logging
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from sae_kit import config as trees
from sae_kit.data.batch import State
from sae_kit.data.store import ActivationsStore, without_rows
from sae_kit.errors import ConfigError, DiskFullError, NonFiniteError, TrainingInterrupted, did_you_mean
from sae_kit.training.callbacks import Callback, Metrics
from sae_kit.training.callbacks.early_stop import better
from sae_kit.training.checkpoint import write_checkpoint
from sae_kit.training.checkpoint_times import CheckpointConfig

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)


class Saving(Callback):
    """Writes checkpoints into the folder of a run.

    The first of the signals that the config names lets the step end, saves and raises `TrainingInterrupted`; a second
    one acts as it would without us. On a full disk training goes on, with the checkpoints that there are, and says so
    in every row of metrics.
    """

    essential: ClassVar[bool] = True

    def __init__(self, cfg: CheckpointConfig, folder: Path, store: ActivationsStore) -> None:
        self._cfg, self._folder, self._store = cfg, folder, store
        self._seen = 0
        self._saved_at = time.monotonic()
        self._missing = 0
        self._score: float | None = None
        """of the last row of metrics, higher is better"""
        self._best: tuple[float, int] | None = None
        """score and rows of the best checkpoint"""
        self._signal: int | None = None
        self._handlers: dict[int, Any] = {}

    def on_start(self, trainer: "SAETrainer") -> None:
        self._seen, self._saved_at = trainer.tokens, time.monotonic()
        self._times = self._cfg.build(trainer.cfg.train.tokens, trainer.cfg.train.batch_tokens)
        if threading.current_thread() is threading.main_thread():
            for name in self._cfg.signals:
                number = signal.Signals[name]
                self._handlers[number] = signal.signal(number, self._caught)

    def on_step_end(self, trainer: "SAETrainer") -> None:
        before, self._seen = self._seen, trainer.tokens
        if self._signal is not None:
            path = self.save(trainer, milestone=self._times.stays(before, trainer.tokens))
            raise TrainingInterrupted(self._signal, trainer.steps, trainer.tokens, path, self._folder)
        minutes = (time.monotonic() - self._saved_at) / 60
        if self._times.due(before, trainer.tokens, minutes):
            self.save(trainer, milestone=self._times.stays(before, trainer.tokens))

    def on_log(self, trainer: "SAETrainer", metrics: Metrics) -> None:
        self._rate(trainer, metrics, held_out=False)

    def on_eval(self, trainer: "SAETrainer", metrics: Metrics) -> None:
        self._rate(trainer, metrics, held_out=True)

    def state_dict(self) -> State:
        return {} if self._best is None else {"best": list(self._best)}

    def load_state_dict(self, state: State) -> None:
        score, tokens = state["best"]
        self._best = (score, tokens)

    def on_exception(self, trainer: "SAETrainer", error: BaseException) -> None:
        diverged = any(part.failed for part in trainer.in_training.values())  # the stream has such errors, too
        if isinstance(error, NonFiniteError) and diverged:
            path = self.save(trainer, label="nonfinite")
            log.warning("the state in which it diverged is in %s", path)

    def metrics(self, trainer: "SAETrainer") -> Metrics:
        return {"checkpoint/missing_bytes": self._missing} if self._missing else {}

    def close(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def deliver(self) -> None:
        """Let a signal act that came after the last step: the run is complete, but who runs it was asked to stop."""
        if self._signal is not None:
            signal.raise_signal(self._signal)

    def save(self, trainer: "SAETrainer", *, milestone: bool = False, label: str = "") -> Path | None:
        if not label and self._score is not None and (self._best is None or self._score > self._best[0]):
            self._best = (self._score, trainer.tokens)
        place, rows = without_rows(self._store.state_dict())
        try:
            path = write_checkpoint(
                self._folder,
                saes=trainer.saes,
                state={"trainer": trainer.state_dict(), "stream": place},
                buffer=rows if self._cfg.buffer == "save" else None,
                run={"config": trees.unstructure(trainer.cfg), "steps": trainer.steps},
                tokens=trainer.tokens,
                milestone=milestone,
                keep=self._cfg.keep,
                best=None if self._best is None else self._best[1],
                label=label,
            )
        except DiskFullError as error:
            log.warning("%s; training goes on, and could go on from the checkpoint before", error)
            self._missing = max(error.needed - error.free, 1)
            return None
        self._saved_at, self._missing = time.monotonic(), 0
        trainer.callbacks.call("on_checkpoint", trainer, path)
        return path

    def _rate(self, trainer: "SAETrainer", metrics: Metrics, *, held_out: bool) -> None:
        """Take the score of the next checkpoint from a row, if this is the kind of rows that its metric is in."""
        wanted = self._cfg.best
        if wanted is None or wanted.startswith("evals/") != held_out:
            return
        names = (wanted, *(f"{sae}/{wanted}" for sae in trainer.saes))
        found = [metrics[name] for name in names if name in metrics]
        if not found:
            known = {name.removeprefix(f"{sae}/") for name in metrics for sae in trainer.saes}
            raise ConfigError(
                f"checkpoint.best: {wanted!r} is not among the logged metrics.{did_you_mean(wanted, known)}"
            )
        values = [value for value in found if value is not None]
        self._score = None if not values else (1 if better(wanted) == "max" else -1) * sum(values) / len(values)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal = number
            log.warning(
                "%s: the step ends, then the run is saved; once more ends it at once", signal.Signals(number).name
            )
            return
        self.close()
        signal.raise_signal(number)
