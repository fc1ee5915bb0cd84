"""Twenty kills of a run of the command line: it loses an interval at most, no checkpoint, and ends as in one go."""

import json
from pathlib import Path
from typing import Any

import pytest
from lives import INTERVAL, INTERVALS, KILLS, live
from runs import same_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def kills(root: Path) -> list[dict[str, Any]]:
    live("killed", root, 0)
    return json.loads((root / "kills.json").read_text())


def test_nothing_is_lost_but_what_came_after_the_last_checkpoint(kills: list[dict[str, Any]]) -> None:
    assert len(kills) == KILLS
    assert sum(kill["writing"] for kill in kills) >= 3, "killed between checkpoints only"
    saved = 0
    for kill in kills:
        assert not kill["damaged"]
        assert kill["saved"] >= saved, "a checkpoint is gone"
        assert kill["trained"] - kill["saved"] <= INTERVAL
        assert kill["readable"] >= min(2, kill["saved"] // INTERVAL)
        saved = kill["saved"]
    assert INTERVAL * 5 < saved < INTERVAL * INTERVALS, "killed on the way"


def test_it_ends_as_the_run_that_nobody_killed(root: Path, kills: list[dict[str, Any]]) -> None:
    assert kills
    same_end(root / "killed" / "run", root / "whole" / "run")
