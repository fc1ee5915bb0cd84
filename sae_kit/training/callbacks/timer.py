"""Where the time of a run goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_kit.training.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer


class Timer(Callback):
    """Adds to each row the seconds since the last one that went into waiting for rows and into steps, and the memory.

    The device is waited for where a row is logged, and nowhere else. Logging, evaluating and saving count as neither.
    Forwards of the language model are part of the waiting, or run beside the steps where rows are made ahead.
    """

    def __init__(self) -> None:
        self._wait = self._step = self._lm = 0.0
        self._since: float | None = None
        self._began: float | None = None

    def on_start(self, trainer: SAETrainer) -> None:
        self._since = time.perf_counter()

    def on_step_start(self, trainer: SAETrainer) -> None:
        self._began = time.perf_counter()
        if self._since is not None:
            self._wait += self._began - self._since

    def metrics(self, trainer: SAETrainer) -> Metrics:
        devices = {sae.device for sae in trainer.saes.values() if sae.device.type == "cuda"}
        for device in devices:
            torch.cuda.synchronize(device)
        self._end_of_step()
        row = {"perf/wait_seconds": self._wait, "perf/step_seconds": self._step}
        self._wait = self._step = 0.0
        if (lm := getattr(trainer.batches, "lm_seconds", None)) is not None:
            row["perf/lm_seconds"] = lm - self._lm
            self._lm = lm
        peak = sum(torch.cuda.max_memory_allocated(device) for device in devices) if devices else _peak_of_process()
        return row if peak is None else row | {"perf/peak_memory_gib": peak / 2**30}

    def on_step_end(self, trainer: SAETrainer) -> None:
        self._end_of_step()
        self._since = time.perf_counter()

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._since = time.perf_counter()

    def on_checkpoint(self, trainer: SAETrainer, path: Path) -> None:
        self._since = time.perf_counter()

    def _end_of_step(self) -> None:
        if self._began is not None:
            self._step += time.perf_counter() - self._began
            self._began = None


def _peak_of_process() -> int | None:
    """Bytes that the process has had in memory at most; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
