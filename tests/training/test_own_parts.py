"""Optimizers and losses of the user's own: they reach the SAEs of a run, all of them or those that are named."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_sae, run_config, sparse_batches
from torch import Tensor

import sae_kit
from sae_kit import SAE, RunConfig, SAETrainer
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.training.callbacks import Callback
from sae_kit.training.losses import Pass
from sae_kit.training.run import run

HOOK = "blocks.2.hook_resid_pre"
TREE: dict[str, Any] = {
    "data": {"context_size": 64, "rows_per_forward": 8},
    "train": {"batch_tokens": 512},
    "buffer": {"tokens": 2048},
    "eval": {"every_tokens": None, "at_end": False},
    "log": {"console": False, "every_tokens": 512},
    "checkpoint": {"every_tokens": None, "every_minutes": None},
}


class Watch(Callback):
    """Optimizers by SAE, and the number of rows that the loss was given."""

    def on_start(self, trainer: SAETrainer) -> None:
        self.optimizers = {name: type(part.optimizer).__name__ for name, part in trainer.in_training.items()}


def pull_to_zero(sae: SAE, batch: Batch, run: Pass) -> Mapping[str, Tensor]:
    return {"mine": 7.0 * run.y_hat.square().mean()}


def rmsprop(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups)


def test_they_reach_a_run_from_its_shortest_form(tmp_path: Path) -> None:
    watch = Watch()
    result = sae_kit.train(
        model="demo", dataset="demo", hook=HOOK, sae={"architecture": "topk", "d_sae": 64, "k": 4}, tokens=1024,
        out=str(tmp_path), optimizer=rmsprop, loss=pull_to_zero, callbacks=[watch], **TREE,
    )  # fmt: skip
    assert watch.optimizers == {"sae": "RMSprop"}
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["losses/mine"] > 0 for row in rows)
    assert rows[0]["losses/overall_loss"] > rows[0]["losses/mse_loss"] + 0.99 * rows[0]["losses/mine"]


def test_a_run_of_several_saes_has_optimizers_by_name(tmp_path: Path) -> None:
    entry = {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 64, "k": 4}}
    tree = {**TREE, "model": "demo", "dataset": "demo", "tokens": 1024, "out": str(tmp_path)}
    cfg = RunConfig.from_dict({**tree, "saes": {"a": entry, "b": entry}})
    watch = Watch()
    run(cfg, optimizer={"b": rmsprop}, callbacks=[watch])
    assert (watch.optimizers["a"] == "RMSprop", watch.optimizers["b"] == "RMSprop") == (False, True)


def test_an_optimizer_for_nobody_is_refused() -> None:
    saes = {"small": make_sae("topk"), "large": make_sae("topk")}
    batches = sparse_batches(saes["small"], 1)
    with pytest.raises(ConfigError, match=r"no SAE 'lagre' in this run, it has small, large\. Did you mean 'large'\?"):
        SAETrainer(run_config(1), saes, batches, optimizer={"lagre": rmsprop})
