"""Going on with a run: from which checkpoint, and whether the config is still the same."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit.atomic import TEMPORARY
from sae_kit.data.store import ActivationsStore, with_rows
from sae_kit.devices import kernels
from sae_kit.errors import ConfigError, OutputExistsError
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig
from sae_kit.training.checkpoint import (
    CHECKPOINTS,
    Checkpoint,
    environment_changes,
    find_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from sae_kit.training.config import RunConfig
from sae_kit.training.results import RESULTS
from sae_kit.training.trainer import SAETrainer

log = logging.getLogger(__name__)

FREE = (
    "log",
    "eval",
    "checkpoint",
    "out",
    "name",
    "train.device",
    "model.device",
    "buffer.device",
    "buffer.prefetch",
    "data.workers",
    "data.tokenize_batch",
)
"""What may differ when a run goes on: nothing of it changes what is trained."""
PROBE = ".probe"
"""File that tries whether a run folder can be written."""


def checkpoint_to_resume(cfg: RunConfig, folder: Path, *, override: bool = False) -> Checkpoint | None:
    """The checkpoint that the run of `cfg` in `folder` goes on from; None = it starts anew.

    `override` accepts a config that differs from the one that the checkpoint was made with.

    Raises:
        ConfigError: there has to be a checkpoint and there is none, or the config is another one.
        OutputExistsError: the run is finished.
    """
    asked = cfg.checkpoint.resume
    if asked == "never":
        return None
    if (folder / RESULTS).exists() and (folder / "run.yaml").exists() and find_checkpoints(folder):
        finished = trees.look_up(trees.load_tree(folder / "run.yaml"), ("train", "tokens"))
        if isinstance(finished, int) and cfg.train.tokens <= finished:
            raise OutputExistsError(
                f"{folder} holds a finished run; nothing was changed. Choose another name or out, or more train.tokens "
                "to go on with it"
            )
    path = newest_checkpoint(folder) if asked in ("auto", "must") else Path(asked)
    if path is None:
        if asked == "must":
            raise ConfigError(f"checkpoint.resume: there is no checkpoint in {folder / CHECKPOINTS} to go on from")
        if (folder / "run.yaml").is_file() and only_begun(cfg, folder):
            log.warning("%s was stopped before its first checkpoint: it begins anew", folder)
        return None
    found = read_checkpoint(path, verify=asked not in ("auto", "must"))
    saved = found.run["config"]
    differing = [
        (field, before, now)
        for field, before, now in differences(saved, trees.unstructure(cfg))
        if not (field == "train.tokens" and now > before)
    ]
    lasts = any(_lasts(field, cfg) for field, _, _ in differing)
    if lasts or (differing and not override):
        listed = "; ".join(f"{f}: {before!r} when it was saved, {now!r} now" for f, before, now in differing)
        ways = "the same or another name" if lasts else "the same, another name, or --override"
        raise ConfigError(f"{path} was made with another config: {listed}. Use {ways}")
    for name, sae in found.saes.items():
        found.saes[name] = _trained_as(sae, cfg.saes[name].sae) if name in cfg.saes else sae
    with kernels(tf32=cfg.train.tf32, deterministic=cfg.deterministic):  # as while it trains
        changes = environment_changes(found.run["environment"])
    if changes:
        log.warning("not bit for bit the run that was interrupted, because of %s", "; ".join(changes))
    return found


def _lasts(field: str, cfg: RunConfig) -> bool:
    """Whether a field says what an SAE computes, or of what, which the weights of a checkpoint cannot follow."""
    names = "|".join(map(re.escape, cfg.saes))
    match = re.fullmatch(rf"saes\.({names})\.(?:hook(?:_out)?|sae\.([^.]+))(?:\..+)?", field)
    if match is None:
        return False
    fields = dataclasses.fields(cfg.saes[match[1]].sae)
    return match[2] not in {field.name for field in fields if field.metadata.get("training_only")}


def _trained_as(sae: SAE, asked: SAEConfig) -> SAE:
    """The SAE of a checkpoint, its training shaped as `asked`."""
    training = {field.name for field in dataclasses.fields(asked) if field.metadata.get("training_only")}
    changed = dataclasses.replace(sae.cfg, **{name: getattr(asked, name) for name in training})
    if changed == sae.cfg:
        return sae
    new = changed.build()
    new.load_state_dict(sae.state_dict())
    return new


def only_begun(cfg: RunConfig, folder: Path) -> bool:
    """Whether nothing is in `folder` but this very run as it was before its first checkpoint, so that it begins anew.

    With `checkpoint.resume` "must" or "never" no folder counts as such.
    """
    if cfg.checkpoint.resume != "auto" or not folder.is_dir():
        return False
    found = [path for path in folder.iterdir() if path.name != PROBE and not TEMPORARY.fullmatch(path.name)]
    if not (folder / "run.yaml").is_file():
        return not found
    results = any((folder / name).exists() for name in ("saes", RESULTS))
    checkpoints = any(not TEMPORARY.fullmatch(path.name) for path in (folder / CHECKPOINTS).glob("*"))
    saved = trees.load_tree(folder / "run.yaml")
    return not (results or checkpoints or differences(saved, trees.unstructure(cfg)))


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields of two config trees that differ and matter, with both values."""
    before, after = dict(trees.leaves(saved)), dict(trees.leaves(now))
    fields = dict.fromkeys((*before, *after))
    return [
        (field, before.get(field), after.get(field))
        for field in fields
        if before.get(field) != after.get(field) and not any(f"{field}.".startswith(f"{free}.") for free in FREE)
    ]


def go_on(trainer: SAETrainer, store: ActivationsStore, found: Checkpoint) -> None:
    """Set a trainer, whose SAEs are those of the checkpoint, and its stream where they were then."""
    store.load_state_dict(with_rows(found.state["stream"], found.buffer))
    trainer.load_state_dict(found.state["trainer"])
    log.info("going on from %s: step %s, %s tokens", found.path, f"{trainer.steps:,}", f"{trainer.tokens:,}")
