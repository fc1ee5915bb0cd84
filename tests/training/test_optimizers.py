"""What each optimizer does, what it is given, and what holds for all of them."""

from typing import Any

import pytest
import torch
from helpers import BATCH, batch, fit, make_config, make_sae, run_config, sparse_batches
from torch import Tensor

from sae_kit import RunConfig, SAETrainer
from sae_kit.config import structure
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback
from sae_kit.training.losses import Pass
from sae_kit.training.optim import Momentum, OptimConfig, step_unless
from sae_kit.training.part import SAEInTraining


def build(name: str, **fields: Any) -> OptimConfig:
    return structure(OptimConfig, {"name": name, **fields})


NEVER, ALWAYS = torch.tensor(False), torch.tensor(True)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("sign", [True, False])
def test_momentum_by_hand(sign: bool, momentum: float) -> None:
    parameter = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = Momentum([{"params": [parameter]}], lr=0.1, momentum=momentum, sign=sign)
    expected, m = parameter.detach().clone(), torch.zeros(3)
    for gradient in ([1.0, -2.0, 0.0], [-0.1, -3.0, 1.0], [5.0, 1.0, 1.0]):
        parameter.grad = torch.tensor(gradient)
        m = momentum * m + parameter.grad
        expected = expected - 0.1 * (m.sign() if sign else m)
        step_unless(optimizer, NEVER)
        torch.testing.assert_close(parameter.detach(), expected)


@pytest.mark.parametrize("name", ["adam", "adamw", "signum", "sgd"])
@pytest.mark.parametrize("fields", [{}, {"amsgrad": True}, {"fused": False}], ids=str)
def test_a_step_may_be_skipped_at_any_time_the_first_included(name: str, fields: dict[str, Any]) -> None:
    if fields and name in ("signum", "sgd"):
        with pytest.raises(
            ConfigError, match=f"{next(iter(fields))} has no effect with '{name}': leave it out, or choose"
        ):
            OptimConfig(name=name, **fields)
        return
    found = []
    for skipped in ((), (0, 2)):
        sae = make_sae("topk")
        optimizer = build(name, lr=0.01, **fields).build(sae)
        seeds = iter(range(3))
        for step in range(3 + len(skipped)):
            draw = torch.Generator().manual_seed(99 if step in skipped else next(seeds))
            for parameter in sae.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
                if step in skipped:
                    parameter.grad[0] = torch.nan
            step_unless(optimizer, ALWAYS if step in skipped else NEVER)
        found.append((sae.state_dict(), {key: optimizer.state[p] for key, p in sae.named_parameters()}))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_learning_rates_by_the_width() -> None:
    sae = make_sae("topk")
    for name, rate in (("adam", 2e-4), ("adamw", 2e-4), ("signum", 5e-3)):
        optimizer = build(name).build(sae)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * (2**14 / sae.d_sae) ** 0.5)
    with pytest.raises(ConfigError, match=r"optim\.lr: there is no rule for the learning rate of 'sgd': give a number"):
        OptimConfig(name="sgd").build(sae)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"momentum": 0.5}, "momentum has no effect with 'adam'"),
        ({"name": "signum", "betas": (0.5, 0.9)}, "betas has no effect with 'signum'"),
        ({"name": "sgd", "weight_decay": 0.1}, "weight_decay has no effect with 'sgd'.*name='adamw'"),
        ({"name": "sgd", "momentum": 1.0}, r"betas and momentum must lie in \[0, 1\)"),
        ({"ema": 1.0}, "ema must lie between 0 and 1, or be None, found 1.0"),
    ],
)
def test_fields_without_effect_and_values_that_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**fields)


def test_an_optimizer_of_ones_own_gets_the_groups_and_is_scheduled() -> None:
    seen: list[dict[str, Any]] = []

    def plain(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        seen.extend(dict(group) for group in groups)
        return torch.optim.SGD(groups)

    one, two = make_sae("jumprelu", threshold_lr_factor=0.5), make_sae("jumprelu", threshold_lr_factor=0.5)
    cfg = run_config(5, optim={"lr": 0.01, "name": "sgd", "momentum": 0.0})
    SAETrainer(cfg, one, sparse_batches(one, 5), callbacks=[], optimizer=plain).fit()
    SAETrainer(cfg, two, sparse_batches(two, 5), callbacks=[]).fit()
    assert [group["lr"] for group in seen] == [0.01, 0.01, 0.005]
    torch.testing.assert_close(one.state_dict(), two.state_dict())


def test_entries_of_a_run_have_settings_of_their_own() -> None:
    sae = {"architecture": "topk", "d_sae": 96, "k": 8}
    entries: dict[str, Any] = {
        "plain": {"sae": sae, "hook": "x"},
        "own": {"sae": sae, "hook": "x", "optim": {"name": "signum", "lr": 0.5}, "schedule": {"name": "constant"}},
        "rate": {"sae": sae, "hook": "x", "lr": 0.25},
    }
    cfg = run_config(100, saes=entries, optim={"lr": 1e-3, "betas": [0.5, 0.9]})
    parts = {name: SAEInTraining(cfg, name, make_sae("topk")) for name in entries}
    assert {name: part.optimizer.param_groups[0]["base_lr"] for name, part in parts.items()} == {
        "plain": 1e-3, "own": 0.5, "rate": 0.25,
    }  # fmt: skip
    assert isinstance(parts["own"].optimizer, Momentum)
    assert parts["rate"].optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert [part.schedule.name for part in parts.values()] == ["wsd", "constant", "wsd"]
    assert RunConfig.from_dict({"tokens": 10**6, "saes": entries}).saes["own"].optim["name"] == "signum"
    for wrong, message in (
        ({"optim": {"bettas": [0.1, 0.1]}}, r"unknown key 'saes\.plain\.optim\.bettas' in OptimConfig.*'betas'"),
        ({"schedule": {"warm_up_tokens": "90%"}}, "do not fit into train.tokens"),
        ({"lr": 0.1, "optim": {"lr": 0.1}}, "lr and optim.lr are the same field"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_config(100, saes={"plain": {**entries["plain"], **wrong}})


def test_terms_of_ones_own_are_trained_on_and_logged() -> None:
    def smaller(sae: SAE, data: Batch, run: Pass) -> dict[str, Tensor]:
        assert data.x.shape == run.y_hat.shape
        return {"size_of_b_dec": 1e3 * sae.b_dec.square().sum()}

    plain, pulled = make_sae("topk"), make_sae("topk")
    fit(plain)
    batches = sparse_batches(pulled, 20)
    metrics = SAETrainer(run_config(), pulled, batches, callbacks=[], loss=smaller).fit().metrics
    assert pulled.b_dec.norm() < 0.95 * plain.b_dec.norm()
    assert metrics["losses/size_of_b_dec"] > 0
    assert metrics["losses/overall_loss"] > metrics["losses/mse_loss"] + 0.9 * metrics["losses/size_of_b_dec"]


def test_gradients_are_shown_before_they_are_clipped() -> None:
    norms: list[float] = []

    class Watch(Callback):
        def on_gradients(self, trainer: SAETrainer) -> None:
            grads = [p.grad for sae in trainer.saes.values() for p in sae.parameters() if p.grad is not None]
            norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))

    sae = make_sae("standard")
    cfg = run_config(3, log={"console": False, "every_tokens": 10**9}, optim={"clip_grad_norm": 1e-3})
    metrics = SAETrainer(cfg, sae, sparse_batches(sae, 3), callbacks=[Watch()]).fit().metrics
    assert sum(norms) / 3 == pytest.approx(metrics["optim/grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated", "topk", "batchtopk"])
def test_products_in_bfloat16_and_all_else_in_float32(name: str) -> None:
    """Codes differ by the rounding of a product and train as well; parameters, moments and losses stay float32."""
    metrics, first = [], []
    for amp in ("off", "bf16"):
        sae = make_config(name).build()
        part = SAEInTraining(run_config(60, train={"amp": amp}), "sae", sae)
        stream = list(sparse_batches(sae, 60))
        part.step(stream[0], 0, 0.0)
        first.append(part.metrics.take()["losses/mse_loss"])
        for step, data in enumerate(stream[1:], start=1):
            part.step(data, step * BATCH)
        metrics.append(part.row()["metrics/explained_variance"])
        assert {p.dtype for p in sae.parameters()} == {torch.float32}
        assert {m["exp_avg"].dtype for m in part.optimizer.state.values()} == {torch.float32}
    assert first[0] != first[1]
    assert first[1] == pytest.approx(first[0], rel=2e-2)
    assert metrics[1] == pytest.approx(metrics[0], abs=0.05)


def test_bfloat16_products_need_float32_parameters() -> None:
    with pytest.raises(ConfigError, match=r"train\.amp is for SAEs of float32, found float64: set it to off"):
        SAEInTraining(run_config(train={"amp": "bf16"}), "sae", make_sae("topk", dtype="float64"))
    part = SAEInTraining(run_config(), "sae", make_sae("topk", dtype="bfloat16"))
    part.step(batch(part.sae, BATCH), 0)
    assert part.row()["optim/skipped_steps"] == 0
