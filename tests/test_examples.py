"""Examples and benchmarks run."""

import runpy
import sys

import pytest
from test_docs import ROOT


def test_training_on_tensors_recovers_the_directions(capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "examples" / "train_on_tensors.py"))["main"]
    assert main() > 0.9
    assert "explained variance" in capsys.readouterr().out


def test_the_step_benchmark_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["step.py", "--sizes", "16x64", "--batch", "32", "--repeats", "1", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "benchmarks" / "step.py"), run_name="__main__")
    assert capsys.readouterr().out.count('"products"') == 5
