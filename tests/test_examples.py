"""Examples run, and the benchmark on known features; the others are in test_benchmarks.py."""

import json
import runpy
from pathlib import Path

import pytest
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
