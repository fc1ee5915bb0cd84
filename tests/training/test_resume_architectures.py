"""One run of every trainable architecture, stopped and gone on with in a new process: all of it bit for bit."""

import json
from pathlib import Path

import pytest
from lives import STOPS, live
from runs import STEPS, rows_of, same_end

from sae_kit import list_architectures

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exact")
    live("exact", root)
    return root


def test_everything_is_at_work_when_it_is_stopped(root: Path) -> None:
    """Otherwise going on with it would show nothing."""
    dead = json.loads((root / "whole" / "dead.json").read_text())
    found = {name: architecture.sae for name, architecture in list_architectures().items()}
    assert {name for name, sae in found.items() if sae.trainable and sae.has_preactivations} <= dead.keys()
    assert min(dead.values()) > 0, "AuxK has latents to work on"
    rows = rows_of(root / "whole" / "run")
    assert len(rows) == STEPS
    for name in dead:
        assert any(row[f"{name}/losses/auxiliary_reconstruction_loss"] for row in rows[STEPS // 2 :]), name
    first, last = rows[0], rows[-1]
    for name, metric in (("p", "p"), ("k", "k"), ("jumprelu_l0", "l0_coefficient"), ("gated_l0", "l1_coefficient")):
        assert first[f"{name}/details/{metric}"] != last[f"{name}/details/{metric}"], name
    assert rows[STEPS // 2]["resampled/details/resampled"] > 0


@pytest.mark.parametrize("step", STOPS)
def test_every_architecture_goes_on_bit_for_bit(root: Path, step: int) -> None:
    found = root / str(step) / "run"
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [1] * step + [2] * (STEPS - step)
    same_end(found, root / "whole" / "run")
