"""The folder of a run: what it is called, what is in it, and whether it is free."""

import hashlib
import json
from pathlib import Path

from sae_kit import config as trees
from sae_kit.errors import ConfigError, OutputExistsError
from sae_kit.training.config import RunConfig
from sae_kit.training.resume import PROBE

RUN_FILES = frozenset(
    {
        "run.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "results.json",
        "results.csv",
        "saes",
        "wandb",
        "checkpoints",
        "latest.json",
    }
)
"""What a run leaves in its folder."""


def run_folder(cfg: RunConfig) -> Path:
    """Where the run of `cfg` is, or is going to be."""
    return Path(cfg.out) / (cfg.name or default_name(cfg))


def default_name(cfg: RunConfig) -> str:
    """Model, first SAE, and 8 hex digits of the config's hash: the same config has the same name."""
    digest = hashlib.sha256(json.dumps(trees.unstructure(cfg), sort_keys=True).encode()).hexdigest()[:8]
    model = (cfg.model.name or "model").rstrip("/").split("/")[-1]
    return f"{model}-{next(iter(cfg.saes.values())).sae.architecture}-{digest}"


def check_free(folder: Path, *, resuming: bool) -> None:
    """Whether a run may use the folder; one that goes on uses its own.

    Raises:
        OutputExistsError: it holds something already.
    """
    if not resuming and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(
            f"{folder} exists and is not empty; nothing was changed. Choose another name or out, or remove it"
        )


def make_folder(folder: Path, *, resuming: bool = False) -> Path:
    """A new folder for a run, or the one of the run that goes on, tried for writing before any work.

    Raises:
        OutputExistsError: it holds something already. ConfigError: it cannot be written.
    """
    try:
        check_free(folder, resuming=resuming)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / PROBE
        probe.touch()
        probe.unlink()
    except OutputExistsError:
        raise
    except OSError as error:
        raise ConfigError(f"cannot write to the run folder {folder}: {error.strerror}") from error
    return folder
