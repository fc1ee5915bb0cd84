"""What a run shows while it runs."""

from __future__ import annotations

import logging
import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sae_kit.training.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)

HEADLINE = {
    "losses/overall_loss": "loss",
    "metrics/l0": "L0",
    "metrics/explained_variance": "EV",
    "sparsity/dead_features": "dead",
}
"""The four numbers that tell whether a run is well."""


class Console(Callback):
    """A progress bar on a terminal or in a notebook; elsewhere one line for every row of metrics.

    Of several SAEs each number is shown from the smallest to the largest.
    """

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
                desc="training" if len(trainer.saes) == 1 else f"training {len(trainer.saes)} SAEs",
                smoothing=0.05,
                dynamic_ncols=True,
            )

    def on_step_end(self, trainer: SAETrainer) -> None:
        if self._bar is not None:
            self._bar.update(trainer.tokens - self._bar.n)

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        shown = headline(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(shown)
            return
        speed = metrics.get("perf/tokens_per_second") or 0.0
        left = str(timedelta(seconds=round((trainer.total_tokens - trainer.tokens) / speed))) if speed else "?"
        done = f"{trainer.tokens:,}", f"{trainer.total_tokens:,}"
        log.info("%s / %s tokens  %s  %.0f tokens/s  ETA %s", *done, shown, speed, left)

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        score = _span(metrics, "model_performance_preservation/ce_loss_score")
        variance = _span(metrics, "reconstruction_quality/explained_variance")
        found = [f"{label} {value}" for label, value in (("EV", variance), ("CE score", score)) if value]
        if found and self._bar is not None:
            self._bar.write(f"held out at {trainer.tokens:,} tokens: {'  '.join(found)}")
        elif found:
            log.info("held out at %s tokens: %s", f"{trainer.tokens:,}", "  ".join(found))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def headline(metrics: Metrics) -> str:
    """`loss 0.12  L0 32  EV 0.81  dead 4`; of several SAEs `loss 0.12–0.31  L0 32  EV 0.61–0.81  dead 0–4`."""
    found = {label: _span(metrics, name) for name, label in HEADLINE.items()}
    return "  ".join(f"{label} {value}" for label, value in found.items() if value)


def _span(metrics: Metrics, name: str) -> str:
    """Smallest and largest value of a metric over all SAEs; empty if there is none."""
    all_of = [value for key, value in metrics.items() if key == name or key.endswith(f"/{name}")]
    values = [value for value in all_of if value is not None]
    finite = [value for value in values if math.isfinite(value)]
    shown = [f"{value:.4g}" for value in ([min(finite), max(finite)] if finite else values[:1])]
    return "–".join(dict.fromkeys(shown)) + (" (and nan)" if finite and len(finite) < len(values) else "")
