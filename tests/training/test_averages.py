"""Averaged weights, and the controller that brings L0 to a target."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BATCH, every_trainable, make_config, make_sae, run_config, sparse_batches

import sae_kit
from sae_kit import SAE, TopKSAEConfig
from sae_kit.errors import ConfigError
from sae_kit.training.controllers import L0Controller
from sae_kit.training.part import SAEInTraining

GOOD = torch.tensor(False)


@every_trainable
def test_weights_are_averaged_by_tokens(name: str) -> None:
    sae = make_sae(name)
    part = SAEInTraining(run_config(100, optim={"lr": 3e-3, "ema": 0.01}), "sae", sae)
    beta, expected = 0.01 ** (BATCH / 4096), {}
    for step, batch in enumerate(sparse_batches(sae, 5)):
        part.step(batch, step * BATCH, 1.0)
        for key, parameter in sae.named_parameters():
            now = parameter.detach().double()
            expected[key] = beta * expected[key] + (1 - beta) * now if key in expected else now
    assert part.ema is not None
    for key, average in expected.items():
        torch.testing.assert_close(part.ema.weights[key].double(), average, rtol=1e-5, atol=1e-7)
    used = part.for_use()
    assert not torch.equal(used.W_dec, sae.W_dec)
    if sae.cfg.decoder_norm_constraint == "unit":
        torch.testing.assert_close(used.decoder_norms(), torch.ones(sae.d_sae))
    else:
        torch.testing.assert_close(used.W_dec.double(), expected["W_dec"], rtol=1e-5, atol=1e-7)
    assert torch.equal(used.firing_count, sae.firing_count)


def test_without_averages_the_sae_itself_is_used() -> None:
    part = SAEInTraining(run_config(), "sae", make_sae("topk"))
    assert part.for_use() is part.sae


def test_averages_of_half_precision_are_kept_in_float32() -> None:
    sae = make_sae("topk", dtype="bfloat16")
    part = SAEInTraining(run_config(optim={"lr": 3e-3, "ema": 0.5}), "sae", sae)
    for step, batch in enumerate(sparse_batches(sae, 2)):
        part.step(batch, step * BATCH, 1.0)
    assert part.ema is not None
    assert {average.dtype for average in part.ema.weights.values()} == {torch.float32}
    assert part.for_use().dtype == torch.bfloat16


def test_a_run_evaluates_and_saves_the_average(tmp_path: Path) -> None:
    result = sae_kit.train(
        model="demo",
        dataset="demo",
        hook="blocks.2.hook_resid_pre",
        sae=TopKSAEConfig(d_sae=128, k=8, decoder_norm_constraint="unit"),
        tokens=2048,
        out=str(tmp_path),
        data={"context_size": 64},
        buffer={"tokens": 1024},
        train={"batch_tokens": 512},
        optim={"lr": 3e-3, "ema": 0.9},
        eval={"at_end": False, "every_tokens": None},
        log={"console": False},
    )
    saved = SAE.load_from_disk(result.folder / "saes" / "sae").W_dec
    assert torch.equal(saved, result.saes["sae"].W_dec)
    trained = result.training.saes["sae"].to_inference().W_dec
    assert not torch.allclose(saved, trained, atol=1e-4), "not the weights of the last step"
    assert torch.allclose(saved, trained, atol=0.1)


def test_resampled_latents_are_averaged_anew() -> None:
    sae = make_sae("standard")
    part = SAEInTraining(run_config(optim={"lr": 3e-3, "ema": 0.5}), "sae", sae)
    part.step(next(sparse_batches(sae, 1)), 0, 1.0)
    assert part.ema is not None
    before = {key: average.clone() for key, average in part.ema.weights.items()}
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 1
    part.ema.restart(torch.tensor([3, 5]))
    for key in ("W_enc", "b_enc", "W_dec"):
        axis = -1 if key == "W_enc" else 0
        changed = (part.ema.weights[key] != before[key]).movedim(axis, 0).reshape(sae.d_sae, -1).any(dim=1)
        assert changed.nonzero().flatten().tolist() == [3, 5], key
    assert torch.equal(part.ema.weights["b_dec"], before["b_dec"])


def test_the_controller_by_hand() -> None:
    controller = L0Controller(10.0, torch.device("cpu"))
    fast = slow = fast_weight = slow_weight = log_factor = 0.0
    for fired, rows, steers in ((50_000, 4096, False), (90_000, 4096, True), (20_000, 2048, True), (100, 2048, True)):
        controller.observe(torch.tensor(fired), rows, steers=steers, bad=GOOD)
        beta, gamma = math.exp(-rows / 100_000), math.exp(-rows / 300_000)
        fast, fast_weight = beta * fast + (1 - beta) * fired / rows, beta * fast_weight + (1 - beta)
        slow, slow_weight = gamma * slow + (1 - gamma) * fired / rows, gamma * slow_weight + (1 - gamma)
        if steers:
            now, before = fast / fast_weight, slow / slow_weight
            error = math.log(now / 10) + 2 * math.log(now / before)
            log_factor += 1e-3 * rows / 4096 * min(max(error, -0.5), 0.5)
        assert controller.factor.item() == pytest.approx(math.exp(log_factor), rel=1e-12)
    assert log_factor > 0
    controller.observe(torch.tensor(0), 2048, steers=True, bad=~GOOD)
    assert controller.factor.item() == pytest.approx(math.exp(log_factor), rel=1e-12), "skipped steps do not count"


@pytest.mark.parametrize(("l0", "factor"), [(10**6, 100.0), (0, 0.01)])
def test_the_factor_stays_within_two_orders_of_magnitude(l0: int, factor: float) -> None:
    controller = L0Controller(10.0, torch.device("cpu"), rate=1.0)
    for _ in range(20):
        controller.observe(torch.tensor(l0 * 4096), 4096, steers=True, bad=GOOD)
    assert controller.factor.item() == pytest.approx(factor)


def test_a_factor_that_is_too_high_turns_back_before_the_target_is_passed() -> None:
    controller = L0Controller(10.0, torch.device("cpu"), rate=0.1, window=4096)
    for l0 in (200, 150, 100, 50, 25, 14):
        before = controller.factor.item()
        controller.observe(torch.tensor(l0 * 4096), 4096, steers=True, bad=GOOD)
    assert controller.factor.item() < before, "L0 is above its target, and will not be for long"


@pytest.mark.parametrize(("total", "rate", "window"), [(400_000, 0.3072, 5_000), (10**9, 1e-3, 100_000)])
def test_a_short_run_is_steered_faster(total: int, rate: float, window: int) -> None:
    controller = L0Controller.of_run(10.0, torch.device("cpu"), total)
    assert (controller.rate, controller.window) == (pytest.approx(rate), window)


JUMPRELU = {"jumprelu_bandwidth": 0.3, "threshold_lr_factor": 3.0, "jumprelu_init_threshold": 0.1}


@pytest.mark.parametrize(
    ("name", "coefficient", "fields", "steps"),
    [("standard", 30.0, {}, 800), ("gated", 0.25, {}, 800), ("jumprelu", 0.05, JUMPRELU, 1400)],
)
def test_l0_comes_to_its_target(name: str, coefficient: float, fields: dict[str, Any], steps: int) -> None:
    """Though the coefficient begins ten times too high, or too low."""
    weight = "l0_coefficient" if name == "jumprelu" else "l1_coefficient"
    fields = fields | {weight: coefficient, "target_l0": 4.0, "normalize_activations": "expected_average_only_in"}
    sae = make_config(name, **fields).build()
    batches = list(sparse_batches(sae, 400))
    sae.norm_in.estimate(torch.cat([batch.x for batch in batches]))
    part = SAEInTraining(run_config(10**4, optim={"lr": 5e-3}, train={"dead_after_tokens": 10**9}), "sae", sae)
    assert part.controller is not None
    part.controller.rate, part.controller.window = 1.0, 8 * BATCH  # ten times as fast a step as of 4,096 rows
    for step in range(steps):
        part.step(batches[step % 400], step * BATCH, 1.0)
        if step == steps - 200:
            part.metrics.take()
    row = part.row()
    assert row["metrics/l0"] == pytest.approx(4.0, rel=0.05)
    assert row["metrics/target_l0"] == 4.0
    assert row[f"details/{weight}"] == pytest.approx(coefficient * part.controller.factor.item())


def test_targets_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match=r"target_l0 must lie between 0 and d_sae = 96, found 0"):
        make_config("standard", target_l0=0.0)
    with pytest.raises(ConfigError, match="target_l0 moves l1_coefficient, which has to begin above 0"):
        make_config("gated", target_l0=4.0, l1_coefficient=0.0)
