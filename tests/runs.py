"""Runs of the demo model on its text that take less than a second, and what is left of them."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers import TRAINABLE, refused
from safetensors.torch import load_file
from trees import equal

from sae_kit import RunConfig
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.checkpoint import newest_checkpoint, read_checkpoint
from sae_kit.training.run import RunResult, run

HOOK = "blocks.1.hook_resid_post"
BATCH = 128
TREE: Mapping[str, Any] = {
    "name": "run",
    "model": {"name": "demo"},
    "data": {"sources": ["demo"], "context_size": 32, "rows_per_forward": 16, "tokenize_batch": 20},
    "train": {"tokens": 8 * BATCH, "batch_tokens": BATCH, "device": "cpu"},
    "buffer": {"tokens": 4 * BATCH},
    "optim": {"lr": 3e-3},
    "eval": {"at_end": False, "every_tokens": None},
    "log": {"console": False, "every_tokens": BATCH},
    "checkpoint": {"every_tokens": None, "every_minutes": None},
    "saes": {"sae": {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 64, "k": 4}}},
}
DYING: Mapping[str, Any] = {"dead_after_tokens": 2 * BATCH, "aux_coefficient": 0.5}


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A tree with others of its leaves; an SAE is given as a whole."""
    new = dict(copy.deepcopy(tree))
    for key, value in changes.items():
        old = new.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and key != "saes":
            new[key] = merged(old, value)
        else:
            new[key] = copy.deepcopy(value)
    return new


def config(out: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_dict(merged(TREE, {"out": str(out), **changes}))


def go(out: Path, *callbacks: Callback, **changes: Any) -> RunResult:
    return run(config(out, **changes), callbacks=callbacks)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was logged, but for times."""
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/") and k not in ("time", "attempt")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def same_end(found: Path, expected: Path) -> None:
    """Two runs logged the same, saved the same SAEs, and have the same state in their last checkpoints."""
    equal(rows_of(found), rows_of(expected), "rows")
    for file in sorted(expected.glob("saes/*/*.safetensors")):
        equal(load_file(found / file.relative_to(expected)), load_file(file), file.parent.name)
    paths = [newest_checkpoint(folder) for folder in (found, expected)]
    mine, yours = (read_checkpoint(path) for path in paths if path is not None)
    for checkpoint in (mine, yours):
        checkpoint.state["trainer"]["callbacks"] = None  # which attempt it is, and how long it took
    equal((mine.tokens, mine.state, mine.buffer), (yours.tokens, yours.state, yours.buffer), "checkpoint")
    for name, sae in yours.saes.items():
        equal(dict(mine.saes[name].state_dict()), dict(sae.state_dict()), name)


RARE: Mapping[str, Any] = {"encoder": "transpose", "b_enc": "quantile", "firing_rate": 0.002}
"""A start after which most latents stay silent."""
DEPTHS = ["blocks.0.hook_resid_post", HOOK]
MLPS = (["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in"], ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out"])
CHANGING: Mapping[str, Mapping[str, Any]] = {
    "p": {"architecture": "standard", "p_annealing": {"start_tokens": 0, "n_updates": 4, "window": 3}},
    "k": {"architecture": "topk", "k_annealing": {"start": 16, "tokens": "80%"}},
    "batch_k": {"architecture": "batchtopk", "k_annealing": {"start": 16, "tokens": "50%"}},
    "jumprelu_l0": {"architecture": "jumprelu", "target_l0": 5.0, "l0_warm_up_tokens": "10%"},
    "gated_l0": {"architecture": "gated", "target_l0": 5.0},
    "prefixes": {"architecture": "matryoshka_batchtopk", "matryoshka_random_prefixes": 3},
}
"""What steers itself, or changes in the course of a run."""


def mixture() -> dict[str, Any]:
    """Entries of one run: every trainable architecture, with AuxK where it has it, and all that keeps a state."""
    entries: dict[str, Any] = {}
    for name, own in {**{name: {"architecture": name} for name in TRAINABLE}, **CHANGING}.items():
        architecture = own["architecture"]
        fields = {"d_sae": 64} | ({"k": 4} if "topk" in architecture else {})
        fields |= {} if refused(architecture, DYING) else DYING
        competes = "topk" in architecture or architecture == "matching_pursuit"
        start = {} if competes else {"init": RARE, "lr": 3e-4}
        entries[name] = {"hook": HOOK, "sae": {**fields, **own}, **start}
    topk = {"architecture": "topk", "d_sae": 64, "k": 4, **DYING}
    standard = {"architecture": "standard", "d_sae": 64, **DYING}
    resample = {"interval_tokens": 5 * BATCH, "window_tokens": 2 * BATCH, "rows": 4 * BATCH}
    return entries | {
        "transcoder": {"hook": MLPS[0][0], "hook_out": MLPS[1][0], "sae": {**topk, "skip": True}},
        "crosscoder": {"hook": DEPTHS, "sae": topk, "optim": {"name": "signum", "lr": 1e-3}},
        "clt": {"hook": MLPS[0], "hook_out": MLPS[1], "sae": {**topk, "cross_layer": True}, "lr": 1e-3},
        "resampled": {"hook": HOOK, "sae": standard, "init": RARE, "lr": 3e-4, "resample": resample},
    }


STEPS = 16
LONG: Mapping[str, Any] = {
    "train": {"tokens": STEPS * BATCH, "accumulate": 2, "density_window_tokens": 5 * BATCH},
    "buffer": {"prefetch": 2},
    "optim": {"amsgrad": True, "ema": 0.9},
    "schedule": {"warm_up_tokens": "20%"},
    "checkpoint": {"final": True},
    "saes": mixture(),
}
"""A run of all of them, whose whole state at its end is in a checkpoint."""
