"""Evaluation on held-out text while a run trains and when it is over: the same rows, the same numbers, nothing changed.

An SAE is evaluated in the form in which it would be used: a copy, with averaged weights if there are such.
"""

from collections.abc import Mapping
from typing import ClassVar

from sae_kit.data.store import ActivationsStore
from sae_kit.errors import ConfigError
from sae_kit.evals import Metrics
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback
from sae_kit.training.config import RunConfig
from sae_kit.training.inputs import LiveInputs
from sae_kit.training.saving import Saving
from sae_kit.training.trainer import SAETrainer


class Evaluate(Callback):
    """Evaluates the SAEs of a run every `eval.every_tokens` rows, and hands what it finds to `on_eval` as one row.

    SAEs that diverged are left out. An evaluation that fails ends the run, after a checkpoint.
    """

    essential: ClassVar[bool] = True

    def __init__(self, cfg: RunConfig, live: LiveInputs, store: ActivationsStore, saving: Saving) -> None:
        """On the rows that `live` holds out, while `store` reads nothing ahead."""
        self.found: dict[str, Metrics] = {}
        """of the last evaluation, by SAE"""
        self._live, self._store, self._saving = live, store, saving
        self._every = cfg.eval.interval(cfg.train.tokens)
        self._at_end = cfg.eval.at_end
        self._seen, self._evaluated = 0, -1

    def on_start(self, trainer: SAETrainer) -> None:
        self._seen = trainer.tokens

    def on_step_end(self, trainer: SAETrainer) -> None:
        before, self._seen = self._seen, trainer.tokens
        is_over = trainer.tokens >= trainer.total_tokens or trainer.callbacks.stop_reason is not None
        is_due = self._every is not None and trainer.tokens // self._every > before // self._every
        if not is_due or (is_over and self._at_end):
            return
        try:
            saes = {name: part.for_use().to_inference() for name, part in trainer.in_training.items()}
            row = self.row(saes, trainer)
        except Exception:
            self._saving.save(trainer)
            raise
        trainer.callbacks.call("on_eval", trainer, row)

    def row(self, saes: Mapping[str, SAE], trainer: SAETrainer) -> dict[str, float | None]:
        """Evaluate `saes`, which are those of the trainer as they are used: `evals/{group}/{key}` -> value.

        With several SAEs names are prefixed by theirs. Empty if this step was evaluated before.
        """
        if self._evaluated == trainer.tokens:
            return {}
        self._store.pause()  # what it does to the model must not reach rows that are read ahead
        healthy = {name: sae for name, sae in saes.items() if not trainer.in_training[name].failed}
        self.found, self._evaluated = self._live.evaluate(healthy, self._store.medians).metrics, trainer.tokens
        return {
            f"{name}/evals/{group}/{key}" if len(saes) > 1 else f"evals/{group}/{key}": value
            for name, groups in self.found.items()
            for group, metrics in groups.items()
            for key, value in metrics.items()
        }


def check_awaited(cfg: RunConfig, *, is_evaluated: bool) -> None:
    """Whether the metrics that a run steers by will come.

    Raises:
        ConfigError: one of them is held-out, and nothing is evaluated before the end.
    """
    stop = cfg.train.early_stop
    awaited = {"train.early_stop.metric": stop and stop.metric, "checkpoint.best": cfg.checkpoint.best}
    for field, metric in awaited.items():
        if metric and metric.startswith("evals/") and not (is_evaluated and cfg.eval.every_tokens is not None):
            raise ConfigError(
                f"{field}: {metric} is not measured before the end: set eval.every_tokens"
                + ("" if is_evaluated else ", and name a model and text to evaluate on")
            )
