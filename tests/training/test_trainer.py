"""The loop on plain tensors: it learns, it is deterministic, and what is configured reaches the optimizer."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, D_IN, make_config, make_sae
from torch import Tensor

from sae_kit import Batch, RunConfig, SAEMetadata, SAETrainer
from sae_kit.errors import ConfigError, DataError, NonFiniteError, ShapeError
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.training.callbacks import JSONL, Callback
from sae_kit.training.optim import OptimConfig, clip_gradients, clipped_parameters
from sae_kit.training.trainer import dead_after

BATCH = 64
every = pytest.mark.parametrize("name", ARCHITECTURES)


def run_config(steps: int = 20, **sections: Any) -> RunConfig:
    """A run of `steps` batches without console output."""
    sections.setdefault("log", {"console": False, "every_tokens": 10**9})
    sections.setdefault("optim", {"lr": 3e-3})
    train = {"tokens": steps * BATCH, "batch_tokens": BATCH, "device": "cpu", **sections.pop("train", {})}
    return RunConfig.from_dict({**sections, "train": train})


def batches(steps: int = 20, seed: int = 0, scale: float = 5.0) -> Iterator[Tensor]:
    """Sparse combinations of 48 fixed directions."""
    draw = generator(seed, "data")
    directions = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=generator(7, "directions")), dim=1)
    for _ in range(steps):
        on = torch.rand(BATCH, 48, generator=draw) < 0.1
        yield scale * (on * torch.rand(BATCH, 48, generator=draw)) @ directions


def fit(sae: SAE, steps: int = 20, seed: int = 0, **sections: Any) -> dict[str, float | int]:
    result = SAETrainer(run_config(steps, **sections), sae, batches(steps, seed), callbacks=[]).fit()
    return result.metrics


@every
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_the_default_config_trains(name: str, normalize: str) -> None:
    sae = make_config(name, normalize_activations=normalize).build()
    losses = []

    class Watch(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
            losses.append(metrics["losses/mse_loss"])

    cfg = run_config(60, log={"console": False, "every_tokens": 10 * BATCH})
    result = SAETrainer(cfg, sae, batches(60), callbacks=[Watch()]).fit()
    assert len(losses) == 6
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0]
    assert result.tokens == 60 * BATCH == sae.tokens_seen
    assert result.steps == 60
    assert result.metrics["metrics/explained_variance"] > 0
    for parameter in sae.parameters():
        assert parameter.isfinite().all()


@every
def test_one_seed_gives_one_result_and_logging_changes_nothing(name: str) -> None:
    one, two, other, logged = (make_config(name).build(seed=seed) for seed in (0, 0, 1, 0))
    fit(one)
    fit(two)
    fit(other)
    fit(logged, log={"console": False, "every_tokens": 1})
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(one.state_dict(), logged.state_dict(), rtol=0, atol=0)
    assert not torch.equal(one.W_dec, other.W_dec)


def test_several_saes_train_as_each_alone() -> None:
    sites = {name: SAEMetadata(hook_name=f"site.{name}") for name in ARCHITECTURES}
    together = {name: make_config(name, metadata=sites[name]).build() for name in ARCHITECTURES}
    stream = ({f"site.{name}": rows for name in ARCHITECTURES} for rows in batches())
    result = SAETrainer(run_config(), together, stream, callbacks=[]).fit()
    for name in ARCHITECTURES:
        alone = make_config(name).build()
        metrics = fit(alone)
        torch.testing.assert_close(together[name].state_dict(), alone.state_dict(), rtol=0, atol=0)
        assert result.metrics[f"{name}/metrics/l0"] == metrics["metrics/l0"]


def test_a_batch_may_say_what_is_read_and_what_is_reproduced() -> None:
    one, two = make_sae("topk"), make_sae("topk")
    fit(one)
    SAETrainer(run_config(), two, (Batch(x, x) for x in batches()), callbacks=[]).fit()
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"optim": {"lr": 1e-3}},
        {"optim": {"lr": 3e-3, "betas": [0.5, 0.999]}},
        {"optim": {"lr": 3e-3, "betas": [0.9, 0.9]}},
        {"optim": {"lr": 3e-3, "eps": 1e-3}},
        {"optim": {"lr": 3e-3, "name": "adamw", "weight_decay": 0.3}},
        {"optim": {"lr": 3e-3, "clip_grad_norm": 1e-3, "eps": 1e-3}},
        {"schedule": {"name": "constant"}},
        {"schedule": {"name": "linear", "end_ratio": 0.5}},
        {"schedule": {"warm_up_tokens": "50%"}},
        {"schedule": {"decay_tokens": "50%"}},
        {"schedule": {"decay_end_ratio": 0.5}},
    ],
)
def test_every_number_reaches_the_optimizer(change: dict[str, Any]) -> None:
    base, changed = make_sae("standard"), make_sae("standard")
    fit(base)
    fit(changed, **change)
    assert not torch.equal(base.W_dec, changed.W_dec)


@every
def test_every_training_field_has_an_effect(name: str) -> None:
    """Flip each field that shapes training alone, and see the weights change."""
    other: dict[str, Any] = {
        "decoder_init_norm": 0.5,
        "decoder_norm_constraint": "unit",
        "dead_after_tokens": BATCH,
        "l1_coefficient": 0.1,
        "l1_warm_up_tokens": "50%",
        "lp_norm": 0.5,
        "detach_aux_decoder": False,
        "jumprelu_init_threshold": 0.3,
        "jumprelu_bandwidth": 0.5,
        "jumprelu_sparsity_loss_mode": "tanh",
        "jumprelu_ste_to_input": True,
        "l0_coefficient": 0.1,
        "l0_warm_up_tokens": "50%",
        "jumprelu_tanh_scale": 1.0,
        "frequency_scale": 0.5,
        "threshold_lr_factor": 0.1,
        "aux_coefficient": 0.0,
        "aux_k": 2,
    }
    needs: dict[str, dict[str, Any]] = {
        "target_l0": {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 12.0},
        "jumprelu_tanh_scale": {"jumprelu_sparsity_loss_mode": "tanh"},
        "frequency_scale": {"jumprelu_sparsity_loss_mode": "tanh_quad"},
        "jumprelu_ste_to_input": {"jumprelu_init_threshold": 0.2, "jumprelu_bandwidth": 0.5},
    }
    if name == "topk":  # a few latents are dead from early on
        needs |= {key: {"dead_after_tokens": BATCH} for key in ("aux_coefficient", "aux_k")}
    fields = [f.name for f in dataclasses.fields(make_config(name)) if f.metadata.get("training_only")]
    for field in fields:
        if field == "dead_after_tokens" and name != "topk":
            continue  # all report dead latents, AuxK alone trains on them
        base = needs.get(field, {})
        flipped = {**base, field: 6.0 if field == "target_l0" else other[field]}
        one, two = make_config(name, **base).build(), make_config(name, **flipped).build()
        fit(one, 30)
        fit(two, 30)
        assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)), field


@every
def test_unit_decoders_stay_unit(name: str) -> None:
    sae = make_config(name, decoder_norm_constraint="unit").build()
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(sae.d_sae))

    class Watch(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            torch.testing.assert_close(sae.decoder_norms(), torch.ones(sae.d_sae), rtol=0, atol=1e-6)

    SAETrainer(run_config(), sae, batches(), callbacks=[Watch()]).fit()


def test_thresholds_never_become_negative_and_can_leave_zero() -> None:
    sae = make_config("jumprelu", jumprelu_init_threshold=0.02, jumprelu_bandwidth=1.0, l0_coefficient=0.0).build()
    fit(sae, 40, optim={"lr": 1e-2})
    threshold = sae.get_parameter("threshold").detach()
    assert (threshold >= 0).all()
    assert (threshold == 0).any(), "the reconstruction alone pulls thresholds down"
    zero = torch.zeros_like(threshold)
    sae.get_parameter("threshold").data.copy_(zero)
    sae.cfg = dataclasses.replace(sae.cfg, l0_coefficient=5.0)
    fit(sae, 40, optim={"lr": 1e-2})
    assert (sae.get_parameter("threshold") > 0).any()


def test_clipping_uses_the_true_norm_without_thresholds() -> None:
    sae = make_sae("jumprelu")
    for parameter in sae.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    threshold = sae.get_parameter("threshold")
    before = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    expected = torch.cat([g.flatten() for name, g in before.items() if name != "threshold"]).norm()
    norm = clip_gradients(clipped_parameters(sae), 0.5)
    torch.testing.assert_close(norm, expected)
    for name, parameter in sae.named_parameters():
        factor = 1.0 if parameter is threshold else 0.5 / expected
        torch.testing.assert_close(parameter.grad, before[name] * factor, rtol=1e-5, atol=1e-7)
    assert clip_gradients(clipped_parameters(sae), 100.0) == pytest.approx(0.5, rel=1e-5)


def test_groups_of_the_optimizer() -> None:
    sae = make_sae("jumprelu", threshold_lr_factor=0.1)
    optimizer = OptimConfig(name="adamw", weight_decay=0.2, lr=1e-2).build(sae)
    found = {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert found[sae.W_enc] == found[sae.W_dec] == (1e-2, 0.2)
    assert found[sae.b_enc] == found[sae.b_dec] == (1e-2, 0.0)
    assert found[sae.get_parameter("threshold")] == (pytest.approx(1e-3), 0.0)
    assert optimizer.defaults["fused"]
    auto = OptimConfig().build(sae)
    assert auto.param_groups[0]["lr"] == pytest.approx(2e-4 * (2**14 / sae.d_sae) ** 0.5)


def test_the_first_batches_are_estimated_on_and_trained_on() -> None:
    sae = make_config("topk", normalize_activations="expected_average_only_in").build()
    first = next(batches())
    fit(sae, 1)
    torch.testing.assert_close(sae.norm_in.scale, D_IN**0.5 / first.norm(dim=1).mean())
    assert sae.norm_in.rows == BATCH
    assert sae.tokens_seen == BATCH
    before = sae.norm_in.scale.clone()
    fit(sae, 3, seed=1)
    assert torch.equal(sae.norm_in.scale, before), "statistics that are known are kept"


def test_metrics_are_exact_over_their_window() -> None:
    sae = make_sae("topk")
    sae.requires_grad_(False)
    u = torch.cat(list(batches(4)))
    error, centred = sae(u) - u, u - u.mean(dim=0)
    frozen = make_sae("topk")
    metrics = fit(frozen, 4, optim={"lr": 0.0}, train={"dead_after_tokens": 2 * BATCH})
    expected = 1 - error.square().sum() / centred.square().sum()
    assert metrics["metrics/explained_variance"] == pytest.approx(expected.item(), abs=1e-6)
    assert metrics["metrics/l0"] == pytest.approx((sae.encode(u) != 0).sum().item() / len(u))
    assert metrics["losses/mse_loss"] == pytest.approx(error.square().sum(dim=1).mean().item(), rel=1e-5)
    silent = (sae.encode(u[-2 * BATCH :]) == 0).all(dim=0).sum().item()
    assert metrics["sparsity/dead_features"] == silent
    assert metrics["sparsity/dead_fraction"] == silent / sae.d_sae
    assert metrics["details/n_training_samples"] == 4 * BATCH


@pytest.mark.parametrize("lengths", [[256], [64, 64, 64, 64], [100, 100, 56]])
def test_metrics_do_not_depend_on_the_batch_size(lengths: list[int]) -> None:
    sae = make_sae("topk")
    u = torch.cat(list(batches(4)))
    cfg = run_config(1, optim={"lr": 0.0}, train={"tokens": 256, "batch_tokens": lengths[0]})
    trainer = SAETrainer(cfg, sae, iter(u.split(lengths)), callbacks=[])
    for part in u.split(lengths):
        trainer.step(part)
    metrics = trainer.parts["sae"].metrics.compute()
    expected = 1 - (sae(u) - u).square().sum() / (u - u.mean(dim=0)).square().sum()
    assert metrics["metrics/explained_variance"] == pytest.approx(expected.item(), abs=1e-6)


def test_density_is_over_the_last_full_window() -> None:
    sae = make_sae("topk")
    u = list(batches(5))
    metrics = fit(sae, 5, optim={"lr": 0.0}, train={"density_window_tokens": 2 * BATCH})
    window = torch.cat(u[2:4])
    density = (make_sae("topk").encode(window) != 0).double().mean(dim=0)
    expected = torch.log10(density + 1e-10).mean().item()
    assert metrics["metrics/mean_log10_feature_sparsity"] == pytest.approx(expected, abs=1e-6)
    assert metrics["sparsity/above_1e-1"] == (density > 0.1).sum().item()


def test_when_latents_count_as_dead() -> None:
    cfg = run_config(1000)
    assert dead_after(make_sae("topk"), cfg) == 100 * BATCH
    assert dead_after(make_sae("topk", dead_after_tokens="20%"), cfg) == 200 * BATCH
    given = run_config(1000, train={"dead_after_tokens": 77})
    assert dead_after(make_sae("topk"), given) == 77
    assert dead_after(make_sae("topk", dead_after_tokens=5), given) == 5
    assert dead_after(make_sae("topk"), run_config(1, train={"tokens": 10**10})) == 10**7


def test_rows_are_logged_as_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    cfg = run_config(10, log={"console": False, "every_tokens": 3 * BATCH})
    SAETrainer(cfg, make_sae("topk"), batches(10), callbacks=[JSONL(path)]).fit()
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["tokens"] for row in found] == [3 * BATCH, 6 * BATCH, 9 * BATCH, 10 * BATCH]
    assert [row["step"] for row in found] == [3, 6, 9, 10]
    assert all(row["losses/mse_loss"] > 0 for row in found)


def test_a_failing_observer_is_dropped_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
            raise RuntimeError("no disk")

    cfg = run_config(10, log={"console": False, "every_tokens": BATCH})
    with caplog.at_level(logging.WARNING, "sae_kit"):
        assert SAETrainer(cfg, make_sae("topk"), batches(10), callbacks=[Broken()]).fit().steps == 10
    assert [record.getMessage() for record in caplog.records] == [
        "Broken failed in on_log and is switched off; the run goes on"
    ]


def test_data_that_ends_early_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sae_kit"):
        result = SAETrainer(run_config(10), make_sae("topk"), batches(4), callbacks=[]).fit()
    assert result.tokens == 4 * BATCH
    assert "the data ended after 256 of 640 tokens" in caplog.text


def test_divergence_stops_with_its_place() -> None:
    def poisoned() -> Iterator[Tensor]:
        yield from batches(3)
        yield torch.full((BATCH, D_IN), float("nan"))

    with pytest.raises(
        NonFiniteError, match=r"SAE 'sae' diverged: its loss became nan within the 4 steps \(256 tokens\)"
    ):
        SAETrainer(run_config(4), make_sae("topk"), poisoned(), callbacks=[]).fit()


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="the stream of activations is empty"):
        SAETrainer(run_config(), make_sae("topk"), iter(()), callbacks=[]).fit()
    sae = make_sae("topk", normalize_activations="expected_average_only_in")
    with pytest.raises(DataError, match="the stream of activations is empty"):
        SAETrainer(run_config(), sae, iter(()), callbacks=[]).fit()
    with pytest.raises(ShapeError, match=r"SAE 'sae' expects rows of shape \[batch, 32\], found \[4, 31\]"):
        SAETrainer(run_config(), make_sae("topk"), [torch.zeros(4, 31)], callbacks=[]).fit()
    with pytest.raises(DataError, match=r"SAE 'sae' reads None, the batch holds 'a'"):
        SAETrainer(run_config(), make_sae("topk"), [{"a": torch.zeros(4, 32)}], callbacks=[]).fit()
    with pytest.raises(ConfigError, match="there is no SAE to train"):
        SAETrainer(run_config(), {}, batches(), callbacks=[])


def test_global_randomness_is_left_alone() -> None:
    before = torch.get_rng_state()
    fit(make_sae("topk"))
    assert torch.equal(torch.get_rng_state(), before)
