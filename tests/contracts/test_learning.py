"""C1, C8, C10: every form learns from its defaults, every parameter is reached, and watching changes nothing."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fields import others_of, refused
from helpers import (
    BATCH,
    GEOMETRIES,
    NORMALIZATIONS,
    TRAINABLE,
    every_trainable,
    every_trainable_form,
    fit,
    has_form,
    make_config,
    make_sae,
    one_pass,
    run_config,
    sparse_batches,
    values_of,
)

from sae_kit import SAETrainer, list_architectures
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses, training_pass


@torch.no_grad()
def reconstruction_error(sae: SAE) -> float:
    """On a batch that training saw: the total also has a penalty, which grows while latents learn to speak."""
    run = one_pass(sae, next(sparse_batches(sae, 1)))
    return float(training_losses(sae, run, values_of(sae), DeadLatents(sae, 10**9)).terms["mse_loss"])


def assert_learns(sae: SAE, steps: int, **sections: Any) -> None:
    untrained = copy.deepcopy(sae)
    metrics = fit(sae, steps, **sections)
    for norm, trained in ((untrained.norm_in, sae.norm_in), (untrained.norm_target, sae.norm_target)):
        norm.load_state_dict(trained.state_dict())
        assert not trained.needs_estimate
    assert torch.isfinite(torch.tensor(list(metrics.values()))).all()
    assert all(parameter.isfinite().all() for parameter in sae.parameters())
    assert reconstruction_error(sae) < 0.95 * reconstruction_error(untrained)


@every_trainable_form
def test_the_default_config_trains(name: str, geometry: str) -> None:
    fields: dict[str, Any] = {"d_in": 32, "d_sae": 512, **GEOMETRIES[geometry]}
    assert_learns(list_architectures()[name].config(**fields).build(), 20)


@pytest.mark.parametrize(
    ("name", "normalization"),
    [(name, key) for name in TRAINABLE for key in NORMALIZATIONS if key != "none" and has_form(name, "sae", key)],
)
def test_every_normalisation_trains(name: str, normalization: str) -> None:
    """Row by row and whitened too."""
    sae = make_config(name, **NORMALIZATIONS[normalization]).build()
    assert_learns(sae, 12, buffer={"norm_estimate_tokens": 5 * BATCH})


@every_trainable_form
def test_every_parameter_is_reached(name: str, geometry: str) -> None:
    sae = make_config(name, geometry).build()
    values, dead = values_of(sae), DeadLatents(sae, 10**9)
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    reached: set[str] = set()
    for batch in sparse_batches(sae, 3):
        run = training_pass(sae, batch, values)
        training_losses(sae, run, values, dead).total.backward()
        for key, parameter in sae.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), key
            if parameter.grad is not None and parameter.grad.any():
                reached.add(key)
        optimizer.step()
        optimizer.zero_grad()
    assert reached == {key for key, _ in sae.named_parameters()}


@every_trainable_form
def test_logging_changes_nothing(name: str, geometry: str) -> None:
    never = make_config(name, geometry).build()
    always = copy.deepcopy(never)
    fit(never, 4)
    seen: list[float] = []

    class Watch(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Mapping[str, Any]) -> None:
            seen.append(metrics["losses/overall_loss"])

    cfg = run_config(4, log={"console": False, "every_tokens": BATCH})
    SAETrainer(cfg, always, sparse_batches(always, 4), callbacks=[Watch()]).fit()
    assert len(seen) == 4
    torch.testing.assert_close(always.state_dict(), never.state_dict(), rtol=0, atol=0)
    assert never.tokens_seen == 4 * BATCH


@every_trainable_form
def test_unit_decoders_stay_unit(name: str, geometry: str) -> None:
    sae = make_config(name, geometry, decoder_norm_constraint="unit").build()
    norms: list[torch.Tensor] = []  # compared below: an error raised inside an observer would only switch it off

    class Watch(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            norms.append(sae.decoder_norms().detach().clone())

    SAETrainer(run_config(3), sae, sparse_batches(sae, 3), callbacks=[Watch()]).fit()
    found = torch.stack(norms)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=0, atol=1e-6)
    assert found.shape == (3, sae.geometry.n_latents)


@pytest.mark.parametrize("name", [name for name in list_architectures() if name not in TRAINABLE])
def test_what_cannot_be_trained_says_so(name: str) -> None:
    sae = make_sae(name)
    with pytest.raises(ConfigError, match=f"{name} SAEs are loaded and used; there is no way to train one"):
        SAETrainer(run_config(), sae, sparse_batches(sae, 1))


# ---- fields that shape training --------------------------------------------------------------------------------------

SEEN_IN_METRICS = ("dead_after_tokens", "aux_coefficient", "aux_k")
"""Fields about dead latents: where these have no gradient, their number and the loss still tell."""


def trained(name: str, some_dead: bool, **fields: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and metrics after a short run, at whose start some latents may be dead."""
    sae = make_config(name, **fields).build()
    if some_dead:
        silence(sae)
    metrics = fit(sae, 10)
    return sae.state_dict(), {key: value for key, value in metrics.items() if not key.startswith("perf/")}


@torch.no_grad()
def silence(sae: SAE) -> None:
    """Make eight latents that are never on: far below their threshold, or never the first of several equal ones."""
    if not sae.has_preactivations:
        sae.W_dec[1:9] = sae.W_dec[0]
    else:
        delta = torch.zeros(sae.geometry.n_latents)
        delta[:8] = -3.0
        sae.shift_preactivations(delta)


@every_trainable
def test_every_training_field_has_an_effect(name: str) -> None:
    """Flip each field that shapes training alone, and see weights or statistics change."""
    fields = {f.name for f in dataclasses.fields(make_config(name)) if f.metadata.get("training_only")}
    for field, wanted in others_of(name).items():
        if field not in fields or refused(name, wanted):
            continue
        some_dead = "dead_after_tokens" in wanted
        base = {key: value for key, value in wanted.items() if key != field}
        state, metrics = trained(name, some_dead, **({} if refused(name, base) else base))
        other_state, other_metrics = trained(name, some_dead, **wanted)
        changed = any(not torch.equal(state[key], other_state[key]) for key in state)
        assert changed or (field in SEEN_IN_METRICS and metrics != other_metrics), field
