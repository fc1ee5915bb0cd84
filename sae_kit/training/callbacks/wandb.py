"""Weights & Biases, with tokens on the x axis. The package is imported only when it is used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_kit import config as trees
from sae_kit.data.batch import State
from sae_kit.errors import MissingDependencyError
from sae_kit.training.callbacks.base import Callback, Metrics

if TYPE_CHECKING:
    from sae_kit.training.config import WandbConfig
    from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)
FINISH_SECONDS = 120.0  # for the last rows of a run, should the server be gone by then; they stay on disk


class Wandb(Callback):
    """A run on Weights & Biases that keeps its id when it is continued.

    Where it cannot be reached at the start, the run is kept on disk instead, for `wandb sync`. No step numbers are
    sent, so that a continued run may log some tokens once more.
    """

    def __init__(self, cfg: WandbConfig, folder: Path, name: str, *, with_histograms: bool = False) -> None:
        try:
            import wandb
        except ImportError as error:
            raise MissingDependencyError("log.wandb needs the package wandb: pip install wandb") from error
        self._wandb: Any = wandb
        self._cfg, self._folder, self._name, self._with_histograms = cfg, folder, name, with_histograms
        self._id = cfg.id
        self._resume = cfg.resume
        self._exit_code = 0
        self._run: Any = None

    def on_start(self, trainer: SAETrainer) -> None:
        try:
            self._run = self._init(trainer, self._cfg.mode)
        except Exception as error:
            if self._cfg.mode != "online":
                raise
            log.warning(
                "Weights & Biases cannot be reached (%s); the run is kept in %s, for `wandb sync`",
                str(error).splitlines()[0] if str(error) else type(error).__name__,
                self._folder / "wandb",
            )
            self._wandb.teardown()  # its service has settled on being online
            self._run = self._init(trainer, "offline")
        self._id, self._resume = self._run.id, "allow"  # the next stage of a pipeline finds it there
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def _init(self, trainer: SAETrainer, mode: str) -> Any:
        return self._wandb.init(
            project=self._cfg.project,
            entity=self._cfg.entity,
            name=self._cfg.name or self._name,
            group=self._cfg.group,
            tags=list(self._cfg.tags),
            id=self._id,
            resume=self._resume if mode == "online" else None,  # there is nobody to ask
            mode=mode,
            dir=str(self._folder),
            config=trees.unstructure(trainer.cfg),
            settings=self._wandb.Settings(finish_timeout=FINISH_SECONDS),
        )

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        shown = histograms(trainer) if self._with_histograms else {}
        drawn = {name: self._wandb.Histogram(values.numpy()) for name, values in shown.items()}
        self._run.log({"tokens": trainer.tokens, **metrics, **drawn})

    def on_eval(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self._run.log({"tokens": trainer.tokens, **metrics})

    def on_checkpoint(self, trainer: SAETrainer, path: Path) -> None:
        self._keep(path / "saes", "checkpoint")

    def on_end(self, trainer: SAETrainer) -> None:
        self._keep(self._folder / "saes", "saes")

    def on_exception(self, trainer: SAETrainer, error: BaseException) -> None:
        self._exit_code = 1

    def _keep(self, folder: Path, kind: str) -> None:
        """Upload the SAEs in a folder, if artifacts are wanted."""
        if self._cfg.artifacts and folder.is_dir():
            artifact = self._wandb.Artifact(f"{self._run.id}-{kind}", type=kind)
            artifact.add_dir(str(folder))
            self._run.log_artifact(artifact)

    def state_dict(self) -> State:
        return {} if self._id is None else {"id": self._id}

    def load_state_dict(self, state: State) -> None:
        self._id = self._cfg.id or state["id"]

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)
            self._wandb.teardown()  # without it the last rows of an offline run are missing from its file
            self._run = None


def histograms(trainer: SAETrainer) -> dict[str, Tensor]:
    """Values per latent that are worth a histogram, on the CPU, by name; with several SAEs prefixed by theirs.

    `plots/feature_density_line_chart`: how often it fires, as log10(density + 1e-10); `weights/W_dec_norms`.
    """
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, part in trainer.in_training.items():
            prefix = "" if len(trainer.saes) == 1 else f"{name}/"
            found[f"{prefix}plots/feature_density_line_chart"] = (
                torch.log10(part.metrics.density() + 1e-10).float().cpu()
            )
            found[f"{prefix}weights/W_dec_norms"] = part.sae.decoder_norms().float().flatten().cpu()
    return found
