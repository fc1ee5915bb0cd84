"""k and p over a run: ends, middles, lengths of zero, and a penalty that does not jump."""

import math
from typing import Any

import pytest
import torch
from helpers import BATCH, batch, every_trainable, fit, inputs, make_config, make_sae, one_pass, values_of

from sae_kit import GatedSAE, StandardSAE
from sae_kit.annealing import KAnnealing, PAnnealing
from sae_kit.errors import ConfigError
from sae_kit.ops import l0
from sae_kit.training.schedules import StepValues

TOTAL = 1000


def test_k_stays_comes_down_and_stays() -> None:
    annealing = KAnnealing(start=100, cold_tokens=200, tokens=400)
    at = {t: annealing.k(10.0, t, TOTAL) for t in (0, 199, 200, 300, 400, 599, 600, 999)}
    assert at == {0: 100, 199: 100, 200: 100, 300: 78, 400: 55, 599: 11, 600: 10, 999: 10}  # 77.5 and 10.2, rounded up


def test_k_falls_exponentially() -> None:
    annealing = KAnnealing(start=100, tokens=TOTAL, shape="exponential")
    found = [annealing.k(10.0, t, TOTAL) for t in range(0, TOTAL, 100)]
    share = [(1 - math.exp(-3 * t / TOTAL)) / (1 - math.exp(-3)) for t in range(0, TOTAL, 100)]
    assert found == [math.ceil(100 - 90 * part) for part in share]
    assert found[5] < 0.5 * (found[0] + 10), "fast at first"


@pytest.mark.parametrize("rate", [0.01, 1.0, 8.0])
def test_the_rate_of_an_exponential(rate: float) -> None:
    annealing = KAnnealing(start=100_000, cold_tokens=100, tokens=800, shape="exponential", rate=rate)
    start, middle, end = (annealing.k(0.0, t, TOTAL) for t in (100, 500, 900))
    assert (start, end) == (100_000, 0)
    assert middle == pytest.approx(100_000 / (1 + math.exp(rate / 2)), abs=1), "(e^(-r/2) − e^(-r)) / (1 − e^(-r))"
    linear = KAnnealing(start=100_000, cold_tokens=100, tokens=800)
    assert abs(middle - linear.k(0.0, 500, TOTAL)) < 200 or rate > 0.01, "a line in the limit"


def test_k_starts_at_a_multiple_of_its_end() -> None:
    annealing = KAnnealing(start="10x", tokens=TOTAL)
    assert [annealing.k(8.0, t, TOTAL) for t in (0, 500, 1000)] == [80, 44, 8]
    assert annealing.k(0.25, 0, TOTAL) == 3, "2.5, rounded up"
    assert KAnnealing(start="1.5x").k(8.0, 0, TOTAL) == 12


def test_k_ends_at_a_fraction_but_moves_in_whole_numbers() -> None:
    annealing = KAnnealing(start=12, tokens="50%")
    found = [annealing.k(7.5, t, TOTAL) for t in range(0, TOTAL, 50)]
    assert found[10:] == [7.5] * 10
    assert all(k == round(k) and k >= 7.5 for k in found[:10])
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("fields", [{"tokens": 0}, {"cold_tokens": 0, "tokens": 0, "shape": "exponential"}])
def test_annealing_of_length_zero_is_over(fields: dict[str, Any]) -> None:
    assert KAnnealing(start=100, **fields).k(10.0, 0, TOTAL) == 10


def test_p_moves_in_equal_steps() -> None:
    annealing = PAnnealing(start=1.0, end=0.2, start_tokens=200, end_tokens=600, n_updates=4)
    found = [annealing.p(t, TOTAL) for t in (0, 199, 200, 299, 300, 400, 500, 599, 600, 999)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.4, 0.2, 0.2])
    assert PAnnealing(start_tokens=300, end_tokens=300).p(300, TOTAL) == pytest.approx(0.2)
    assert PAnnealing(start_tokens=300, end_tokens=300).p(299, TOTAL) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KAnnealing(start=0), "k_annealing.start must be at least 1, found 0"),
        (lambda: KAnnealing(start="ten"), "a number of latents, or a multiple of k as \"10x\", found 'ten'"),
        (lambda: KAnnealing(start=9, rate=2.0), "k_annealing.rate has no meaning in the linear shape"),
        (lambda: KAnnealing(start=9, shape="exponential", rate=0.0), "k_annealing.rate must be positive, found 0.0"),
        (lambda: make_config("topk", k_annealing=KAnnealing(start="0.5x")), "k_annealing.start must lie between k = 8"),
        (lambda: make_config("topk", k_annealing=KAnnealing(start="20x")), "d_sae = 96, found 20x"),
        (lambda: PAnnealing(start=0.5, end=0.6), "p_annealing needs 0 < end <= start, found 0.6 and 0.5"),
        (lambda: PAnnealing(end=0.0), "p_annealing needs 0 < end <= start"),
        (lambda: PAnnealing(n_updates=0), "must be at least 1"),
        (lambda: PAnnealing(start_tokens=500, end_tokens=400).p(0, TOTAL), r"end_tokens \(400\) lies before"),
        (lambda: make_config("topk", k_annealing=KAnnealing(start=7)), "k_annealing.start must lie between k = 8"),
        (lambda: make_config("topk", k_annealing=KAnnealing(start=97)), "d_sae = 96, found 97"),
        (
            lambda: make_config("topk", selection="groupmax", k_annealing=KAnnealing(start=16)),
            "k_annealing does not fit it",
        ),
        (lambda: make_config("standard", lp_norm=2.0, p_annealing=PAnnealing()), "p_annealing sets p itself"),
    ],
)
def test_impossible_annealings(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_k_settles_once() -> None:
    cfg = make_config("topk", k_annealing=KAnnealing(start=16, cold_tokens=100, tokens=400))
    values = StepValues(cfg, TOTAL)
    assert [t for t in range(0, TOTAL, 50) if values.k_settles(t, 50)] == [500]
    assert [t for t in range(0, TOTAL, 70) if values.k_settles(t, 70)] == [560], "the first step at or after the end"
    constant = StepValues(make_config("topk"), TOTAL)
    assert not any(constant.k_settles(t, 50) for t in range(0, TOTAL, 50))
    at_once = StepValues(make_config("topk", k_annealing=KAnnealing(start=16, tokens=0)), TOTAL)
    assert not any(at_once.k_settles(t, 50) for t in range(0, TOTAL, 50)), "k never was another one"


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])
def test_training_follows_k(name: str) -> None:
    sae = make_sae(name, k_annealing=KAnnealing(start=20, tokens="50%"))
    schedule = StepValues(sae.cfg, TOTAL)
    data = batch(sae, 40)
    for tokens, k in ((0, 20), (250, 14), (500, 8)):
        run = one_pass(sae, data, k=schedule.at(tokens)["k"])
        assert l0(run.encoding.codes).sum() == 40 * k


@pytest.mark.parametrize("name", ["standard", "gated"])
def test_the_penalty_does_not_jump_when_p_changes(name: str) -> None:
    """λ is multiplied by mean(P_p) / mean(P_p') over the last `window` steps, measured on the same codes."""
    annealing = PAnnealing(start=1.0, end=0.4, start_tokens=0, end_tokens=TOTAL, n_updates=2, window=2)
    sae = make_sae(name, dtype="float64", l1_coefficient=0.5, p_annealing=annealing)
    schedule = StepValues(sae.cfg, TOTAL)
    encodings = [sae.encoding(inputs(sae, 20, seed=seed) * (1 + seed)) for seed in range(3)]
    assert isinstance(sae, StandardSAE | GatedSAE)
    penalty = torch.no_grad()(sae.penalty)
    for step, encoding in enumerate(encodings):
        assert schedule.at(10 * step)["l1_coefficient"] == 0.5
        schedule.observe(sae, encoding)
    before = sum(penalty(one, 1.0) for one in encodings[1:])  # the first has left the window
    after = sum(penalty(one, 0.7) for one in encodings[1:])
    values = schedule.at(TOTAL // 2)
    assert values["p"] == pytest.approx(0.7)
    assert values["l1_coefficient"] == pytest.approx(float(0.5 * before / after))
    assert schedule.at(TOTAL // 2 + 10) == values, "once for each change"
    schedule.observe(sae, encodings[0])
    second = schedule.at(TOTAL)
    assert second["p"] == pytest.approx(0.4)
    ratio = float(penalty(encodings[0], 0.7) / penalty(encodings[0], 0.4))
    assert second["l1_coefficient"] == pytest.approx(values["l1_coefficient"] * ratio)


def test_a_change_without_measurements_leaves_the_coefficient() -> None:
    cfg = make_config("standard", l1_coefficient=0.5, p_annealing=PAnnealing(start_tokens=0, end_tokens=0))
    values = StepValues(cfg, TOTAL).at(0)
    assert (values["p"], values["l1_coefficient"]) == (pytest.approx(0.2), 0.5)


@every_trainable
def test_values_without_annealing_are_the_config_s(name: str) -> None:
    sae = make_sae(name)
    values = values_of(sae)
    for field, coefficient in sae.cfg.coefficients().items():
        assert values[field] == coefficient.value
    assert "p" not in values
    assert "k" not in values


def test_p_annealing_reaches_the_trainer() -> None:
    annealing = PAnnealing(start_tokens=0, end_tokens=2 * BATCH, n_updates=1, window=1)
    metrics = fit(make_config("standard", p_annealing=annealing).build(), 4)
    assert metrics["details/p"] == pytest.approx(0.2)
    assert metrics["details/l1_coefficient"] != 1.0
