"""Evaluation on the way: where it was configured, and without a trace in what is trained."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_run import HOOK, SMALL

import sae_kit.training.inputs
from sae_kit import RunConfig
from sae_kit.demo import load_model, load_tokenizer
from sae_kit.errors import ConfigError, TrainingInterrupted
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.checkpoint import find_checkpoints
from sae_kit.training.run import RunResult, run
from sae_kit.training.trainer import SAETrainer

EV = "evals/reconstruction_quality/explained_variance"
TREE: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "tokens": 6144,
    "name": "run",
    **SMALL,
    "buffer": {"tokens": 1024, "prefetch": 2},
    "optim": {"lr": 3e-3, "ema": 0.99},
    "log": {"console": False, "every_tokens": 1024},
    "eval": {"every_tokens": 1024, "tokens": 512, "fidelity_tokens": 256},
    "saes": {
        "a": {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 256, "k": 8, "dead_after_tokens": 1024}},
        "b": {
            "hook": "blocks.1.hook_resid_post",
            "sae": {"architecture": "batchtopk", "d_sae": 128, "k": 8, "dead_after_tokens": 1024},
        },
    },
}
ONE = {key: value for key, value in TREE.items() if key != "saes"} | {"saes": {"a": TREE["saes"]["a"]}}


def go(out: Path, tree: dict[str, Any] = TREE, *callbacks: Callback, **sections: Any) -> RunResult:
    """A run of the tree with other fields in some sections."""
    merged = {name: {**tree.get(name, {}), **own} for name, own in sections.items()}
    return run(RunConfig.from_dict({**tree, **merged, "out": str(out)}), callbacks=callbacks)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    rows = read_metrics(folder / "metrics.jsonl")
    timed = ("perf/", "time", "attempt")
    return [{key: value for key, value in row.items() if not key.startswith(timed)} for row in rows]


def evaluated(folder: Path) -> list[int]:
    """At how many tokens; several times if it was done several times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["tokens"] for row in map(json.loads, lines) if any("evals/" in name for name in row)]


@pytest.fixture(scope="module")
def often(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return go(tmp_path_factory.mktemp("often"))


def test_training_is_the_same_to_the_bit_with_and_without(often: RunResult, tmp_path: Path) -> None:
    """Weights, averages, thresholds, counters, the order of the rows: with prefetching, two SAEs and averages."""
    never = go(tmp_path, eval={"every_tokens": None})
    for name in ("a", "b"):
        assert torch.equal(often.training.saes[name].W_dec, never.training.saes[name].W_dec)
        for file in sorted((never.folder / "saes" / name).glob("*.safetensors")):
            mine, other = load_file(often.folder / "saes" / name / file.name), load_file(file)
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
    assert evaluated(often.folder) == [1024, 2048, 3072, 4096, 5120, 6144]
    assert evaluated(never.folder) == [6144]
    trained = [{key: value for key, value in row.items() if "evals/" not in key} for row in rows_of(often.folder)]
    rows = rows_of(never.folder)
    assert trained[:-1] == rows[:-1]
    assert rows_of(often.folder)[-1] == rows[-1], "the evaluation at the end, too"
    assert often.evals == never.evals


def test_each_row_says_where_it_is(often: RunResult) -> None:
    rows = rows_of(often.folder)
    assert [(row["step"], row["tokens"]) for row in rows] == [(2 * i, 1024 * i) for i in range(1, 7)]
    for name in ("a", "b"):
        values = [row[f"{name}/{EV}"] for row in rows]
        assert len(set(values)) == 6, "each of other weights"
        assert values[-1] == often.evals[name]["reconstruction_quality"]["explained_variance"]
        assert f"{name}/evals/model_performance_preservation/ce_loss_score" in rows[0]


@pytest.mark.parametrize("step", [5, 6])
def test_a_run_that_goes_on_is_evaluated_at_the_same_tokens(often: RunResult, tmp_path: Path, step: int) -> None:
    """Interrupted between two evaluations, and right after one."""

    class Stop(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == step:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        go(tmp_path, TREE, Stop())
    again = go(tmp_path)
    assert evaluated(again.folder) == evaluated(often.folder)
    assert rows_of(again.folder) == rows_of(often.folder)
    assert again.evals == often.evals


def test_what_is_not_wanted_is_not_measured(tmp_path: Path) -> None:
    """Families, the size of a forward, and the end."""
    model = load_model()
    forwards: list[int] = []
    inner: Any = getattr(model, "original_model", model)
    inner.register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(len(args[0] if args else kwargs["input_ids"])), with_kwargs=True
    )
    cfg = {**ONE, "eval": {**TREE["eval"], "every_tokens": "50%", "metrics": ["sparsity"], "at_end": False}}
    cfg |= {"out": str(tmp_path), "data": {**SMALL["data"], "rows_per_forward": 16}}
    cfg["eval"] |= {"rows_per_forward": 2}
    found = run(RunConfig.from_dict(cfg), model=model, tokenizer=load_tokenizer())
    assert found.evals == {}
    assert evaluated(found.folder) == [3072, 6144]
    groups = {name.split("/")[1] for name in rows_of(found.folder)[-1] if name.startswith("evals/")}
    assert groups == {"sparsity", "misc_metrics"}
    assert forwards.count(2) == 2 * 512 // 64 // 2, "512 tokens in rows of 64, two of them at a time, and one forward"
    assert set(forwards) == {1, 2, 16}, "one row finds the width of the site"


def test_early_stop_on_held_out_metrics(tmp_path: Path) -> None:
    stop = {"metric": EV, "patience": 1, "min_delta": 10.0}  # never as much: the first row is the best
    found = go(tmp_path, ONE, train={"early_stop": stop})
    assert found.training.tokens == 2048
    assert found.training.stopped is not None
    assert evaluated(found.folder) == [1024, 2048], "what ended the run is the evaluation of its end"
    assert found.evals["a"]["reconstruction_quality"]["explained_variance"] == rows_of(found.folder)[-1][EV]


def test_the_best_checkpoint_by_a_held_out_metric_stays(tmp_path: Path) -> None:
    class Spoil(Callback):
        def on_step_start(self, trainer: SAETrainer) -> None:
            if trainer.steps == 6:
                trainer.saes["a"].W_enc.data.zero_()

    saved = {"every_tokens": 1024, "best": EV, "keep": 1}
    found = go(tmp_path, ONE, Spoil(), checkpoint=saved, optim={"ema": None})
    scores = {row["tokens"]: row[EV] for row in rows_of(found.folder)[:-1]}
    best = max(scores, key=scores.__getitem__)
    assert best <= 3072
    assert [int(path.name) for path in find_checkpoints(found.folder)] == [best, 5120]
    with pytest.raises(ConfigError, match=f"checkpoint.best: 'evals/explained_variance' is not among.*mean '{EV}'"):
        go(tmp_path / "o", ONE, checkpoint={"best": "evals/explained_variance"}, eval={"metrics": ["reconstruction"]})


def test_an_evaluation_that_fails_ends_a_run_that_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room for logits")

    with monkeypatch.context() as patch:
        patch.setattr(sae_kit.training.inputs, "evaluate", fail)
        with pytest.raises(MemoryError, match="no room for logits"):
            go(tmp_path, ONE)
    assert [int(path.name) for path in find_checkpoints(tmp_path / "run")] == [1024]
    found = go(tmp_path, ONE, eval={"rows_per_forward": 1})
    assert found.training.tokens == 6144
    assert evaluated(found.folder) == [2048, 3072, 4096, 5120, 6144]


def test_an_sae_that_diverged_is_left_out(tmp_path: Path) -> None:
    class Diverge(Callback):
        def on_step_start(self, trainer: SAETrainer) -> None:
            trainer.in_training["b"].failed = trainer.steps >= 3

    found = go(tmp_path, TREE, Diverge(), eval={"metrics": ["reconstruction"]})
    rows = rows_of(found.folder)
    assert [f"b/{EV}" in row for row in rows] == [True] + 5 * [False]
    assert all(f"a/{EV}" in row for row in rows), "names stay those of a run of several SAEs"
    assert set(found.evals) == {"a"}
    assert (found.folder / "saes" / "b" / "cfg.json").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"eval": {"every_tokens": 0}}, "eval.every_tokens: 0 of 6,144 rows is less than one"),
        ({"eval": {"every_tokens": "0.001%"}}, "eval.every_tokens: '0.001%' of 6,144 rows is less than one"),
        ({"eval": {"every_tokens": 10.0}}, "eval.every_tokens: expected int or str or None, found 10.0"),
        ({"eval": {"metrics": []}}, "metrics: expected some of"),
        ({"eval": {"metrics": ["fidelty"]}}, "found 'fidelty'. Did you mean 'fidelity'?"),
        ({"eval": {"rows_per_forward": 0}}, "rows_per_forward must be at least 1"),
        ({"checkpoint": {"milestones": [9000]}}, "checkpoint.milestones: 9,000 is beyond the end"),
        (
            {"eval": {"every_tokens": None}, "train": {"early_stop": {"metric": EV}}},
            f"train.early_stop.metric: {EV} is not measured before the end: set eval.every_tokens",
        ),
        (
            {"eval": {"every_tokens": None}, "checkpoint": {"best": EV}},
            f"checkpoint.best: {EV} is not measured before the end: set eval.every_tokens",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        go(tmp_path, ONE, **sections)
    assert message in str(error.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
