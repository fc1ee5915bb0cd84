"""AuxK against its formula, its gradients, and the counters of dead latents."""

from typing import Any

import pytest
import torch
from helpers import ARCHITECTURES, D_SAE, make_config, make_sae, rows

from sae_kit import Batch
from sae_kit.sae import SAE
from sae_kit.training.losses import DeadLatents, auxk_loss, training_losses


def with_dead(dead: list[int], *, after: int = 100, **fields: Any) -> tuple[SAE, DeadLatents]:
    """A TopK SAE in which exactly the latents `dead` have been silent for long."""
    sae = make_sae("topk", dtype="float64", **fields)
    with torch.no_grad():
        sae.tokens_since_fired.zero_()
        sae.tokens_since_fired[dead] = after
    counters = DeadLatents(sae, after)
    counters.candidates = torch.tensor(dead)
    return sae, counters


def formula(sae: SAE, x: torch.Tensor, residual: torch.Tensor, dead: list[int], aux_k: int) -> torch.Tensor:
    """A 2406.04093 A.2 in the words of the docs, dense and for all latents."""
    h = (x - sae.b_dec.detach()) @ sae.W_enc + sae.b_enc
    z = torch.full_like(h, -torch.inf)
    z[:, dead] = h[:, dead] * (sae.decoder_norms()[dead] if sae.rescales else 1.0)
    k = min(aux_k, len(dead))
    kept = torch.zeros_like(h).scatter(1, z.topk(k, dim=1).indices, 1.0)
    explained = (torch.relu(h) * kept) @ sae.W_dec
    variance_y = (x - x.mean(0)).square().sum(1).mean()
    variance_e = (residual - residual.mean(0)).square().sum(1).mean()
    few = min(len(dead) / aux_k, 1.0)
    return few * variance_y / variance_e * (residual - explained).square().sum(1).mean()


@pytest.mark.parametrize("number", [3, 16, 40])
@pytest.mark.parametrize("rescale", [True, False])
def test_auxk_is_its_formula(number: int, rescale: bool) -> None:
    dead = list(range(5, 5 + number))
    sae, counters = with_dead(dead, rescale_acts_by_decoder_norm=rescale)
    x, residual = rows(64, dtype=torch.float64), rows(64, seed=5, dtype=torch.float64)
    found = auxk_loss(sae, x, x, residual, counters, aux_k=16)
    expected = formula(sae, x, residual, dead, 16)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
        (one,) = torch.autograd.grad(found, parameter, retain_graph=True)
        (other,) = torch.autograd.grad(expected, parameter, retain_graph=True)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("number", [3, 40])
def test_auxk_reaches_dead_latents_and_nothing_else(number: int) -> None:
    dead = list(range(number))
    sae, counters = with_dead(dead)
    x = rows(64, dtype=torch.float64)
    auxk_loss(sae, x, x, rows(64, seed=5, dtype=torch.float64), counters, aux_k=16).backward()
    assert sae.b_dec.grad is None
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    assert sae.b_enc.grad is not None
    living = list(range(number, D_SAE))
    for gradient in (sae.W_enc.grad.T, sae.W_dec.grad, sae.b_enc.grad):
        assert (gradient[living] == 0).all()
        assert (gradient[dead] != 0).any()


def test_a_candidate_that_fired_again_is_left_out() -> None:
    sae, counters = with_dead([3, 4, 5, 6])
    sae.tokens_since_fired[4] = 0
    other, only = with_dead([3, 5, 6])
    x, residual = rows(64, dtype=torch.float64), rows(64, seed=5, dtype=torch.float64)
    found = auxk_loss(sae, x, x, residual, counters, aux_k=8)
    torch.testing.assert_close(found, auxk_loss(other, x, x, residual, only, aux_k=8), rtol=1e-10, atol=1e-10)
    sae.tokens_since_fired.zero_()
    assert auxk_loss(sae, x, x, residual, counters, aux_k=8) == 0


def test_auxk_of_a_perfect_reconstruction_is_zero() -> None:
    sae, counters = with_dead([1, 2])
    x = rows(8, dtype=torch.float64)
    assert auxk_loss(sae, x, x, torch.zeros_like(x), counters, aux_k=8) == 0


def test_auxk_scales_like_the_reconstruction_loss() -> None:
    """In other units of the data the ratio of the two terms is the same."""
    sae, counters = with_dead([1, 2, 3], normalize_activations="none")
    x, residual = rows(64, dtype=torch.float64), rows(64, seed=5, dtype=torch.float64)
    with torch.no_grad():
        one = auxk_loss(sae, x, x, residual, counters, aux_k=8)
        sae.b_enc *= 10
        sae.b_dec *= 10
        ten = auxk_loss(sae, 10 * x, 10 * x, 10 * residual, counters, aux_k=8)
    assert (ten / one).item() == pytest.approx(100)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_terms_and_counters(name: str) -> None:
    sae = make_sae(name, normalize_activations="expected_average_only_in")
    u = rows(50) * 6
    sae.norm_in.estimate(u)
    sae.tokens_since_fired += 7
    coefficients = dict.fromkeys(sae.cfg.coefficients(), 0.5)
    losses = training_losses(sae, Batch(u, u), coefficients, DeadLatents(sae, 1000), tokens=0)
    x = u * sae.norm_in.scale
    expected = (sae(u) * sae.norm_in.scale - x).square().sum(dim=1).mean()
    torch.testing.assert_close(losses.terms["mse_loss"], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses.reconstruction, sae(u).detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(losses.total, torch.stack(list(losses.terms.values())).sum())
    fired = sae.encode(u) != 0
    assert torch.equal(sae.firing_count, fired.sum(dim=0))
    assert torch.equal(sae.tokens_since_fired, torch.where(fired.any(dim=0), 0, 57))
    assert sae.tokens_seen == 50


def test_a_selected_latent_of_value_zero_has_not_fired() -> None:
    sae = make_config("topk", k=D_SAE).build()  # all are selected, half of them are negative
    u = rows(50)
    training_losses(sae, Batch(u, u), {}, DeadLatents(sae, 1000), tokens=0)
    assert torch.equal(sae.firing_count, (sae.preactivations(u) > 0).sum(dim=0))
    assert 0 < sae.firing_count.sum() < 50 * D_SAE


def test_candidates_are_read_once_per_interval() -> None:
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc[:10] = -1000
    counters = DeadLatents(sae, 100)
    assert counters.refresh_every == 10
    u, sizes = rows(40), []
    for step in range(5):
        training_losses(sae, Batch(u, u), {}, counters, tokens=40 * step)
        sizes.append(len(counters.candidates))
    assert sizes[:2] == [0, 0]
    assert sizes[2] == sizes[4] >= 10
