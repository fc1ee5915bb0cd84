"""Observers of a run. The trainer calls them in order and knows none by name.

A failing observer must not cost the run: it warns once and is dropped. One whose work the run stands for (a checkpoint,
an evaluation, an early stop) is `essential`, and its errors end the run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_kit.training.callbacks.base import Callback, Callbacks, Metrics
from sae_kit.training.callbacks.console import Console
from sae_kit.training.callbacks.early_stop import EarlyStop
from sae_kit.training.callbacks.rows import CSV, JSONL, read_metrics
from sae_kit.training.callbacks.timer import Timer
from sae_kit.training.callbacks.wandb import Wandb, histograms

if TYPE_CHECKING:
    from sae_kit.training.config import RunConfig

__all__ = [
    "CSV",
    "JSONL",
    "Callback",
    "Callbacks",
    "Console",
    "EarlyStop",
    "Metrics",
    "Timer",
    "Wandb",
    "configured_callbacks",
    "histograms",
    "read_metrics",
]


def configured_callbacks(cfg: RunConfig, folder: Path) -> list[Callback]:
    """The callbacks that a config asks for, those that write going to `folder`."""
    found: list[Callback] = [Timer()]
    if cfg.log.console:
        found.append(Console())
    if cfg.log.jsonl:
        found.append(JSONL(folder / "metrics.jsonl"))
    if cfg.log.csv:
        found.append(CSV(folder / "metrics.csv"))
    if cfg.log.wandb is not None:
        found.append(Wandb(cfg.log.wandb, folder, folder.name, with_histograms=cfg.log.histograms))
    if cfg.train.early_stop is not None:
        found.append(EarlyStop(cfg.train.early_stop))
    return found
