"""Learning rates in tokens: ends, warm-up, parts of length zero."""

from itertools import pairwise

import pytest

from sae_kit import TopKSAEConfig
from sae_kit.annealing import KAnnealing, linear_warm_up
from sae_kit.errors import ConfigError
from sae_kit.training.schedules import ScheduleConfig, StepValues

TOTAL, BATCH = 1000, 10


def factors(**fields: object) -> list[float]:
    schedule = ScheduleConfig(**fields).build(TOTAL)  # pyright: ignore[reportArgumentType]
    return [schedule.factor(tokens, BATCH) for tokens in range(0, TOTAL, BATCH)]


def test_wsd_warms_up_holds_and_decays() -> None:
    found = factors(warm_up_tokens=100)
    assert found[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert found[10:80] == pytest.approx([1.0] * 70)
    assert found[90] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(BATCH / 200)


def test_constant_never_moves() -> None:
    assert factors(name="constant", warm_up_tokens=0) == [1.0] * 100


@pytest.mark.parametrize(("name", "middle"), [("cosine", 0.6), ("linear", 0.6)])
def test_main_parts_end_at_their_ratio(name: str, middle: float) -> None:
    found = factors(name=name, warm_up_tokens=0, end_ratio=0.2)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(middle)
    assert found[-1] == pytest.approx(0.2, abs=0.01)
    assert found == sorted(found, reverse=True)


def test_decay_follows_the_main_part() -> None:
    found = factors(name="linear", warm_up_tokens=0, decay_tokens="10%", end_ratio=0.5, decay_end_ratio=0.5)
    assert found[90] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.5, abs=0.01), "from the last value to decay_end_ratio, here the same"
    deeper = factors(name="cosine", warm_up_tokens=0, decay_tokens="10%", end_ratio=0.5, decay_end_ratio=0.2)
    assert deeper[90] == pytest.approx(0.5)
    assert deeper[95] == pytest.approx(0.35)
    assert deeper[-1] == pytest.approx(0.2 + 0.3 * BATCH / 100)


def test_an_exponential_falls_by_equal_factors() -> None:
    found = factors(name="exponential", warm_up_tokens=0, end_ratio=0.04)
    assert (found[0], found[50]) == (1.0, pytest.approx(0.2))
    assert found[-1] == pytest.approx(0.04 ** (1 - BATCH / TOTAL))
    assert [after / before for before, after in pairwise(found)] == pytest.approx([found[1]] * 99)


def test_a_cosine_restarts_but_not_at_its_end() -> None:
    found = factors(name="cosine_restarts", cycles=4, warm_up_tokens=0, decay_tokens=200, end_ratio=0.2)
    assert [found[t] for t in (0, 20, 40, 60)] == pytest.approx([1.0] * 4)
    assert [found[t] for t in (10, 30, 50, 70)] == pytest.approx([0.6] * 4)
    assert found[79] == pytest.approx(0.2, abs=0.01)
    assert found[80] == pytest.approx(0.2), "the decay follows the end of the last cycle"
    assert factors(name="cosine_restarts", end_ratio=0.2) == factors(name="cosine", end_ratio=0.2)


@pytest.mark.parametrize("name", ["wsd", "constant", "cosine", "linear", "exponential", "cosine_restarts"])
@pytest.mark.parametrize(("warm_up", "decay"), [(0, 0), (1000, 0), (0, 1000), (500, 500), (1, 1)])
def test_any_lengths_work(name: str, warm_up: int, decay: int) -> None:
    found = factors(name=name, warm_up_tokens=warm_up, decay_tokens=decay)
    assert all(0 <= factor <= 1 for factor in found)
    assert max(found) == pytest.approx(1.0, abs=0.011), "the full rate is reached, or nearly, whatever the lengths"


def test_parts_must_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"warm-up \(600 tokens\) and decay \(500\) do not fit into train.tokens = 1,000"
    ):
        factors(warm_up_tokens=600, decay_tokens="50%")


@pytest.mark.parametrize("name", ["wsd", "constant"])
def test_a_field_without_effect_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"end_ratio has no meaning in the {name} schedule"):
        factors(name=name, end_ratio=0.1)


def test_cycles_are_of_restarts_alone() -> None:
    with pytest.raises(ConfigError, match="cycles has no meaning in the cosine schedule: choose cosine_restarts"):
        factors(name="cosine", cycles=2)
    with pytest.raises(ConfigError, match="cycles must be at least 1, found 0"):
        factors(name="cosine_restarts", cycles=0)
    with pytest.raises(ConfigError, match="an exponential never comes to 0"):
        factors(name="exponential", end_ratio=0.0)


def test_ratios_are_shares() -> None:
    for name in ("end_ratio", "decay_end_ratio"):
        with pytest.raises(ConfigError, match=f"{name} must lie between 0 and 1, found 7"):
            factors(**{"name": "linear", name: 7.0})
    with pytest.raises(ConfigError, match="decay_end_ratio has no meaning without a decay"):
        factors(name="constant", decay_end_ratio=0.5)


def test_warm_up_of_length_zero_is_over() -> None:
    assert linear_warm_up(0, 0) == 1
    assert [linear_warm_up(t, 100) for t in (0, 25, 100, 1000)] == [0, 0.25, 1, 1]


def test_k_settles_once_whatever_the_length_of_the_batches() -> None:
    cfg = TopKSAEConfig(d_in=4, d_sae=64, k=2, k_annealing=KAnnealing(start=8, tokens=100))
    values, tokens, settled = StepValues(cfg, 1000), 0, []
    for rows in (90, 3, 40, 5, 100, 7):
        if values.k_settles(tokens, rows):
            settled.append(tokens)
        tokens += rows
    assert settled == [133]
    assert StepValues(cfg, 1000).k_settles(133, 40), "a run that goes on there"
