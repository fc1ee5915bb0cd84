"""Examples run, and the benchmark on known features; the others are in test_benchmarks.py."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_docs import ROOT

from sae_kit import SAE
from sae_kit.cli import main


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


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_runs(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["train.tokens=2048", "train.batch_tokens=256", "eval.tokens=512", "eval.fidelity_tokens=512"]
    assert main(["train", str(path), *few, f"out={tmp_path}", "name=run"]) == 0
    folders = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert folders
    for folder in folders:
        assert SAE.load_from_disk(folder).cfg.metadata.sites[0]


def test_the_ground_truth_benchmark_runs(capsys: pytest.CaptureFixture[str]) -> None:
    script = runpy.run_path(str(ROOT / "benchmarks" / "ground_truth.py"))
    for name in script["RECIPES"]:
        script["run_config"](name)
    script["main"](["--architectures", "topk", "--seeds", "0", "--tokens", "20480", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["l0"] == pytest.approx(16, abs=0.5)
    assert 0.3 < found["max_cos"] < 1
