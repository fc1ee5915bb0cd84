"""A run that is killed, interrupted or grown goes on as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run import HOOK, SMALL

from sae_kit import SAE, RunConfig
from sae_kit import config as trees
from sae_kit.cli import main
from sae_kit.errors import ConfigError, OutputExistsError, TrainingInterrupted
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.checkpoint import find_checkpoints
from sae_kit.training.run import run

TREE: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "tokens": 12_288,
    "name": "run",
    **SMALL,
    "buffer": {"tokens": 2048, "prefetch": 2},
    "optim": {"lr": 3e-3, "ema": 0.99},
    "log": {"console": False, "every_tokens": 1024},
    "checkpoint": {"every_tokens": 2048, "every_minutes": None},
    "saes": {
        "a": {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 256, "k": 8, "dead_after_tokens": 1024}},
        "b": {
            "hook": "blocks.1.hook_resid_post",
            "sae": {"architecture": "batchtopk", "d_sae": 128, "k": 8, "dead_after_tokens": 1024},
        },
    },
}


def config(out: Path, **changes: Any) -> RunConfig:
    return RunConfig.from_dict({**TREE, "out": str(out), **changes})


class Stop(Callback):
    """Ends the process, or raises a signal, after a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.step, self.number = step, number

    def on_step_end(self, trainer: Any) -> None:
        if trainer.steps == self.step:
            signal.raise_signal(self.number)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(config(tmp_path_factory.mktemp("straight"))).folder


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("a", "b"):
        for file in sorted((expected / "saes" / name).glob("*.safetensors")):
            mine, yours = load_file(found / "saes" / name / file.name), load_file(file)
            torch.testing.assert_close(mine, yours, rtol=0, atol=0)
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (found, expected))
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        timed = {key for key in row if key.startswith("perf/")} | {"time", "attempt"}
        assert {k: v for k, v in row.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.parametrize(("step", "number"), [(7, signal.SIGINT), (16, signal.SIGTERM)])
def test_a_signal_saves_and_the_run_goes_on(tmp_path: Path, straight: Path, step: int, number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(TrainingInterrupted, match=rf"saved step {step} .*continue: sae-kit train --resume") as stopped:
        run(config(tmp_path), callbacks=[Stop(step, number)])
    assert signal.getsignal(number) == before
    assert stopped.value.signal == number
    assert stopped.value.checkpoint is not None
    assert stopped.value.checkpoint == tmp_path / "run" / "checkpoints" / f"{step * 512:012d}"
    opened = SAE.load_from_disk(stopped.value.checkpoint / "saes" / "a")
    assert int(opened.tokens_seen) == step * 512
    assert_same_run(run(config(tmp_path)).folder, straight)


def test_killed_at_any_moment_it_goes_on_from_the_checkpoint_before(tmp_path: Path, straight: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**TREE, "out": str(tmp_path)}))
    for delay in (0.3, 1.0, 0.6):
        child = subprocess.Popen(
            [sys.executable, "-m", "sae_kit.cli", "train", str(path)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        had = len(find_checkpoints(tmp_path / "run"))
        names = {found.name for found in find_checkpoints(tmp_path / "run")}
        end = time.monotonic() + 120
        while child.poll() is None and {f.name for f in find_checkpoints(tmp_path / "run")} == names:
            assert time.monotonic() < end
            time.sleep(0.02)
        time.sleep(delay / 10)
        child.kill()
        child.wait()
        assert len(find_checkpoints(tmp_path / "run")) >= min(had, 2) or not had
    assert_same_run(run(config(tmp_path)).folder, straight)


def test_the_command_line_stops_with_the_signals_status_and_resumes(tmp_path: Path, straight: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**TREE, "out": str(tmp_path)}))
    child = subprocess.Popen(
        [sys.executable, "-m", "sae_kit.cli", "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    end = time.monotonic() + 120
    while not find_checkpoints(tmp_path / "run"):
        assert time.monotonic() < end
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 143, said
    assert f"continue: sae-kit train --resume {tmp_path / 'run'}" in said
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert trees.look_up(trees.load_tree(tmp_path / "run" / "run.yaml"), ("checkpoint", "resume")) == "auto"
    assert main(["train", "--resume", str(tmp_path / "nowhere")]) == 2
    assert_same_run(tmp_path / "run", straight)


def test_what_changed_is_named_and_what_does_not_matter_may_change(tmp_path: Path) -> None:
    with pytest.raises(TrainingInterrupted):
        run(config(tmp_path), callbacks=[Stop(5)])
    with pytest.raises(ConfigError, match=r"optim\.lr: 0\.003 when it was saved, 0\.001 now.*--override"):
        run(config(tmp_path, optim={"lr": 1e-3, "ema": 0.99}))
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        run(config(tmp_path, name="other", checkpoint={"resume": "must"}))
    with pytest.raises(OutputExistsError):
        run(config(tmp_path, checkpoint={"resume": "never"}))
    free = {"log": {"console": False, "every_tokens": 4096}, "buffer": {"tokens": 2048, "prefetch": 0}}
    assert run(config(tmp_path, **free)).training.tokens == 12_288


def test_a_finished_run_is_left_alone(straight: Path) -> None:
    before = {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()}
    with pytest.raises(OutputExistsError, match="holds a finished run; nothing was changed"):
        run(config(straight.parent))
    assert {path: path.read_bytes() for path in straight.rglob("*") if path.is_file()} == before


def test_without_its_rows_a_run_goes_on_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = {"every_tokens": None, "every_minutes": None, "buffer": "drop"}
    with pytest.raises(TrainingInterrupted):
        run(config(tmp_path, checkpoint=small), callbacks=[Stop(9)])
    found = run(config(tmp_path, checkpoint=small))
    assert found.training.tokens == 12_288
    assert "activations that were read and not yet trained on were not saved" in caplog.text


def test_a_finished_run_grows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short = config(tmp_path, tokens=6144, checkpoint={"every_tokens": 1024, "every_minutes": None})
    assert run(short).training.tokens == 6144
    rows = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    with pytest.raises(TrainingInterrupted):  # one that grows can be interrupted, too
        run(config(tmp_path), callbacks=[Stop(20)])
    grown = run(config(tmp_path, checkpoint={"every_tokens": 1024, "every_minutes": None}))
    assert grown.training.tokens == 12_288
    assert grown.training.steps == 24
    assert int(grown.training.saes["a"].tokens_seen) == 12_288
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) > rows
    with pytest.raises(OutputExistsError, match=r"more train\.tokens to go on"):
        run(config(tmp_path))


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    """With a rate that grows too large the last checkpoints are not the best."""
    often = {"every_tokens": 1024, "every_minutes": None, "best": "metrics/explained_variance", "keep": 1}
    found = run(
        config(tmp_path, checkpoint=often, optim={"lr": 0.3}, schedule={"name": "constant", "warm_up_tokens": "100%"})
    )
    rows = {row["tokens"]: row for row in read_metrics(found.folder / "metrics.jsonl")}
    kept = [int(path.name) for path in find_checkpoints(found.folder)]
    scores = {
        tokens: sum(rows[tokens][f"{name}/metrics/explained_variance"] for name in "ab")
        for tokens in range(1024, 12_288, 1024)
    }
    best = max(scores, key=scores.__getitem__)
    assert kept == sorted({best, 11_264})
    assert best < 11_264
    with pytest.raises(ConfigError, match="Did you mean 'metrics/explained_variance'"):
        run(config(tmp_path, name="other", checkpoint={**often, "best": "metric/explained_variance"}))
    with pytest.raises(ConfigError, match="whether a lower or a higher metrics/l0 is better is not known"):
        config(tmp_path, checkpoint={"best": "metrics/l0"})
