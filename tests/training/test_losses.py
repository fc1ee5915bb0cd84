"""AuxK against its formula, its gradients, and the counters of dead latents."""

from typing import Any

import pytest
import torch
from helpers import D_SAE, every_trainable, make_config, make_sae, rows, values_of

from sae_kit import Batch
from sae_kit.ops import to_dense
from sae_kit.sae import SAE, AuxiliaryTask
from sae_kit.training import losses
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass, training_pass


def with_dead(dead: list[int], *, after: int = 100, **fields: Any) -> tuple[SAE, DeadLatents]:
    """A TopK SAE in which exactly the latents `dead` have been silent for long."""
    sae = make_sae("topk", dtype="float64", **fields)
    with torch.no_grad():
        sae.tokens_since_fired.zero_()
        sae.tokens_since_fired[dead] = after
    counters = DeadLatents(sae, after)
    counters.candidates = torch.tensor(dead)
    return sae, counters


def reading(sae: SAE, x: torch.Tensor) -> Pass:
    """A pass over rows that are in training space already."""
    return Pass(x, x, sae.encoding(x), x, None, None)


def auxk_loss(sae: SAE, run: Pass, residual: torch.Tensor, counters: DeadLatents, aux_k: int) -> torch.Tensor:
    """AuxK of all candidates on a given residual."""
    return losses.auxk_loss(sae, run, AuxiliaryTask(1.0, 0, counters.candidates, residual), counters, aux_k)


def training_losses(sae: SAE, run: Pass, given: dict[str, float], counters: DeadLatents) -> Losses:
    return losses.training_losses(sae, run, values_of(sae, **given), counters)


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
    found = auxk_loss(sae, reading(sae, x), residual, counters, aux_k=16)
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
    auxk_loss(sae, reading(sae, x), rows(64, seed=5, dtype=torch.float64), counters, aux_k=16).backward()
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
    found = auxk_loss(sae, reading(sae, x), residual, counters, aux_k=8)
    torch.testing.assert_close(
        found, auxk_loss(other, reading(other, x), residual, only, aux_k=8), rtol=1e-10, atol=1e-10
    )
    sae.tokens_since_fired.zero_()
    assert auxk_loss(sae, reading(sae, x), residual, counters, aux_k=8) == 0


def test_auxk_of_a_perfect_reconstruction_is_zero() -> None:
    sae, counters = with_dead([1, 2])
    x = rows(8, dtype=torch.float64)
    assert auxk_loss(sae, reading(sae, x), torch.zeros_like(x), counters, aux_k=8) == 0


def test_auxk_scales_like_the_reconstruction_loss() -> None:
    """In other units of the data the ratio of the two terms is the same."""
    sae, counters = with_dead([1, 2, 3], normalize_activations="none")
    x, residual = rows(64, dtype=torch.float64), rows(64, seed=5, dtype=torch.float64)
    with torch.no_grad():
        one = auxk_loss(sae, reading(sae, x), residual, counters, aux_k=8)
        sae.b_enc *= 10
        sae.b_dec *= 10
        ten = auxk_loss(sae, reading(sae, 10 * x), 10 * residual, counters, aux_k=8)
    assert (ten / one).item() == pytest.approx(100)


def observed(sae: SAE, u: torch.Tensor, counters: DeadLatents, tokens: int = 0) -> Pass:
    """A pass whose codes the counters have seen, as in a step."""
    run = training_pass(sae, Batch(u, u), values_of(sae))
    counters.observe(run.encoding.codes.detach(), len(u), tokens)
    return run


@every_trainable
def test_terms_and_counters(name: str) -> None:
    sae = make_sae(name, normalize_activations="expected_average_only_in")
    u = rows(50) * 6
    sae.norm_in.estimate(u)
    sae.tokens_since_fired += 7
    counters = DeadLatents(sae, 1000)
    run = observed(sae, u, counters)
    terms = training_losses(sae, run, dict.fromkeys(sae.cfg.coefficients(), 0.5), counters).terms
    x = u * sae.norm_in.scale
    codes = to_dense(sae.training_encoding(x, values_of(sae)).codes)
    y_hat = codes @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(terms["mse_loss"], (y_hat - x).square().sum(dim=1).mean(), rtol=1e-4, atol=1e-4)
    if not sae.selects_over_batch:  # then training and use follow the same rule
        torch.testing.assert_close(sae.norm_in.undo(run.y_hat), sae(u), rtol=1e-5, atol=1e-4)
        assert torch.equal(codes != 0, sae.encode(u) != 0)
    fired = codes != 0
    assert torch.equal(sae.firing_count, fired.sum(dim=0))
    assert torch.equal(sae.tokens_since_fired, torch.where(fired.any(dim=0), 0, 57))
    assert sae.tokens_seen == 50


@pytest.mark.parametrize("aux_k", [None, 4])
def test_auxk_within_all_losses(aux_k: int | None) -> None:
    """Residual, coefficient, default of aux_k, order of counting and reading, and every gradient, at once."""
    fields = {"dtype": "float64", "aux_coefficient": 0.3, "aux_k": aux_k}
    sae, reference = make_sae("topk", **fields), make_sae("topk", **fields)
    dead = list(range(20, 44))
    with torch.no_grad():
        for one in (sae, reference):
            one.b_enc[dead] -= 3.0  # never among the largest
    x, y = rows(64, dtype=torch.float64), rows(64, seed=8, dtype=torch.float64)
    counters = DeadLatents(sae, after=64)  # dead after this very batch, and not before it
    run = training_pass(sae, Batch(x, y), values_of(sae))
    counters.observe(run.encoding.codes.detach(), 64, 0)
    silent = (sae.encode(x) == 0).all(dim=0).nonzero().squeeze(1).tolist()
    assert set(dead) <= set(silent)
    found = training_losses(sae, run, {}, counters)
    terms = found.terms
    y_hat = reference(x)
    mse = (y_hat - y).square().sum(dim=1).mean()
    residual = (y - y_hat).detach()
    aux = formula(reference, x, residual, silent, aux_k or sae.d_in // 2)
    aux = aux * (y - y.mean(0)).square().sum() / (x - x.mean(0)).square().sum()  # the formula took x for the target
    torch.testing.assert_close(terms["auxiliary_reconstruction_loss"], 0.3 * aux, rtol=1e-10, atol=1e-10)
    found.total.backward()
    (mse + 0.3 * aux).backward()
    for (name, parameter), other in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_gated_keeps_its_own_auxiliary_term_beside_auxk() -> None:
    sae = make_sae("gated", aux_coefficient=0.5)
    with torch.no_grad():
        sae.get_parameter("b_gate")[:5] = -100
    counters, plain = DeadLatents(sae, 50), DeadLatents(sae, 10**6)
    run = observed(sae, rows(50), counters)
    both = training_losses(sae, run, {"l1_coefficient": 0.0}, counters).terms["auxiliary_reconstruction_loss"]
    own = training_losses(sae, run, {"l1_coefficient": 0.0}, plain).terms["auxiliary_reconstruction_loss"]
    residual = (run.y - run.y_hat).detach()
    torch.testing.assert_close(both, own + 0.5 * auxk_loss(sae, run, residual, counters, 16))
    (both - own).backward()
    gradient = sae.get_parameter("r_mag").grad
    assert gradient is None or (gradient == 0).all()


def test_a_selected_latent_of_value_zero_has_not_fired() -> None:
    sae = make_config("topk", k=D_SAE).build()  # all are selected, half of them are negative
    u = rows(50)
    observed(sae, u, DeadLatents(sae, 1000))
    assert torch.equal(sae.firing_count, (sae.preactivations(u) > 0).sum(dim=0))
    assert 0 < sae.firing_count.sum() < 50 * D_SAE


def test_candidates_are_read_once_per_interval() -> None:
    sae = make_sae("topk")
    with torch.no_grad():
        sae.b_enc[:10] = -1000
    counters = DeadLatents(sae, 1000)
    assert counters.refresh_every == 100
    u, sizes = rows(40), []
    for step in range(30):
        sae.tokens_since_fired[:10] += 1000 * (step == 4)  # they die in the middle of an interval
        observed(sae, u, counters, tokens=40 * step)
        sizes.append(len(counters.candidates))
    assert sizes[:6] == [0] * 6, "read at 0, then at 120: the first step past an interval of 100"
    assert sizes[6] >= 10
    assert DeadLatents(sae, 10**9).refresh_every == 1_000_000
    silent = DeadLatents(sae, 1, listed=False)
    observed(sae, u, silent)
    assert len(silent.candidates) == 0
    assert silent.mask().any()
