"""An end before the end: where a metric has stopped improving."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from sae_kit.data.batch import State
from sae_kit.errors import ConfigError, did_you_mean
from sae_kit.training.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)

HIGHER_IS_BETTER = ("explained_variance", "cosine_similarity", "cossim", "score", "frac_alive")
LOWER_IS_BETTER = ("loss", "fvu", "nmse", "mse", "mse_per_dim", "kl_div_with_sae", "ce_loss_with_sae")
LOWER_IS_BETTER += ("dead_features", "dead_fraction", "dead_latents")


@dataclass(frozen=True, kw_only=True)
class EarlyStopConfig:
    """When to stop before the tokens are used up."""

    metric: str
    """name of a logged or held-out metric, e.g. metrics/explained_variance, without the name of an SAE"""
    patience: int = 5
    """so many rows of this metric one after the other without improvement end the run"""
    min_delta: float = 0.0
    """a change that is no larger is no improvement"""
    mode: Literal["auto", "min", "max"] = "auto"
    """whether lower or higher is better; auto = known for losses, variances and scores"""

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ConfigError(f"patience must be at least 1, found {self.patience}")
        if not 0 <= self.min_delta < math.inf:
            raise ConfigError(f"min_delta must be at least 0, found {self.min_delta}")
        if self.mode == "auto" and better(self.metric) is None:
            raise ConfigError(f"mode: whether a lower or a higher {self.metric} is better is not known: say min or max")


def better(metric: str) -> Literal["min", "max"] | None:
    """Which way a metric improves, by the end of its name; None where nothing is known."""
    name = metric.rpartition("/")[2]
    if name.endswith(HIGHER_IS_BETTER):
        return "max"
    return "min" if name.endswith(LOWER_IS_BETTER) else None


class EarlyStop(Callback):
    """Ends the run when its metric has not improved for `patience` rows; with several SAEs, that of each of them."""

    essential: ClassVar[bool] = True

    def __init__(self, cfg: EarlyStopConfig) -> None:
        self._cfg = cfg
        self._sign = 1.0 if (better(cfg.metric) if cfg.mode == "auto" else cfg.mode) == "max" else -1.0
        self._best: dict[str, float] = {}
        self._waited: dict[str, int] = {}

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._see(trainer, metrics, is_kind=not self._cfg.metric.startswith("evals/"))

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._see(trainer, metrics, is_kind=self._cfg.metric.startswith("evals/"))

    def state_dict(self) -> State:
        return {"best": dict(self._best), "waited": dict(self._waited)}

    def load_state_dict(self, state: State) -> None:
        self._best, self._waited = dict(state["best"]), dict(state["waited"])

    def _see(self, trainer: SAETrainer, metrics: Metrics, *, is_kind: bool) -> None:
        wanted = {self._cfg.metric, *(f"{name}/{self._cfg.metric}" for name in trainer.saes)}
        found = {name: value for name, value in metrics.items() if name in wanted}
        if not found and is_kind:
            known = {name.removeprefix(f"{sae}/") for name in metrics for sae in trainer.saes}
            raise ConfigError(
                f"early_stop.metric: {self._cfg.metric!r} is not among the metrics of this run."
                f"{did_you_mean(self._cfg.metric, known)} Known: {', '.join(sorted(known)) or 'none'}"
            )
        for name, value in found.items():
            score = self._sign * value if value is not None and math.isfinite(value) else -math.inf
            if score > self._best.get(name, -math.inf) + self._cfg.min_delta:
                self._best[name], self._waited[name] = score, 0
            else:
                self._waited[name] = self._waited.get(name, 0) + 1
        is_over = trainer.tokens >= trainer.total_tokens
        if found and not is_over and all(self._waited[name] >= self._cfg.patience for name in found):
            best = ", ".join(f"{name} {self._sign * self._best[name]:.4g}" for name in found if name in self._best)
            reason = f"{self._cfg.metric} has not improved for {self._cfg.patience} rows; best: {best or 'none'}"
            log.info("stopping at %s tokens: %s", f"{trainer.tokens:,}", reason)
            trainer.callbacks.stop(reason)
