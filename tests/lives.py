"""Runs in processes of their own, forked when everything is imported so that a life does not cost a start.

    python lives.py exact FOLDER         a run in one go, and the same run stopped after some steps and gone on with
    python lives.py killed FOLDER SEED   a run that is killed at random moments until it is through, and one in one go

Shapes and types are not checked here, as they are in the tests themselves: it is the product as it is used.
"""

import importlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from runs import BATCH, LONG, STEPS, TREE, config, merged, mixture

from sae_kit import SAETrainer
from sae_kit.atomic import TEMPORARY
from sae_kit.cli import main
from sae_kit.errors import TrainingInterrupted
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.checkpoint import damage, find_checkpoints, newest_checkpoint
from sae_kit.training.run import run

STOPS = (1, STEPS // 2, STEPS - 1)
KILLS, INTERVAL, INTERVALS = 20, 2 * BATCH, 40
FREQUENT: Mapping[str, Any] = {
    **LONG,
    "train": {**LONG["train"], "tokens": INTERVALS * INTERVAL},
    "checkpoint": {"final": True, "every_tokens": INTERVAL, "milestones": [10 * BATCH], "signals": []},
    "saes": {name: mixture()[name] for name in ("topk", "batchtopk", "jumprelu_l0", "resampled")},
}
"""A run that spends much of its time in writing checkpoints."""


class Watch(Callback):
    """Ends the run by a signal after a step, and writes down how many latents AuxK had to work on."""

    essential = True

    def __init__(self, folder: Path, step: int | None) -> None:
        self.folder, self.step = folder, step

    def on_step_end(self, trainer: SAETrainer) -> None:
        if trainer.steps == STEPS // 2:
            listed = {name: part.dead for name, part in trainer.in_training.items() if part.dead.listed}
            found = {name: len(dead.candidates) for name, dead in listed.items()}
            (self.folder / "dead.json").write_text(json.dumps(found))
        if trainer.steps == self.step:
            signal.raise_signal(signal.SIGTERM)


def life(action: Callable[[], Any]) -> int:
    """A process that does this, whose status is the number that it returns, if it does; its id."""
    child = os.fork()
    if not child:
        status = 1
        try:
            found = action()
            status = found if isinstance(found, int) else 0
        except TrainingInterrupted as stop:
            status = 128 + stop.signal
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return child


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def live(command: str, root: Path, *arguments: object) -> None:
    """Do this in a process of its own."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, __file__, command, str(root), *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def exact(root: Path) -> None:
    def go(out: Path, step: int | None = None) -> int:
        out.mkdir(exist_ok=True)
        return end(life(lambda: run(config(out, **LONG), callbacks=[Watch(out, step)])))

    assert go(root / "whole") == 0
    for step in STOPS:
        assert go(root / str(step), step) == 128 + signal.SIGTERM
        assert go(root / str(step)) == 0


def killed(root: Path, seed: int) -> list[dict[str, Any]]:
    """What was found after each kill."""
    begin = {}
    for name in ("whole", "killed"):
        begin[name] = root / f"{name}.json"
        begin[name].write_text(json.dumps(merged(TREE, {**FREQUENT, "out": str(root / name)})))
    assert end(life(lambda: main(["train", str(begin["whole"])]))) == 0
    seconds = read_metrics(root / "whole" / "run" / "metrics.jsonl")[-1]["time"] / INTERVALS
    folder, draw, kills = root / "killed" / "run", random.Random(seed), []
    while True:
        resume = folder.exists() and draw.random() < 0.5
        words = ["--resume", str(folder)] if resume and (folder / "run.yaml").exists() else [str(begin["killed"])]
        child = life(lambda words=words: main(["train", *words]))
        if len(kills) == KILLS:
            assert end(child) == 0
            return kills
        await_new(folder, "0*", draw.choice((0, 1, 1, 1)), child)
        if writing := draw.random() < 0.4:
            await_new(folder, ".0*", 1, child)
        time.sleep(draw.uniform(0, 0.3 if writing else 1.5) * seconds)
        os.kill(child, signal.SIGKILL)
        assert end(child) == -signal.SIGKILL, "it has to live as long"
        kills.append(look(folder))


def await_new(folder: Path, pattern: str, wanted: int, child: int) -> None:
    """Until there are so many more checkpoints, or such as are being written."""
    names = {path.name for path in folder.glob(f"checkpoints/{pattern}")}
    new: set[str] = set()
    while len(new) < wanted:
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "it ended by itself"
        time.sleep(0.002)
        new |= {path.name for path in folder.glob(f"checkpoints/{pattern}")} - names


def look(folder: Path) -> dict[str, Any]:
    """How far the run was, what can be read of it, and whether a checkpoint was being written."""
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").exists() else []
    newest = newest_checkpoint(folder)
    return {
        "trained": rows[-1]["tokens"] if rows else 0,
        "saved": 0 if newest is None else int(newest.name),
        "readable": len(find_checkpoints(folder)),
        "damaged": [str(path) for path in folder.glob("checkpoints/0*") if damage(path, verify=True) is not None],
        "writing": any(TEMPORARY.fullmatch(path.name) for path in folder.glob("checkpoints/.*")),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for slow in ("transformers.models.llama.modeling_llama", "transformers.models.auto", "torch.optim", "datasets"):
        importlib.import_module(slow)  # and nothing else: where torch has computed, it cannot be forked safely
    command, folder, *rest = sys.argv[1:]
    if command == "exact":
        exact(Path(folder))
    else:
        (Path(folder) / "kills.json").write_text(json.dumps(killed(Path(folder), int(rest[0]))))
