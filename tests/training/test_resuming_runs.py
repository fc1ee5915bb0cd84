"""A run that is killed, interrupted or grown goes on as if nothing had happened."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from safetensors.torch import load_file
from test_run import HOOK, SMALL
from trees import equal

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


class Crash(Callback):
    """Something in the run that breaks after a step."""

    essential = True

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, trainer: Any) -> None:
        if trainer.steps == self.step:
            raise RuntimeError("broken")


def test_stopped_before_its_first_checkpoint_a_run_begins_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    straight = runs.go(tmp_path / "straight")
    for out in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(RuntimeError, match="broken"):
            runs.go(out, Crash(3))
    assert runs.rows_of(tmp_path / "a" / "run")[-1]["step"] == 3
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        runs.go(tmp_path / "a", seed=1)
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        runs.go(tmp_path / "a", checkpoint={"resume": "never"})
    caplog.clear()
    again = runs.go(tmp_path / "a")
    assert caplog.text.count("was stopped before its first checkpoint: it begins anew") == 1
    assert main(["train", "--resume", str(tmp_path / "b" / "run")]) == 0
    for folder in (again.folder, tmp_path / "b" / "run"):
        equal(runs.rows_of(folder), runs.rows_of(straight.folder), "rows")
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        runs.go(tmp_path / "a")


def test_a_signal_after_the_last_step_acts_when_the_run_is_complete(tmp_path: Path) -> None:
    class AtTheEnd(Callback):
        def on_end(self, trainer: Any) -> None:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        runs.go(tmp_path / "stopped", AtTheEnd())
    complete = runs.go(tmp_path / "straight").folder
    assert read_metrics(tmp_path / "stopped" / "run" / "metrics.jsonl")[-1]["tokens"] == 8 * runs.BATCH
    assert {path.name for path in (tmp_path / "stopped" / "run").iterdir()} == {p.name for p in complete.iterdir()}


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    class Twice(Callback):
        def on_step_start(self, trainer: Any) -> None:
            if trainer.steps == 5:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    often = {"checkpoint": {"every_tokens": 2 * runs.BATCH, "final": True}}
    with pytest.raises(KeyboardInterrupt) as stopped:
        runs.go(tmp_path, Twice(), **often)
    assert type(stopped.value) is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) == before
    assert [int(path.name) for path in find_checkpoints(tmp_path / "run")] == [2 * runs.BATCH, 4 * runs.BATCH]
    runs.same_end(runs.go(tmp_path, **often).folder, runs.go(tmp_path / "straight", **often).folder)


@pytest.mark.parametrize("where", ["before", "while writing"])
def test_on_a_full_disk_a_run_goes_on_with_the_checkpoints_that_there_are(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    often: dict[str, Any] = {"checkpoint": {"every_tokens": runs.BATCH, "final": True}, "buffer": {"prefetch": 2}}

    class Fills(Callback):
        """The disk is full from the third step to the sixth."""

        def on_step_start(self, trainer: Any) -> None:
            if trainer.steps == 2 and where == "before":
                usage = shutil.disk_usage(tmp_path)._replace(free=1000)
                monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
            elif trainer.steps == 2:
                monkeypatch.setattr("sae_kit.training.checkpoint.write_state", self.full)
            if trainer.steps == 6:
                monkeypatch.undo()

        @staticmethod
        def full(*arguments: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(TrainingInterrupted, match="nothing could be saved — continue: sae-kit train --resume"):
        runs.go(tmp_path, Fills(), Stop(4), **often)
    monkeypatch.undo()
    assert [int(path.name) for path in find_checkpoints(tmp_path / "run")] == [runs.BATCH, 2 * runs.BATCH]
    assert caplog.text.count("training goes on, and could go on from the checkpoint before") == 2
    found = runs.go(tmp_path, **often)
    full = runs.go(tmp_path / "full", Fills(), **often)
    missing = [row.get("checkpoint/missing_bytes", 0) for row in runs.rows_of(full.folder)]
    assert [amount > 0 for amount in missing] == [False] * 3 + [True] * 4 + [False], (
        "said in every row until it is over"
    )
    assert [int(path.name) for path in find_checkpoints(full.folder)] == [7 * runs.BATCH, 8 * runs.BATCH]
    straight = runs.go(tmp_path / "straight", **often)
    runs.same_end(found.folder, straight.folder)
    assert full.training.tokens == straight.training.tokens


def test_a_run_outlives_weights_and_biases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Dead:
        id = "x"

        def __getattr__(self, name: str) -> Any:
            if name in ("log", "finish"):
                raise ConnectionError("nobody listens")
            return lambda *arguments, **named: None

    monkeypatch.setattr("wandb.init", lambda **settings: Dead())
    changes = {"log": {"wandb": {"project": "p"}, "histograms": True}, "checkpoint": {"every_tokens": runs.BATCH}}
    evaluated = {"at_end": True, "tokens": 256, "fidelity_tokens": 128}
    found = runs.go(tmp_path, **changes, eval=evaluated)
    assert found.training.steps == 8
    assert found.evals["sae"]
    assert caplog.text.count("is switched off; the run goes on") == 1


def test_a_changed_config_is_listed_and_can_be_accepted(tmp_path: Path) -> None:
    entry = {"hook": runs.HOOK, "sae": {"architecture": "jumprelu", "d_sae": 64, "l0_coefficient": 1.0}}
    with pytest.raises(TrainingInterrupted):
        runs.go(tmp_path, Stop(4), saes={"sae": entry})
    sae = {**entry["sae"], "l0_coefficient": 3.0}
    changes = {"optim": {"lr": 1e-3}, "data": {"exclude": "none"}, "saes": {"sae": {**entry, "sae": sae}}}
    with pytest.raises(ConfigError) as refused:
        runs.go(tmp_path, **changes)
    for part in (
        "optim.lr: 0.003 when it was saved, 0.001 now",
        "data.exclude: 'structural' when it was saved, 'none' now",
        "saes.sae.sae.l0_coefficient: 1.0 when it was saved, 3.0 now",
        "Use the same, another name, or --override",
    ):
        assert part in str(refused.value)
    for lasting in (
        {"sae": {**sae, "d_sae": 32}},
        {"sae": {**sae, "skip": True}},
        {"hook": "blocks.0.hook_resid_post"},
    ):
        with pytest.raises(ConfigError, match=r"when it was saved, .* now.* Use the same or another name$"):
            run(runs.config(tmp_path, saes={"sae": {**entry, **lasting}}), override=True)
    del changes["data"]
    found = run(runs.config(tmp_path, **changes), override=True)
    assert found.training.metrics["details/l0_coefficient"] == 3.0
    assert found.training.metrics["details/current_learning_rate"] < 1e-3
    assert found.training.tokens == 8 * runs.BATCH


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
