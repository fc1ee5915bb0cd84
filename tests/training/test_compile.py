"""`train.compile`: the step through torch.compile gives what it gives without."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import make_sae, run_config

from sae_kit.errors import ConfigError
from sae_kit.training.part import SAEInTraining

TESTS = Path(__file__).parents[1]
ONE_GRAPH = {"batchtopk", "matryoshka_batchtopk", "topk"}
"""What has a known number of entries is one graph; where entries are counted the graph breaks."""


def compared(backend: str, sparse_below: float, *names: str) -> list[dict[str, Any]]:
    command = [sys.executable, TESTS / "compile_cases.py", backend, str(sparse_below), *names]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["name"] for row in rows] == list(names)
    return rows


@pytest.mark.parametrize(
    ("sparse_below", "names"), [(0.0, ("topk", "matryoshka_batchtopk", "jumprelu")), (1.0, ("batchtopk", "gated"))]
)
def test_graphs_train_the_same(sparse_below: float, names: tuple[str, ...]) -> None:
    """Captured, differentiated ahead of time and run by plain operations: `aot_eager` needs no compiler."""
    for row in compared("aot_eager", sparse_below, *names):
        assert row["graphs"] > 0
        assert row["difference"] < 1e-5, row
        assert row["moved"] > 1e-3, row
        assert not (row["breaks"] and (sparse_below == 0 or row["name"] in ONE_GRAPH)), row


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++: runs wherever there is a compiler")
def test_compiled_code_trains_the_same() -> None:
    for row in compared("inductor", 0.0, "topk"):
        assert row["difference"] < 1e-4, row
        assert row["moved"] > 1e-3, row


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: expected one of .*inductor.*, found 'induktor'"):
        SAEInTraining(run_config(10, train={"compile": "induktor"}), "sae", make_sae("topk"))
