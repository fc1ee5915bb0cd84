"""Observers of a run. The trainer calls them in order and knows none by name.

A failing observer must not cost the run: it warns once and is dropped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kit import config as trees

if TYPE_CHECKING:
    from sae_kit.training.config import WandbConfig
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)
Metrics = Mapping[str, float | int | None]


class Callback:
    """Base with every event as a no-op; the trainer is passed for reading."""

    def on_start(self, trainer: SAETrainer) -> None: ...
    def on_step_end(self, trainer: SAETrainer) -> None: ...
    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None: ...
    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None: ...
    def on_end(self, trainer: SAETrainer) -> None: ...
    def close(self) -> None:
        """Release files and bars; called once, after an error too."""


class Console(Callback):
    """A progress bar on a terminal or in a notebook; elsewhere one line for every row of metrics."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_start(self, trainer: SAETrainer) -> None:
        import sys

        from tqdm.auto import tqdm

        if sys.stderr.isatty() or "ipykernel" in sys.modules:
            self._bar = tqdm(
                total=trainer.total_tokens,
                initial=trainer.tokens,
                unit="tok",
                unit_scale=True,
                desc="training",
                smoothing=0.05,
                dynamic_ncols=True,
            )

    def on_step_end(self, trainer: SAETrainer) -> None:
        if self._bar is not None:
            self._bar.update(trainer.tokens - self._bar.n)

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        shown = _headline(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
        else:
            speed = metrics.get("perf/tokens_per_second", 0.0)
            log.info(
                "%s / %s tokens  %s  %.0f tokens/s", f"{trainer.tokens:,}", f"{trainer.total_tokens:,}", shown, speed
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _headline(metrics: Metrics) -> str:
    """The four numbers that tell whether a run is well, of the first SAE."""
    wanted = {"losses/overall_loss": "loss", "metrics/l0": "L0", "metrics/explained_variance": "EV"}
    wanted["sparsity/dead_features"] = "dead"
    found = {}
    for name, value in metrics.items():
        for suffix, label in wanted.items():
            if name.endswith(suffix):
                found.setdefault(label, f"{label} {value:.4g}")
    return "  ".join(found.values())


class JSONL(Callback):
    """Every row of metrics as one line of JSON, written through at once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = time.time()

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._write(trainer, metrics)

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._write(trainer, metrics)

    def _write(self, trainer: SAETrainer, metrics: Metrics) -> None:
        finite = {name: v if v is not None and math.isfinite(v) else None for name, v in metrics.items()}
        row = {"step": trainer.steps, "tokens": trainer.tokens, "time": round(time.time() - self._start, 3), **finite}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


class Wandb(Callback):
    """Weights & Biases with tokens on the x axis. Imported only when used."""

    def __init__(self, cfg: WandbConfig, folder: Path, name: str) -> None:
        import wandb

        self._wandb = wandb
        self._cfg, self._folder, self._name = cfg, folder, name
        self._run: Any = None

    def on_start(self, trainer: SAETrainer) -> None:
        self._run = self._wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            name=self._cfg.name or self._name,
            group=self._cfg.group,
            tags=list(self._cfg.tags),
            mode=self._cfg.mode,
            dir=str(self._folder),
            config=trees.unstructure(trainer.cfg),
        )
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._run.log({"tokens": trainer.tokens, **metrics})

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._run.log({"tokens": trainer.tokens, **metrics})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._wandb.teardown()  # without it the last rows of an offline run are missing from its file
            self._run = None


class Callbacks:
    """Calls each observer in order; one that fails is reported, closed and dropped."""

    def __init__(self, callbacks: list[Callback]) -> None:
        self._callbacks = list(callbacks)

    def call(self, event: str, *args: Any) -> None:
        for callback in list(self._callbacks):
            try:
                getattr(callback, event)(*args)
            except Exception:  # whatever it is, an observer must not cost the run
                log.warning(
                    "%s failed in %s and is switched off; the run goes on",
                    type(callback).__name__,
                    event,
                    exc_info=True,
                )
                self._callbacks.remove(callback)
                if event != "close":
                    with contextlib.suppress(Exception):
                        callback.close()

    def close(self) -> None:
        self.call("close")
