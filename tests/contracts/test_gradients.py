"""C3, C10: gradients of whole losses, in float64, against plain autograd over dense tensors and against differences."""

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from fields import refused
from helpers import (
    NORMALIZATIONS,
    TRAINABLE,
    TRAINABLE_FORMS,
    batch,
    estimated,
    every_form,
    every_trainable_form,
    has_form,
    inputs,
    make_sae,
    one_pass,
    values_of,
)
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.ops import SparseCodes
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses

AUXILIARY = ({"aux_coefficient": 0.3, "aux_k": 7}, {"pre_act_loss_coefficient": 0.2})


def allowed(name: str, *options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the fields that an architecture takes."""
    return {key: value for fields in options if not refused(name, fields) for key, value in fields.items()}


def with_dead(sae: SAE, every_nth: int = 4) -> DeadLatents:
    """Every n-th latent has been silent for long, whatever it says now."""
    sae.tokens_since_fired.zero_()
    sae.tokens_since_fired[::every_nth] = 1000
    counters = DeadLatents(sae, 1000)
    counters.candidates = torch.arange(0, sae.geometry.n_latents, every_nth)
    return counters


def gradients(sae: SAE, data: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole loss of a step, and the gradient of every parameter."""
    losses = training_losses(sae, one_pass(sae, data), values_of(sae), with_dead(sae))
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(losses.total, parameters, allow_unused=True, materialize_grads=True)
    return losses.total.detach(), dict(zip(names, found, strict=True))


def in_the_plain_way(monkeypatch: pytest.MonkeyPatch, sae: SAE) -> None:
    """Products over dense codes instead of gathered rows, and b_dec subtracted from every row of the input."""
    monkeypatch.setattr(SparseCodes, "decode", lambda self, W_dec: self.to_dense() @ W_dec)

    def project(x: Tensor, bias: Tensor) -> Tensor:
        centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
        if sae.geometry.cross_layer:
            return (torch.einsum("...ld,lds->...ls", centred, sae.W_enc) + bias.view(sae.latent_shape)).flatten(-2)
        return centred.flatten(-len(sae.geometry.in_shape)) @ sae.W_enc.flatten(0, -2) + bias

    monkeypatch.setattr(sae, "project", project, raising=False)


@every_trainable_form
def test_losses_and_gradients_equal_plain_autograd(name: str, geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every term at once, AuxK and pre-act loss included."""
    normalization = NORMALIZATIONS["center" if has_form(name, geometry, "center") else "average"]
    fields = {**allowed(name, *AUXILIARY), **normalization, "dtype": "float64"}
    sae = estimated(make_sae(name, geometry, **fields))
    plain = copy.deepcopy(sae)
    data = batch(sae, 40)
    loss, found = gradients(sae, data)
    in_the_plain_way(monkeypatch, plain)
    expected_loss, expected = gradients(plain, data)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-10, atol=1e-9, msg=key)


def assert_slope(value: Callable[[], Tensor], tensor: Tensor, gradient: Tensor, seed: int) -> None:
    """gradient · direction is the central difference of `value` along it."""
    direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed), dtype=tensor.dtype)
    step = 1e-6
    with torch.no_grad():
        tensor += step * direction
        above = value()
        tensor -= 2 * step * direction
        slope = (above - value()) / (2 * step)
        tensor += step * direction
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@every_trainable_form
def test_reconstruction_gradients_are_true_slopes(name: str, geometry: str) -> None:
    """Of L_rec to all parameters but thresholds, whose gradient is an estimate by design."""
    normalization = NORMALIZATIONS["average"]
    sae = estimated(make_sae(name, geometry, dtype="float64", **normalization))
    data = batch(sae, 20)

    def reconstruction() -> Tensor:
        run = one_pass(sae, data)
        return sae.reconstruction_loss(run.encoding, run.y, run.y_hat)[0]

    reconstruction().backward()
    for number, (key, parameter) in enumerate(sae.named_parameters()):
        if key not in sae.threshold_names:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            assert_slope(reconstruction, parameter, gradient, seed=number)


@every_form
def test_gradients_to_the_input_are_true_slopes(name: str, geometry: str) -> None:
    """What a model behind a spliced SAE sends back, through codes, per-row scales and skip."""
    normalization = "layer_norm" if has_form(name, geometry, "layer_norm") else "center"
    sae = estimated(make_sae(name, geometry, dtype="float64", **NORMALIZATIONS[normalization]))
    u = inputs(sae, 6).requires_grad_()
    weights = torch.randn(6, *sae.geometry.out_shape, generator=torch.Generator().manual_seed(5), dtype=u.dtype)

    def output() -> Tensor:
        return (sae(u) * weights).sum()

    (gradient,) = torch.autograd.grad(output(), u)
    assert_slope(output, u, gradient, seed=1)
    assert gradient.any()


@every_form
def test_sparse_and_dense_paths_have_the_same_gradients(name: str, geometry: str) -> None:
    """With a hook on the codes forward goes through dense ones; with and without, and by way of encode_sparse."""
    sae = make_sae(name, geometry, dtype="float64")
    u = inputs(sae, 12)
    weights = torch.randn(12, *sae.geometry.out_shape, generator=torch.Generator().manual_seed(5), dtype=u.dtype)

    def gradient(out: Tensor) -> tuple[Tensor, ...]:
        parameters = list(sae.parameters())
        return torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True, materialize_grads=True)

    direct, by_codes = gradient(sae(u)), gradient(sae.decode(sae.encode_sparse(u)))
    dense = gradient(sae.decode(sae.encode(u), sae.row_context(u)))
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: None)
    hooked = gradient(sae(u))
    for key, expected, sparse, *others in zip(
        dict(sae.named_parameters()), direct, by_codes, dense, hooked, strict=True
    ):
        # Sparse codes have no entry for a latent that is just below its threshold, which the estimate would reach.
        for other in others if key in sae.threshold_names else (sparse, *others):
            torch.testing.assert_close(other, expected, rtol=1e-9, atol=1e-9, msg=key)


MICRO_BATCHED = [form for form in TRAINABLE_FORMS if not make_sae(form[0]).selects_over_batch]


@pytest.mark.parametrize(("name", "geometry"), MICRO_BATCHED)
def test_micro_batches_add_up(name: str, geometry: str) -> None:
    """Means over rows: the gradient of a batch is the mean of those of its halves. (Not AuxK: its variances are of the
    batch.)"""
    fields = allowed(name, {"aux_coefficient": 0.0}, {"pre_act_loss_coefficient": 0.2})
    sae = make_sae(name, geometry, dtype="float64", **fields)
    whole = batch(sae, 40)
    _, expected = gradients(sae, whole)
    halves = [
        gradients(sae, Batch(x, x if sae.geometry.same_site else y))[1]
        for x, y in zip(whole.x.split(20), whole.y.split(20), strict=True)
    ]
    for key, total in expected.items():
        mean = torch.stack([half[key] for half in halves]).mean(dim=0)
        torch.testing.assert_close(mean, total, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (name, mode)
        for name, mode in itertools.product(TRAINABLE, ("fvu", "mse"))
        if not refused(name, {"reconstruction_loss": mode})
    ],
)
def test_fvu_is_the_error_over_the_variance_of_the_batch(name: str, mode: str) -> None:
    sae = make_sae(name, dtype="float64", reconstruction_loss=mode)
    data = batch(sae, 30)
    run = one_pass(sae, data)
    terms = training_losses(sae, run, values_of(sae), DeadLatents(sae, 10**9))
    error = (run.y_hat - run.y).square().sum(dim=1).mean()
    variance = (run.y - run.y.mean(dim=0)).square().sum(dim=1).mean()
    objective, _ = sae.reconstruction_loss(run.encoding, run.y, run.y_hat)
    own = sum(sae.sparsity_losses(run.encoding, run.y, values_of(sae)).values())
    torch.testing.assert_close(terms.total, objective / (variance if mode == "fvu" else 1.0) + own)
    if not any(key.startswith("inner_mse_loss") for key in terms.terms):
        torch.testing.assert_close(terms.terms["mse_loss"], error / (variance if mode == "fvu" else 1.0))
