"""Checkpoints of small SAEs whose weights say how many rows they are of."""

from pathlib import Path
from typing import Any

from helpers import make_sae

from sae_kit import SAE
from sae_kit.training.checkpoint import find_checkpoints, write_checkpoint


def small(seed: int = 0) -> SAE:
    return make_sae("topk", seed=seed)


def write(root: Path, tokens: int, **changes: Any) -> Path:
    """The checkpoint of a run of one SAE."""
    given: dict[str, Any] = {"saes": {"sae": small(tokens)}, "state": {"tokens": tokens}, "run": {"step": tokens // 10}}
    return write_checkpoint(root, tokens=tokens, **given | changes)


def names(root: Path) -> list[int]:
    """Rows of the checkpoints, in the order of writing."""
    return [int(path.name) for path in find_checkpoints(root)]


def contents(root: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
