"""Checkpoints are due when the config says, in a run in one go and in one that goes on."""

from typing import Any

import pytest

from sae_kit.errors import ConfigError
from sae_kit.training.checkpoint_times import CheckpointConfig


def written_at(total: int, batch: int, start: int = 0, **fields: Any) -> list[int]:
    """Where a run of whole batches has checkpoints, in units of rows."""
    times = CheckpointConfig(**fields).build(total, batch)
    return [t + batch for t in range(start, total // batch * batch, batch) if times.due(t, t + batch)]


def test_linear_spacing_is_at_the_first_step_that_reaches_a_multiple() -> None:
    assert written_at(1000, 10) == list(range(100, 1000, 100))
    assert written_at(1000, 64, every_tokens=250) == [256, 512, 768]
    assert written_at(1000, 64, every_tokens=250, final=True) == [256, 512, 768, 960]
    assert written_at(1000, 100, every_tokens=30) == list(range(100, 1000, 100)), "once a step, not three times"
    assert written_at(1000, 100, every_tokens=None) == []


def test_log_spacing_is_at_the_tokens_of_its_formula() -> None:
    total, count = 10**4, 6
    expected = [total * 1000 ** (i / count - 1) for i in range(1, count + 1)]
    assert [round(at) for at in expected] == [32, 100, 316, 1000, 3162, 10000]
    assert written_at(total, 1, spacing="log", count=count) == [round(at) for at in expected]
    batch = 64
    steps = {min(-(-round(at) // batch), total // batch) * batch for at in expected}
    assert written_at(total, batch, spacing="log", count=count) == sorted(steps)
    assert sorted(steps)[-1] == total // batch * batch, "the last one is there, though the run has whole batches"
    assert written_at(total, batch, spacing="log", count=1) == [total // batch * batch]


@pytest.mark.parametrize(
    "fields", [{}, {"every_tokens": 330, "final": True}, {"spacing": "log"}, {"milestones": (7, 505)}]
)
def test_a_run_that_goes_on_has_its_checkpoints_where_one_in_one_go_has_them(fields: dict[str, Any]) -> None:
    whole = written_at(1000, 8, **fields)
    for at in whole:
        assert written_at(1000, 8, at, **fields) == [tokens for tokens in whole if tokens > at]


def test_milestones_are_due_and_stay() -> None:
    times = CheckpointConfig(milestones=(150, 995), every_tokens=400).build(1000, 20)
    steps = [(t, t + 20) for t in range(0, 1000, 20)]
    assert [after for before, after in steps if times.due(before, after)] == [160, 400, 800, 1000]
    assert [after for before, after in steps if times.stays(before, after)] == [160, 1000]


def test_the_clock_counts_too_but_not_at_the_end() -> None:
    times = CheckpointConfig(every_minutes=5.0, every_tokens=None).build(1000, 10)
    assert [times.due(10, 20, minutes) for minutes in (0.0, 4.9, 5.0, 60.0)] == [False, False, True, True]
    assert not times.due(990, 1000, 60.0)
    assert not CheckpointConfig(every_minutes=None, every_tokens=None).build(1000, 10).due(10, 20, 1e6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, found 0"),
        ({"spacing": "log", "count": 0}, "count must be at least 1"),
        ({"every_minutes": 0.0}, "every_minutes must be greater than 0 or None, found 0.0"),
        ({"every_minutes": float("nan")}, "every_minutes must be greater than 0"),
        ({"count": 5}, "count has no meaning in linear spacing"),
        ({"spacing": "log", "every_tokens": 10}, "every_tokens has no meaning in log spacing"),
        ({"milestones": (0,)}, "milestones: expected .* at least 1, found 0"),
        ({"signals": ("TERM",)}, "signals: expected names of signals .* found 'TERM'"),
        ({"signals": ("SIGKILL",)}, "signals: .* that can be caught, .* found 'SIGKILL'"),
    ],
)  # fmt: skip
def test_configs_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every_tokens": 0}, "every_tokens: 0 of 1,000 rows is less than one"),
        ({"every_tokens": "0.01%"}, "every_tokens: '0.01%' of 1,000 rows"),
        ({"every_tokens": "half"}, "checkpoint.every_tokens: expected a number of tokens"),
        ({"milestones": (500, 1001)}, "milestones: 1,001 is beyond the end, train.tokens = 1,000"),
    ],
)
def test_times_that_a_run_cannot_have_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CheckpointConfig(**fields).build(1000, 10)
