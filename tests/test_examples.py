"""Examples run, and the benchmark on known features; the others are in test_benchmarks.py."""

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from runs import merged
from test_docs import ROOT

from sae_kit import SAE, RunConfig, cache_activations
from sae_kit import config as trees
from sae_kit.cli import main
from sae_kit.training.config import expand_short_names
from sae_kit.training.sweep import run_configs


def test_training_on_tensors_recovers_the_directions(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_on_tensors.py"))["main"]
    assert main() > 0.9
    assert "explained variance" in capsys.readouterr().out


def test_a_crosscoder_tells_shared_features_from_those_of_one_model() -> None:
    first, shared, second = runpy.run_path(str(ROOT / "examples" / "model_diffing.py"))["main"]()
    assert first >= 10
    assert shared >= 40
    assert second >= 10


def test_patches_of_images_are_made_of_edges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "examples" / "image_patches.py"))
    noise = torch.randn(200, script["SIDE"] ** 2, generator=torch.Generator().manual_seed(0))
    assert script["concentration"](noise).median() < 0.4
    variance, confined = script["main"](["--plot", str(tmp_path / "filters.png")], steps=300)
    assert variance > 0.6
    assert confined > 0.6
    assert "explained variance" in capsys.readouterr().out
    with Image.open(tmp_path / "filters.png") as filters:
        assert filters.size[0] == 16 * 14 * 4
    main = script["main"]
    (tmp_path / "images").mkdir()
    (tmp_path / "filters.png").rename(tmp_path / "images" / "one.png")
    assert 0 < main([str(tmp_path / "images")], steps=20)[0] < 1


def test_the_pipeline_trains_four_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = runpy.run_path(str(ROOT / "examples" / "pipeline.py"))["main"](tmp_path, 8192, 1024)
    assert scores["mean"] is not None
    assert capsys.readouterr().out.count("activations: layer_0") == 4
    assert SAE.load_from_disk(tmp_path / "pipeline" / "saes" / "layer_3").cfg.metadata.sites[0]


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))
FEW: dict[str, Any] = {
    "model": {"name": "demo"},
    "data": {"sources": ["demo"], "context_size": 64, "rows_per_forward": 8, "tokenize_batch": 20},
    "buffer": {"tokens": 512},
    "train": {"tokens": 1024, "batch_tokens": 128, "device": "cpu"},
    "eval": {"tokens": 256, "fidelity_tokens": 128},
    "log": {"console": False, "every_tokens": 256},
}
SMALL = {"d_sae": 128, "k": 4, "matryoshka_widths": [32, 128], "milestones": [512], "warm_up_tokens": 128}
"""Other values of these fields, wherever they are."""


def smaller(tree: Any) -> Any:
    """A tree for the demo's four layers, its sizes so small that a step costs milliseconds."""
    if isinstance(tree, dict):
        return {key: SMALL[key] if key in SMALL else smaller(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [smaller(value) for value in tree]
    return (
        re.sub(r"blocks\.(\d+)", lambda found: f"blocks.{int(found[1]) % 4}", tree) if isinstance(tree, str) else tree
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_as_it_is(path: Path) -> None:
    text = path.read_text()
    (cfg,) = run_configs(trees.load_tree(path))
    assert cfg.saes
    assert text.startswith("# "), "what it trains, and why these numbers"
    assert max(map(len, text.splitlines())) <= 128


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line on the file, on the demo model and few tokens."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tree = smaller(expand_short_names(trees.load_tree(path)))
    few = merged(FEW, {"out": str(tmp_path), "name": "run"})
    if "cache" in tree:
        tree["cache"]["read"] = str(tmp_path / "acts")
        site = tree["saes"]["sae"]["hook"]
        written = {"write": str(tmp_path / "acts"), "sites": site, "tokens": 512}
        cache_activations(RunConfig.from_dict({**few, "cache": written}))
        few = {key: value for key, value in few.items() if key not in ("model", "data", "eval")}
    if any("end_to_end" in entry for entry in tree.get("saes", {}).values()):
        few.pop("buffer")  # for whole contexts there is none
    if (start := tree.get("saes", {}).get("sae", {}).get("start")) is not None:
        assert start.startswith("runs/")
        tree["saes"]["sae"]["start"] = str(tmp_path / "first")
        own = RunConfig.from_dict(merged(tree, few)).saes["sae"].sae
        dataclasses.replace(own, d_in=128, normalize_activations="none").build().save_model(tmp_path / "first")
    (tmp_path / "run.json").write_text(json.dumps(merged(tree, few)))
    assert main(["train", str(tmp_path / "run.json")]) == 0
    (cfg,) = run_configs(merged(tree, few))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: found["status"] for name, found in results.items()} == dict.fromkeys(cfg.saes, "trained")
    for name, entry in cfg.saes.items():
        sae = SAE.load_from_disk(tmp_path / "run" / "saes" / name)
        assert sae.cfg.metadata.sites == entry.sites
        assert (results[name]["evals"] is None) == ("cache" in tree)


def test_the_ground_truth_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "ground_truth.py"))
    for name in script["RECIPES"]:
        script["run_config"](name)
    script["main"](["--architectures", "topk", "--seeds", "0", "--tokens", "20480", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["l0"] == pytest.approx(16, abs=0.5)
    assert 0.3 < found["max_cos"] < 1
