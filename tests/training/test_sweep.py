"""Sweeps: what they stand for, in every way of writing them, and what is refused."""

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_kit import RunConfig, TopKSAEConfig
from sae_kit.cli import SOME_FAILED, configured, main, parse_train
from sae_kit.errors import ConfigError, NonFiniteError, OutputExistsError, TrainingInterrupted, UnknownConfigKeyError
from sae_kit.training.callbacks import read_metrics
from sae_kit.training.results import compare
from sae_kit.training.sweep import LARGEST, expand_sweep, run_configs, train_sweep

HOOK = "blocks.2.hook_resid_pre"
BASE = {"hook": HOOK, "sae": {"architecture": "topk", "d_sae": 64, "k": 4}}
RUN = {"model": "demo", "dataset": "demo", "tokens": 9000}


def sweep(**section: Any) -> dict[str, Any]:
    return {**RUN, "sweep": {"base": BASE, **section}}


def names(tree: dict[str, Any]) -> list[str]:
    (run,) = expand_sweep(tree)
    return list(run["saes"])


def test_a_grid_is_every_combination() -> None:
    grid = {"sae.k": [2, 4], "lr": [1e-4, 3e-4], "seed": [0, 1]}
    (run,) = expand_sweep(sweep(grid=grid, name="k{sae.k}-lr{lr}-s{seed}"))
    expected = itertools.product(*grid.values())
    assert [(e["sae"]["k"], e["lr"], e["seed"]) for e in run["saes"].values()] == list(expected)
    assert list(run["saes"])[:3] == ["k2-lr0.0001-s0", "k2-lr0.0001-s1", "k2-lr0.0003-s0"]
    assert "sweep" not in run
    cfg = RunConfig.from_dict(sweep(grid=grid, name="k{sae.k}-lr{lr}-s{seed}"))
    assert cfg == RunConfig.from_dict(run)
    entry = cfg.saes["k4-lr0.0003-s1"]
    assert isinstance(entry.sae, TopKSAEConfig)
    assert (entry.sae.k, entry.lr, entry.seed, entry.hook, entry.sae.d_sae) == (4, 3e-4, 1, HOOK, 64)


def test_a_zip_goes_in_step_and_crosses_the_grid() -> None:
    tree = sweep(zip={"sae.k": [2, 8], "sae.d_sae": [32, 128]}, grid={"seed": [0, 1]})
    (run,) = expand_sweep(tree)
    assert list(run["saes"]) == ["k2-d_sae32-seed0", "k2-d_sae32-seed1", "k8-d_sae128-seed0", "k8-d_sae128-seed1"]
    assert run["saes"]["k8-d_sae128-seed0"]["sae"] == {"architecture": "topk", "d_sae": 128, "k": 8}


def test_names_without_a_template_say_what_differs() -> None:
    assert names(sweep(grid={"hook": [HOOK, "blocks.1.hook_resid_post"], "sae.skip": [True, False]})) == [
        f"{HOOK}-skiptrue",
        f"{HOOK}-skipfalse",
        "blocks.1.hook_resid_post-skiptrue",
        "blocks.1.hook_resid_post-skipfalse",
    ]
    assert names(sweep(grid={"hook": [["a", "b"]]})) == ["hooka+b"]
    assert names(sweep(grid={"init": [{"encoder": "transpose", "encoder_factor": 0.5}, None]})) == [
        "initencoder=transpose+encoder_factor=0.5",
        "initNone",
    ]
    assert names(sweep(grid={"seed": [0, 1]}, name="{sae.architecture}-{seed}")) == ["topk-0", "topk-1"]


def test_the_one_sae_of_a_run_is_the_base_of_a_sweep_without_one() -> None:
    tree = {**RUN, "hook": HOOK, "sae": BASE["sae"], "sweep": {"grid": {"sae.k": [1, 2]}}}
    assert RunConfig.from_dict(tree) == RunConfig.from_dict(sweep(grid={"sae.k": [1, 2]}))
    of_objects = {**tree, "sae": TopKSAEConfig(d_sae=64, k=4)}
    assert RunConfig.from_dict(of_objects) == RunConfig.from_dict(tree)
    beside = {**RUN, "saes": {"other": BASE}, "sweep": {"base": BASE, "grid": {"seed": [7]}}}
    assert names(beside) == ["other", "seed7"], "with a base, other SAEs stay beside it"


def test_fields_of_the_run_make_runs() -> None:
    tree = sweep(grid={"train.batch_tokens": [512, 1024], "sae.k": [1, 2], "run.seed": [5]})
    runs = run_configs({**tree, "name": "b{train.batch_tokens}"})
    assert [(cfg.name, cfg.train.batch_tokens, cfg.seed, list(cfg.saes)) for cfg in runs] == [
        ("b512", 512, 5, ["k1", "k2"]),
        ("b1024", 1024, 5, ["k1", "k2"]),
    ]
    with pytest.raises(ConfigError, match=r"make 2 runs, and one was expected"):
        RunConfig.from_dict(tree)
    with pytest.raises(ConfigError, match=r"2 runs would all be called 'x': put \{train.batch_tokens\}"):
        expand_sweep({**sweep(grid={"train.batch_tokens": [512, 1024]}), "name": "x"})


def test_a_tree_without_a_sweep_is_itself() -> None:
    tree = {**RUN, "hook": HOOK, "sae": BASE["sae"]}
    assert expand_sweep(tree) == [tree]


def test_what_is_given_is_not_changed() -> None:
    tree = sweep(grid={"sae.k": [1, 2], "train.batch_tokens": [512, 1024]})
    before = repr(tree)
    first, second = expand_sweep(tree)
    first["saes"]["k1"]["sae"]["d_sae"] = 1
    assert repr(tree) == before
    assert second["saes"]["k1"]["sae"]["d_sae"] == 64


def test_files_and_command_line_say_the_same(tmp_path: Path) -> None:
    tree = sweep(grid={"sae.k": [1, 2], "lr": [1e-4]})
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    cfg = RunConfig.from_dict(tree)
    assert configured("train", [str(tmp_path / "sweep.yaml")]) == cfg
    longer = RunConfig.from_dict({**tree, "sweep": {"base": BASE, "grid": {"sae.k": [1, 2, 3], "lr": [1e-4]}}})
    assert configured("train", [str(tmp_path / "sweep.yaml"), "sweep.grid={sae.k: [1, 2, 3], lr: [1e-4]}"]) == longer
    words = ["--model", "demo", "--dataset", "demo", "--hook", HOOK, "--tokens", "9000", "--arch", "topk"]
    words += ["--sae.d_sae", "64", "--sae.k", "4", "sweep.grid.sae.k=[1, 2]", "sweep.grid.lr=[1e-4]"]
    assert RunConfig.from_dict(parse_train(words)) == cfg


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"gird": {"lr": [1]}}, "unknown key 'sweep.gird' in SweepConfig. Did you mean 'grid'?"),
        ({}, "sweep: there is nothing to sweep"),
        ({"grid": {"lrr": [1.0]}}, "sweep.grid: unknown field 'lrr'. Did you mean 'lr'?"),
        ({"grid": {"k": [1]}}, "sweep.grid: unknown field 'k'. Did you mean 'sae.k'?"),
        ({"grid": {"tokens": [9000]}}, "sweep.grid: unknown field 'tokens'. Did you mean 'train.tokens'?"),
        ({"grid": {"saes": [{}]}}, "sweep.grid: unknown field 'saes'."),
        ({"grid": {"run.sed": [1]}}, "sweep.grid: unknown field 'run.sed'. Did you mean 'seed'?"),
        ({"grid": {"sae.kk": [1]}}, "unknown key 'sweep.sae.kk' in TopKSAEConfig. Did you mean 'k'?"),
        ({"grid": {"sae.kk": [1]}}, "(SAE 'kk1')"),
        ({"grid": {"sae.k": ["x"]}}, "sweep.sae.k: expected int, found 'x'"),
        ({"grid": {"sae.k": [0]}}, "sweep.sae: k must lie between 1 and d_sae = 64, found 0"),
        ({"grid": {"lr": 1e-4}}, "sweep.grid.lr: expected a list of values, found 0.0001"),
        ({"grid": {"lr": []}}, "sweep.grid.lr: expected a list of values, found []"),
        ({"grid": {"sae.k": [1], "sae": {"k": [2]}}}, "sweep.grid.sae.k is given twice"),
        ({"grid": {"lr": [1.0]}, "zip": {"lr": [1.0]}}, "lr is in grid and in zip"),
        ({"zip": {"lr": [1.0], "seed": [1, 2]}}, "expected lists of one length, found lr 1, seed 2"),
        ({"grid": {"lr.x": [1.0]}}, "sweep.lr: expected float or None, found {'x': 1.0}"),
        ({"grid": {"hook.x": [1.0]}}, f"sweep: hook is '{HOOK}', not a section that could hold hook.x"),
        ({"grid": {"lr": [1e-4, 1e-4]}}, "two SAEs would be called 'lr0.0001'"),
        ({"grid": {"lr": [1e-4], "seed": [0, 1]}, "name": "{lr}"}, "two SAEs would be called '0.0001'"),
        ({"grid": {"lr": [1e-4]}, "name": "{sae.q}"}, "{sae.q} is not swept and not set."),
        ({"grid": {"sae.k": [1]}, "name": "{sae.kk}"}, "Did you mean 'sae.k'?"),
        ({"grid": {"lr": [1e-4]}, "name": "{lr"}, "expected each field between two braces, found '{lr'"),
        ({"grid": {"lr": [1e-4]}, "name": "a/{lr}"}, "'a/0.0001' cannot be the name of a folder"),
        ({"grid": {"hook": ["x" * 300]}}, "and at most 200 bytes"),
        ({"grid": {"hook": ["x\0"]}}, "cannot be the name of a folder"),
        ({"grid": {"seed": list(range(100)), "sae.k": list(range(1, 101))}}, f"at most {LARGEST:,} are trained"),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        expand_sweep(sweep(**section))
    assert message in str(error.value)
    assert isinstance(error.value, UnknownConfigKeyError) == message.startswith(("unknown key", "(SAE"))


def test_a_sweep_without_a_base_needs_exactly_one_sae() -> None:
    for saes, found in (({}, "none"), ({"a": BASE, "b": BASE}, "a, b")):
        with pytest.raises(ConfigError, match=f"exactly one SAE to take its place; found {found}"):
            expand_sweep({**RUN, "saes": saes, "sweep": {"grid": {"lr": [1.0]}}})
    with pytest.raises(ConfigError, match="two SAEs would be called 'seed7'"):
        expand_sweep({**RUN, "saes": {"seed7": BASE}, "sweep": {"base": BASE, "grid": {"seed": [7]}}})


def test_sweeps_train_and_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Entries of one run share its pass; runs come one after the other, and what is finished is not begun again."""
    fields = {"data": {"context_size": 64, "tokenize_batch": 20}, "buffer": {"tokens": 1024}}
    fields |= {"eval": {"at_end": False, "every_tokens": None}, "log": {"console": False}}
    fields |= {"out": str(tmp_path), "tokens": 1024, "name": "b{train.batch_tokens}"}
    tree = {**sweep(grid={"sae.k": [2, 4], "train.batch_tokens": [256, 512]}), **fields}
    folders = train_sweep(tree)
    assert folders == [tmp_path / "b256", tmp_path / "b512"]
    assert sorted(path.name for path in (folders[0] / "saes").iterdir()) == ["k2", "k4"]
    assert [read_metrics(folder / "metrics.jsonl")[-1]["step"] for folder in folders] == [4, 2]
    table = compare([tmp_path])
    assert set(table.fields) == {"sae.k", "train.batch_tokens"}
    assert [(row["run"], row["sae"], row["sae.k"], row["train.batch_tokens"], row["tokens"]) for row in table.rows] == [
        (f"b{rows}", f"k{k}", k, rows, 1024) for rows in (256, 512) for k in (2, 4)
    ]
    shutil.rmtree(folders[1])
    before = {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")}
    with caplog.at_level(logging.INFO, "sae_kit"):
        assert train_sweep(tree) == folders
    assert caplog.text.count("is finished already") == 1
    assert {path: path.stat().st_mtime_ns for path in folders[0].rglob("*")} == before
    assert compare([tmp_path]).rows[2]["sae.k"] == 2
    with pytest.raises(OutputExistsError):
        train_sweep({**tree, "seed": 1})


def test_a_run_that_diverges_does_not_keep_the_others_from_their_turn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"data": {"context_size": 64, "tokenize_batch": 20}, "buffer": {"tokens": 1024}, "out": str(tmp_path)}
    fields |= {"eval": {"at_end": False, "every_tokens": None}, "log": {"console": False, "every_tokens": 256}}
    fields |= {"name": "{run.optim.lr}", "schedule": {"warm_up_tokens": 0}}
    tree = {**sweep(grid={"run.optim.lr": [1e30, 1e-3]}), **fields, "tokens": 2048}
    tree["train"] = {"batch_tokens": 256, "nonfinite_limit": 2}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    with caplog.at_level(logging.WARNING, "sae_kit"):
        assert main(["train", str(tmp_path / "sweep.yaml")]) == SOME_FAILED
    assert "1e+30 has no results: SAE 'sae' diverged" in caplog.text
    assert (tmp_path / "0.001" / "results.json").is_file()
    with pytest.raises(NonFiniteError):
        train_sweep({**tree, "sweep": {"base": BASE, "grid": {"run.optim.lr": [1e30]}}})


def test_who_stops_a_sweep_is_told_how_all_of_it_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(cfg: RunConfig) -> None:
        raise TrainingInterrupted(2, 1, 512, tmp_path / "checkpoint", tmp_path)

    monkeypatch.setattr("sae_kit.training.run.run", stopped)
    grid = {"train.batch_tokens": [256, 512, 1024]}
    with caplog.at_level(logging.WARNING, "sae_kit"), pytest.raises(TrainingInterrupted):
        train_sweep({**sweep(grid=grid), "out": str(tmp_path)})
    assert "goes on with this run, and with the 2 that follow" in caplog.text
