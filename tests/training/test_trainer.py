"""The loop on plain tensors: it learns, it is deterministic, and what is configured reaches the optimizer."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import BATCH, D_IN, TRAINABLE, every_trainable, make_config, make_sae, run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kit import Batch, SAEMetadata, SAETrainer, list_architectures
from sae_kit.errors import ConfigError, DataError, ShapeError
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.training.callbacks import JSONL, Callback
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses, training_pass
from sae_kit.training.optim import OptimConfig, clip_gradients, clipped_parameters
from sae_kit.training.part import SAEInTraining, dead_after
from sae_kit.training.schedules import StepValues


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


@every_trainable
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


@every_trainable
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
    sites = {name: SAEMetadata(hook_name=f"site.{name}") for name in TRAINABLE}
    together = {name: make_config(name, metadata=sites[name]).build() for name in TRAINABLE}
    stream = ({f"site.{name}": rows for name in TRAINABLE} for rows in batches())
    result = SAETrainer(run_config(), together, stream, callbacks=[]).fit()
    for name in TRAINABLE:
        alone = make_config(name).build()
        metrics = fit(alone)
        torch.testing.assert_close(together[name].state_dict(), alone.state_dict(), rtol=0, atol=0)
        assert result.metrics[f"{name}/metrics/l0"] == metrics["metrics/l0"]


@every_trainable
def test_a_batch_may_say_what_is_read_and_what_is_reproduced(name: str) -> None:
    one, two, other = make_sae(name), make_sae(name), make_sae(name)
    fit(one)
    SAETrainer(run_config(), two, (Batch(x, x) for x in batches()), callbacks=[]).fit()
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=0, atol=0)
    shifted = SAETrainer(run_config(), other, (Batch(x, x + 5) for x in batches()), callbacks=[]).fit()
    assert other.b_dec.mean() > two.b_dec.mean(), "the target is y, not x"
    assert shifted.metrics["metrics/explained_variance"] < 0


@every_trainable
def test_one_step_by_hand(name: str) -> None:
    """Projection, clipping and order of a step, against plain SGD written out."""
    sae, reference = (make_sae(name, decoder_norm_constraint="unit", dtype="float64") for _ in range(2))
    for one in (sae, reference):
        one.restore_constraints()
    cfg = run_config(10_000, optim={"lr": 0.1, "clip_grad_norm": 0.01}, schedule={"warm_up_tokens": 0})
    part = SAEInTraining(cfg, "sae", sae)
    part.optimizer = torch.optim.SGD(part.optimizer.param_groups)
    for group in part.optimizer.param_groups:
        group["base_lr"] = 0.1
    x = next(batches()).double()
    part.step(Batch(x, x), 0, 1.0)
    assert all(p.grad is None for p in sae.parameters())
    values = StepValues(reference.cfg, 10**9).at(10**9)
    run = training_pass(reference, Batch(x, x), values)
    training_losses(reference, run, values, DeadLatents(reference, 10**9)).total.backward()
    W_dec = reference.W_dec
    assert W_dec.grad is not None
    radial = (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
    assert radial.abs().max() > 0
    W_dec.grad -= radial.detach()
    grads = {key: p.grad for key, p in reference.named_parameters() if p.grad is not None}
    norm = torch.cat([g.flatten() for key, g in grads.items() if key not in sae.threshold_names]).norm()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            if key in grads:
                parameter -= 0.1 * grads[key] * (1.0 if key in sae.threshold_names else 0.01 / norm)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        for key in reference.threshold_names:
            reference.get_parameter(key).clamp_(min=0)
    for (key, parameter), other in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-4, atol=1e-7, msg=key)


def test_coefficients_warm_up_from_zero() -> None:
    """λ(t) counts the tokens before the step, so the first step has none."""
    sae = make_sae("standard", l1_coefficient=2.0, l1_warm_up_tokens=4 * BATCH)
    part = SAEInTraining(run_config(10), "sae", sae)
    found = []
    for step, x in enumerate(batches(6)):
        part.step(Batch(x, x), step * BATCH, 1.0)
        found.append(part.details["details/l1_coefficient"])
    assert found == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


ONE_PASS = [name for name in TRAINABLE if list_architectures()[name].sae.has_preactivations]
"""Without pursuits, which ask after every latent who is done."""
PENALISED = ("standard", "jumprelu", "gated")


@pytest.mark.parametrize(
    ("sparse_below", "optim", "accumulate"),
    [(None, {"lr": 3e-3}, 1), (0.0, {"lr": 3e-3, "amsgrad": True}, 1), (0.0, {"name": "signum", "ema": 0.9}, 2)],
)
@pytest.mark.parametrize("name", ONE_PASS)
def test_a_step_that_logs_nothing_does_not_wait_for_the_device(
    name: str, sparse_below: float | None, optim: dict[str, Any], accumulate: int
) -> None:
    """Except to count, once, what passes a threshold: unless codes are dense in any case, or their number is known."""
    steered: dict[str, Any] = {"target_l0": 4.0} if name in PENALISED else {}
    sae = make_config(name, **steered).build()
    cfg = run_config(10**6, train={"sparse_below": sparse_below, "accumulate": accumulate}, optim=optim)
    part = SAEInTraining(cfg, "sae", sae)
    data = list(batches(6))
    part.step(Batch(data[0], data[0]), 0, 1.0)  # reads the list of dead latents once

    class Waits(TorchDispatchMode):
        found: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            masked = name.startswith("index") and any(
                isinstance(index, Tensor) and index.dtype == torch.bool
                for index in (args[1] if isinstance(args[1], list | tuple) else ())
            )
            if masked or name in ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "bincount", "masked_select"):
                self.found.append(str(func))
            return func(*args, **(kwargs or {}))

    with Waits() as waits:
        for step, x in enumerate(data[1:], start=1):
            part.step(Batch(x, x), step * BATCH, 0.5)
    counts = sparse_below is None and not hasattr(sae.cfg, "k")
    assert waits.found == ["aten._local_scalar_dense.default"] * (len(data) - 1) * counts


def test_what_the_evaluation_finds_reaches_the_callbacks(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    SAETrainer(
        run_config(3),
        make_sae("topk"),
        batches(3),
        callbacks=[JSONL(path)],
        evaluate=lambda: {"evals/a/b": 0.5, "c": None},
    ).fit()
    last = json.loads(path.read_text().splitlines()[-1])
    assert (last["evals/a/b"], last["c"], last["step"]) == (0.5, None, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"optim": {"lr": 1e-3}},
        {"optim": {"lr": 3e-3, "betas": [0.5, 0.999]}},
        {"optim": {"lr": 3e-3, "betas": [0.9, 0.9]}},
        {"optim": {"lr": 3e-3, "eps": 1e-3}},
        {"optim": {"lr": 3e-3, "name": "adamw", "weight_decay": 0.3}},
        {"optim": {"lr": 3e-3, "clip_grad_norm": 1e-3, "eps": 1e-3}},
        {"optim": {"lr": 3e-3, "amsgrad": True, "betas": [0.9, 0.5]}, "same_as": {"betas": [0.9, 0.5]}},
        {"optim": {"lr": 3e-3, "fused": False}},
        {"optim": {"lr": 3e-3, "name": "sgd"}},
        {"optim": {"lr": 3e-3, "name": "signum"}},
        {"optim": {"lr": 3e-3, "name": "sgd", "momentum": 0.5}, "same_as": {"name": "sgd"}},
        {"optim": {"lr": 3e-3, "name": "signum", "momentum": 0.5}, "same_as": {"name": "signum"}},
        {"schedule": {"name": "constant"}},
        {"schedule": {"name": "linear", "end_ratio": 0.5}},
        {"schedule": {"warm_up_tokens": "50%"}},
        {"schedule": {"decay_tokens": "50%"}},
        {"schedule": {"decay_end_ratio": 0.5}},
        {"schedule": {"name": "exponential"}},
        {"schedule": {"name": "cosine_restarts", "cycles": 3}},
        {"train": {"amp": "bf16"}},
    ],
)
def test_every_number_reaches_the_optimizer(change: dict[str, Any]) -> None:
    base, changed = make_sae("standard"), make_sae("standard")
    same_as = change.get("same_as", {})
    fit(base, optim={"lr": 3e-3, **same_as})
    sections: dict[str, Any] = {section: fields for section, fields in change.items() if section != "same_as"}
    fit(changed, **sections)
    assert not torch.equal(base.W_dec, changed.W_dec)


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
    metrics = trainer.in_training["sae"].metrics.take()
    expected = 1 - (sae(u) - u).square().sum() / (u - u.mean(dim=0)).square().sum()
    assert metrics["metrics/explained_variance"] == pytest.approx(expected.item(), abs=1e-6)


def test_density_is_over_the_last_full_window() -> None:
    sae = make_sae("topk")
    u = list(batches(5))
    metrics = fit(sae, 5, optim={"lr": 0.0}, train={"density_window_tokens": 2 * BATCH})
    window = torch.cat(u[2:4])
    density = (make_sae("topk").encode(window) != 0).double().mean(dim=0)
    again = fit(sae, 5, optim={"lr": 0.0}, train={"density_window_tokens": 2 * BATCH})
    assert again["sparsity/above_1e-1"] == metrics["sparsity/above_1e-1"], "what was counted before does not enter"
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
    closed = []

    class Broken(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
            raise RuntimeError("no disk")

        def close(self) -> None:
            closed.append(True)
            raise RuntimeError("no disk either")

    cfg = run_config(10, log={"console": False, "every_tokens": BATCH})
    with caplog.at_level(logging.WARNING, "sae_kit"):
        assert SAETrainer(cfg, make_sae("topk"), batches(10), callbacks=[Broken()]).fit().steps == 10
    assert [record.getMessage() for record in caplog.records] == [
        "Broken failed in on_log and is switched off; the run goes on"
    ]
    assert closed == [True]


def test_data_that_ends_early_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sae_kit"):
        result = SAETrainer(run_config(10), make_sae("topk"), batches(4), callbacks=[]).fit()
    assert result.tokens == 4 * BATCH
    assert "the data ended after 256 of 640 tokens" in caplog.text


def test_bad_input_is_named() -> None:
    with pytest.raises(DataError, match="the stream of activations is empty"):
        SAETrainer(run_config(), make_sae("topk"), iter(()), callbacks=[]).fit()
    sae = make_sae("topk", normalize_activations="expected_average_only_in")
    with pytest.raises(DataError, match="the stream of activations is empty"):
        SAETrainer(run_config(), sae, iter(()), callbacks=[]).fit()
    with pytest.raises(ShapeError, match=r"SAE 'sae' expects rows of shape \[batch, 32\], found \[4, 31\]"):
        SAETrainer(run_config(), make_sae("topk"), [torch.zeros(4, 31)], callbacks=[]).fit()
    with pytest.raises(ShapeError, match=r"SAE 'sae' expects a target of shape \[4, 32\], found \[4, 31\]"):
        SAETrainer(run_config(), make_sae("topk"), [Batch(torch.zeros(4, 32), torch.zeros(4, 31))], callbacks=[]).fit()
    with pytest.raises(DataError, match=r"SAE 'sae' reads None, the batch holds 'a'"):
        SAETrainer(run_config(), make_sae("topk"), [{"a": torch.zeros(4, 32)}], callbacks=[]).fit()
    with pytest.raises(ConfigError, match="there is no SAE to train"):
        SAETrainer(run_config(), {}, batches(), callbacks=[])
    sae = make_sae("topk")
    with pytest.raises(ConfigError, match="'b' and 'c' are one SAE: train it under one name, or pass a copy"):
        SAETrainer(run_config(), {"a": make_sae("topk"), "b": sae, "c": sae}, batches(), callbacks=[])
    with pytest.raises(ConfigError, match=r"train\.device: expected auto or one of cpu.*, found 'tpu-9'"):
        SAETrainer(run_config(train={"device": "tpu-9"}), make_sae("topk"), batches())


def test_global_randomness_is_left_alone() -> None:
    before = torch.get_rng_state()
    fit(make_sae("topk"))
    assert torch.equal(torch.get_rng_state(), before)
