"""Where this field has slipped in training, and the right behaviour: a test for each that sees the mistake put back.

The numbers are those of a list of mistakes found in published code. Each test says in one place what others test in
parts. Still to come are rows about what does not exist yet:

- R3, R13, R17 for several processes: counters, tanh_quad and gradient norms over ranks;
- R18: a permutation of latents, which has to move moments, thresholds and counters;
- R19: chunks of latents and micro-batches within a step, and their peak memory;
- R21, R22: files of sparsify, OpenAI, Llama Scope and OpenMOSS;
- R24: masked rows of a batch.

test_mistakes_in_use.py has what concerns the use of SAEs. R15, the geometric median and resampling, is in
training/test_init.py and training/test_resampling.py.
"""

import math
from typing import Any

import pytest
import torch
from fields import refused
from helpers import (
    BATCH,
    D_SAE,
    FORMS,
    NORMALIZATIONS,
    TRAINABLE,
    batch,
    estimated,
    fit,
    inputs,
    make_config,
    make_sae,
    one_pass,
    run_config,
    values_of,
)
from torch import Tensor

from sae_kit import SAE
from sae_kit.data.batch import Batch
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Pass, training_losses
from sae_kit.training.optim import OptimConfig
from sae_kit.training.part import SAEInTraining

AUX = {"aux_coefficient": 1.0, "aux_k": 8}
WITH_AUXK = [name for name in TRAINABLE if not refused(name, {"aux_coefficient": 1.0, "pre_act_loss_coefficient": 1.0})]
SELECTING = pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka_batchtopk"])


def with_dead(sae: SAE, dead: list[int]) -> DeadLatents:
    """These latents have been silent for long; others were when the list was made, and fired again."""
    sae.tokens_since_fired.zero_()
    sae.tokens_since_fired[dead] = 1000
    counters = DeadLatents(sae, 1000)
    counters.candidates = torch.tensor([*dead, *(latent + 1 for latent in dead[-1:])], dtype=torch.int64)
    return counters


def auxk(sae: SAE, run: Pass, dead: list[int]) -> Tensor:
    """AuxK alone: the gated SAE has a term of that name besides."""
    name = "auxiliary_reconstruction_loss"
    alone = training_losses(sae, run, values_of(sae), with_dead(sae, [])).terms.get(name, torch.zeros(()))
    return training_losses(sae, run, values_of(sae), with_dead(sae, dead)).terms[name] - alone


@pytest.mark.parametrize(
    ("name", "geometry"),
    [
        form
        for form in FORMS
        if form[0] in WITH_AUXK and form[1] in ("sae", "skip_transcoder", "crosscoder", "clt_skip")
    ],
)
def test_r01_auxk_trains_dead_latents_and_nothing_else(name: str, geometry: str) -> None:
    """Encoder columns, bias and decoder rows of the dead; no living latent, no b_dec, skip or threshold, no target."""
    sae = make_sae(name, geometry, dtype="float64", **AUX)
    data = batch(sae, 60)
    y = data.y.clone().requires_grad_()
    dead = list(range(10, 40)) if sae.geometry.layers == 1 else list(range(D_SAE + 10, D_SAE + 40))
    auxk(sae, one_pass(sae, Batch(data.x, y)), dead).backward()
    assert y.grad is None or not y.grad.any(), "what is to be explained is a constant"
    for key, parameter in sae.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if key in ("b_dec", "W_skip", "r_mag", *sae.threshold_names):
            assert not found.any(), key
            continue
        if key.startswith("W_dec"):
            moved = found.flatten(1).any(dim=1)
        elif key == "W_enc":
            moved = found.movedim(-1, 1 if sae.geometry.cross_layer else 0)
            moved = moved.flatten(2).any(dim=2).flatten() if sae.geometry.cross_layer else moved.flatten(1).any(dim=1)
        else:
            moved = found.flatten() != 0
        layer = int(key.partition(".")[2] or 0)
        alive = torch.ones(sae.geometry.n_latents, dtype=torch.bool)
        alive[dead] = False
        alive = sae.geometry.latents(alive, layer) if key.startswith("W_dec") else alive
        assert not moved[alive].any(), key
        encodes = key in ("W_enc", "b_enc", "b_mag")
        holds_dead = layer == dead[0] // D_SAE if key.startswith("W_dec") else encodes
        assert moved.any() == holds_dead, key


@pytest.mark.parametrize("name", WITH_AUXK)
@pytest.mark.parametrize("number", [5, 30])
def test_r02_b_dec_is_counted_once(name: str, number: int) -> None:
    """Not part of what dead latents explain, be they few or many: shifting the data with it changes nothing."""
    sae = make_sae(name, dtype="float64", apply_b_dec_to_input=True, **AUX)
    data, dead = batch(sae, 60), list(range(10, 10 + number))
    before = auxk(sae, one_pass(sae, data), dead)
    with torch.no_grad():
        sae.b_dec += 5.0
    after = auxk(sae, one_pass(sae, Batch(data.x + 5.0, data.x + 5.0)), dead)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalization", [key for key in NORMALIZATIONS if key != "none"])
def test_r02_auxk_lives_in_training_space(normalization: str) -> None:
    """Residual and explanation are those of an SAE that sees normalised rows and knows of no normalisation."""
    sae = estimated(make_sae("topk", dtype="float64", **AUX, **NORMALIZATIONS[normalization]), 9.0)
    plain = make_sae("topk", dtype="float64", **AUX)
    data = batch(sae, 60)
    data = Batch(9 * data.x, 9 * data.x)
    x, dead = sae.norm_in(data.x), list(range(10, 40))
    found, expected = (auxk(one, one_pass(one, rows), dead) for one, rows in ((sae, data), (plain, Batch(x, x))))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@SELECTING
def test_r03_a_selected_latent_of_value_zero_has_not_fired(name: str) -> None:
    sae = make_sae(name, k=D_SAE, aux_coefficient=0.5)  # all are selected
    with torch.no_grad():
        sae.b_enc[:7] = -1000.0
        sae.W_enc[:, 7] = sae.b_enc[7] = 0.0
        sae.b_dec.zero_()
    signed = name == "abstopk"
    part = SAEInTraining(run_config(1000, optim={"lr": 0.0}), "sae", sae)
    for step in range(3):
        part.step(batch(sae, BATCH - step), BATCH * step, 1.0)
    rows = 3 * BATCH - 3
    assert sae.tokens_seen == rows, "real rows, once a step, however often losses look"
    assert (sae.tokens_since_fired[:7] == (0 if signed else rows)).all()
    assert sae.firing_count[7] == 0
    assert sae.tokens_since_fired[7] == rows
    assert 0 < sae.firing_count[8:].sum() <= rows * D_SAE


@pytest.mark.parametrize("shape", [(), (4,), (4, 5)], ids=str)
def test_r04_the_step_sees_preactivations_around_the_threshold(shape: tuple[int, ...]) -> None:
    """Also those below it, whose code is 0; summed over all leading axes."""
    from sae_kit.architectures.jumprelu import _Step

    h = torch.tensor([0.96, 1.04, 0.8, 1.2]).expand(*shape, 4)  # below, above, and beyond the window
    theta = torch.ones(4, requires_grad=True)
    _Step.apply(h, theta, 0.2, False).sum().backward()
    torch.testing.assert_close(theta.grad, torch.tensor([-5.0, -5.0, 0.0, 0.0]) * math.prod(shape))


def test_r04_the_jump_s_window_is_symmetric_too() -> None:
    from sae_kit.architectures.jumprelu import _Jump

    h = torch.tensor([[0.96, 1.04, 0.8, 1.2]])
    theta = torch.ones(4, requires_grad=True)
    _Jump.apply(h, theta, 0.2, False).sum().backward()
    torch.testing.assert_close(theta.grad, torch.tensor([-5.0, -5.0, 0.0, 0.0]))


def test_r04_the_sparsity_term_reaches_latents_just_below_their_threshold() -> None:
    sae = make_sae("jumprelu", jumprelu_bandwidth=0.2)
    data = batch(sae, 200)
    run = one_pass(sae, data)
    sae.sparsity_losses(run.encoding, run.y, values_of(sae))["l0_loss"].backward()
    theta = sae.get_parameter("threshold")
    h = sae.preactivations(run.x).detach()
    near = ((h - theta).abs() < 0.1).float()
    assert ((h < theta) * near).sum() > 10
    torch.testing.assert_close(theta.grad, -near.sum(dim=0) / 0.2 / 200)


def test_r04_thresholds_stay_in_float32_at_or_above_zero_and_leave_it() -> None:
    fields: dict[str, Any] = {"dtype": "bfloat16", "jumprelu_init_threshold": 0.0, "jumprelu_bandwidth": 1.0}
    sae = make_config("jumprelu", **fields, l0_coefficient=5.0).build()
    seen: list[Tensor] = []
    part = SAEInTraining(run_config(100, optim={"lr": 1e-2}), "sae", sae)
    for step in range(10):
        part.step(batch(sae, BATCH, seed=step), BATCH * step, 1.0)
        seen.append(sae.get_parameter("threshold").detach().clone())
    found = torch.stack(seen)
    assert found.dtype == torch.float32
    assert (found >= 0).all()
    assert (found[-1] > 0).all()
    assert not torch.equal(found, found.bfloat16().float()), "small steps are not rounded away"
    pulled = make_config("jumprelu", **{**fields, "jumprelu_init_threshold": 0.02}, l0_coefficient=0.0).build()
    fit(pulled, 10, optim={"lr": 1e-2})
    assert (pulled.get_parameter("threshold") >= 0).all()
    assert (pulled.get_parameter("threshold") == 0).any(), "the reconstruction alone pulls thresholds down"


@pytest.mark.parametrize("normalization", ["none", "layer_norm", "row_norm"])
def test_r08_levels_share_one_weight(normalization: str) -> None:
    """Levels that reconstruct the same: their loss is the mean, not the sum. No dead latent is no error."""
    fields = {**NORMALIZATIONS[normalization], "use_matryoshka_aux_loss": True}
    sae = make_sae("matryoshka_batchtopk", matryoshka_widths=(20, 40, 60, 80), **fields)
    with torch.no_grad():
        sae.W_dec.zero_()  # every prefix now reconstructs the same
    run = one_pass(sae, batch(sae, 40))
    losses = training_losses(sae, run, values_of(sae), with_dead(sae, []))
    torch.testing.assert_close(losses.total, losses.terms["mse_loss"])
    assert losses.terms.keys() == {"mse_loss", *(f"inner_mse_loss_{width}" for width in (20, 40, 60, 80))}


def test_r12_the_gates_own_reconstruction_is_in_training_space_with_a_frozen_decoder() -> None:
    sae = make_sae("gated", normalize_activations="expected_average_only_in")
    sae.norm_in.scale.fill_(0.1)
    u = 10 * inputs(sae, 40)
    run = one_pass(sae, Batch(u, u))
    term = sae.sparsity_losses(run.encoding, run.y, values_of(sae))["auxiliary_reconstruction_loss"]
    x = u / 10
    gate = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.get_parameter("b_gate"))
    expected = (gate @ sae.W_dec + sae.b_dec - x).square().sum(dim=1).mean()
    torch.testing.assert_close(term, expected, rtol=1e-4, atol=1e-4)
    term.backward()
    assert sae.W_dec.grad is None
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.any()


@pytest.mark.parametrize("mode", ["step", "quadratic", "tanh", "tanh_quad"])
def test_r13_a_mode_with_a_coefficient_is_on(mode: str) -> None:
    fields: dict[str, Any] = {"target_l0": 5.0} if mode == "quadratic" else {}
    make = {"jumprelu_sparsity_loss_mode": mode, **fields}
    off, on, double = (make_sae("jumprelu", l0_coefficient=c, **make) for c in (0.0, 0.7, 1.4))
    terms = []
    for sae in (off, on, double):
        run = one_pass(sae, batch(sae, 60))
        terms.append(training_losses(sae, run, values_of(sae), DeadLatents(sae, 10**9)).terms["l0_loss"])
        terms[-1].backward()
    assert terms[0] == 0
    assert terms[1] > 0
    torch.testing.assert_close(terms[2], 2 * terms[1])
    gradient = on.get_parameter("threshold").grad
    assert gradient is not None
    assert gradient.any()
    metrics = fit(make_config("jumprelu", **make).build(), 4)
    assert 0 < metrics["losses/l0_loss"] < float("inf")


@pytest.mark.parametrize("name", WITH_AUXK)
def test_r13_none_is_off_and_never_one(name: str) -> None:
    sizes = {}
    for value in (None, 0.5, 1.0):
        sae = make_sae(name, pre_act_loss_coefficient=value, pre_act_on="all")
        terms = training_losses(sae, one_pass(sae, batch(sae, 30)), values_of(sae), DeadLatents(sae, 10**9)).terms
        sizes[value] = terms.get("pre_act_loss")
    assert sizes[None] is None
    torch.testing.assert_close(2 * sizes[0.5], sizes[1.0])
    assert sizes[1.0] > 0


@pytest.mark.parametrize("where", ["dead", "all"])
def test_r14_pre_act_loss_compares_the_threshold_with_what_is_gated(where: str) -> None:
    """E_b Σ relu(θ − h)·n with n as a constant; θ = 0 and π for the gated SAE, θ = 0 and h without thresholds."""
    dead = list(range(5, 25))
    for name in ("jumprelu", "gated", "standard"):
        sae = make_sae(name, dtype="float64", pre_act_loss_coefficient=0.5, pre_act_on=where)
        run = one_pass(sae, batch(sae, 30))
        term = training_losses(sae, run, values_of(sae), with_dead(sae, dead)).terms["pre_act_loss"]
        h = (run.x - sae.b_dec) @ sae.W_enc + (sae.get_parameter("b_gate") if name == "gated" else sae.b_enc)
        theta = sae.get_parameter("threshold") if name == "jumprelu" else torch.zeros(D_SAE)
        each = torch.relu(theta - h) * sae.decoder_norms()
        expected = 0.5 * (each[:, dead] if where == "dead" else each).sum(dim=1).mean()
        torch.testing.assert_close(term, expected, msg=name)
        term.backward()
        assert sae.W_dec.grad is None, "a lone gradient would shrink the decoder rows of dead latents"


@pytest.mark.parametrize("geometry", ["sae", "crosscoder", "clt"])
def test_r16_order_of_a_step(geometry: str) -> None:
    """Twice: project → clip → AdamW with its lr, betas, eps and decay → unit rows → no gradient left."""
    sae, other = (make_sae("standard", geometry, dtype="float64", decoder_norm_constraint="unit") for _ in range(2))
    optim = {"name": "adamw", "lr": 0.02, "betas": [0.5, 0.9], "eps": 1e-4, "weight_decay": 0.3, "clip_grad_norm": 2.0}
    cfg = run_config(1000, optim=optim, schedule={"warm_up_tokens": 0})
    part = SAEInTraining(cfg, "sae", sae)
    moments = {key: (torch.zeros_like(p), torch.zeros_like(p)) for key, p in other.named_parameters()}
    for step in range(2):
        data = batch(sae, BATCH, seed=step)
        part.step(data, BATCH * step, 1.0)
        assert all(parameter.grad is None for parameter in sae.parameters())
        total = training_losses(other, one_pass(other, data), values_of(other), DeadLatents(other, 10**9)).total
        names, parameters = zip(*other.named_parameters(), strict=True)
        grads = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
        for key, parameter in other.named_parameters():
            if key.startswith("W_dec"):
                layer, rows = int(key.partition(".")[2] or 0), parameter.detach().flatten(1)
                normals = other.geometry.normals(rows)
                flat = grads[key].flatten(1)
                grads[key] = (flat - (flat * normals).sum(1, keepdim=True) * normals).view_as(parameter)
                assert layer < other.geometry.layers
        norm = torch.cat([grad.flatten() for grad in grads.values()]).norm()
        assert norm > 2.0, "clipping matters"
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                grad, (m, v) = grads[key] * 2.0 / (norm + 1e-6), moments[key]
                m.mul_(0.5).add_(0.5 * grad)
                v.mul_(0.9).add_(0.1 * grad**2)
                parameter *= 1 - 0.02 * (0.3 if key.startswith("W_") else 0.0)
                corrected = (v / (1 - 0.9 ** (step + 1))).sqrt() + 1e-4
                parameter -= 0.02 * m / (1 - 0.5 ** (step + 1)) / corrected
            other.geometry.scale_decoder(other.W_dec, 1 / other.decoder_norms())
        for (key, one), reference in zip(sae.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(one, reference, rtol=1e-7, atol=1e-8, msg=f"{key} in step {step}")


def test_r16_what_is_configured_reaches_the_optimizer() -> None:
    sae = make_sae("jumprelu", threshold_lr_factor=0.1)
    optimizer = OptimConfig(name="adamw", lr=3e-3, betas=(0.1, 0.2), eps=1e-5, weight_decay=0.7).build(sae)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.1, 0.2), 1e-5)
        thresholds = any(p is sae.get_parameter("threshold") for p in group["params"])
        assert group["lr"] == pytest.approx(3e-4 if thresholds else 3e-3)
        assert group["weight_decay"] == (0.7 if group["params"][0] is sae.W_enc else 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(sae.parameters()))


def test_r17_the_gradient_norm_leaves_thresholds_out_and_silent_latents_in() -> None:
    """The norm that is logged is that of all gradients together; 1/ε of a threshold would drown them."""
    sae, twin = (make_sae("jumprelu", l0_coefficient=1000.0) for _ in range(2))
    data = batch(sae, BATCH)
    part = SAEInTraining(run_config(100, optim={"lr": 0.0, "clip_grad_norm": 1e-3}), "sae", sae)
    part.step(data, 0, 1.0)
    training_losses(twin, one_pass(twin, data), values_of(twin), DeadLatents(twin, 10**9)).total.backward()
    grads = {key: p.grad for key, p in twin.named_parameters() if p.grad is not None}
    norm = torch.cat([grad.flatten() for key, grad in grads.items() if key != "threshold"]).norm()
    assert part.metrics.take()["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert grads["threshold"].norm() > norm
