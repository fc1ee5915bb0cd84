"""Matryoshka BatchTopK: prefixes, their weights, their dead latents; with one level it is BatchTopK."""

import itertools
from typing import Any

import pytest
import torch
from helpers import BATCH, D_SAE, NORMALIZATIONS, batch, estimated, fit, make_config, make_sae, one_pass, values_of
from torch import Tensor

from sae_kit import MatryoshkaBatchTopKSAEConfig
from sae_kit.architectures.matryoshka import MatryoshkaBatchTopKSAE
from sae_kit.errors import ConfigError
from sae_kit.ops import to_dense
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass, total_variance, training_losses


def make(geometry: str = "sae", **fields: Any) -> MatryoshkaBatchTopKSAE:
    sae = make_sae("matryoshka_batchtopk", geometry, dtype="float64", **fields)
    assert isinstance(sae, MatryoshkaBatchTopKSAE)
    return sae


def no_dead(sae: MatryoshkaBatchTopKSAE) -> DeadLatents:
    return DeadLatents(sae, 10**9)


def losses(sae: MatryoshkaBatchTopKSAE, run: Pass, dead: DeadLatents | None = None) -> Losses:
    return training_losses(sae, run, values_of(sae), dead or no_dead(sae))


def prefix_error(sae: MatryoshkaBatchTopKSAE, run: Pass, width: int) -> Tensor:
    """E‖Σ_{i < w} c_i d_i + b_dec (+ skip) − y‖², dense."""
    codes = to_dense(run.encoding.codes)
    found = torch.einsum("ri,i...->r...", codes[:, :width], sae.W_dec[:width]) + sae.b_dec
    if run.encoding.extra is not None:
        found = found + run.encoding.extra
    return (found - run.y).flatten(1).square().sum(dim=1).mean()


@pytest.mark.parametrize("geometry", ["sae", "skip_transcoder", "crosscoder"])
@pytest.mark.parametrize(
    ("widths", "weights"), [(None, None), ((10, 50), None), ((10, 50, 96), (5.0, 1.0, 2.0)), ((96,), None)]
)
def test_the_loss_is_the_weighted_mean_over_prefixes(
    geometry: str, widths: tuple[int, ...] | None, weights: tuple[float, ...] | None
) -> None:
    fields = {"matryoshka_widths": widths, "matryoshka_weights": weights}
    sae = make(geometry, **fields)
    reference = make(geometry, **fields)
    data = batch(sae, 30)
    found = losses(sae, one_pass(sae, data))
    run = one_pass(reference, data)
    all_widths = (3, 9, 21, 45, 96) if widths is None else widths if widths[-1] == 96 else (*widths, 96)
    shares = [1 / len(all_widths)] * len(all_widths) if weights is None else [w / sum(weights) for w in weights]
    errors = [prefix_error(reference, run, width) for width in all_widths]
    expected = torch.stack([share * error for share, error in zip(shares, errors, strict=True)]).sum()
    torch.testing.assert_close(found.total, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.terms["mse_loss"], errors[-1], rtol=1e-10, atol=1e-10)
    inner = {f"inner_mse_loss_{w}": e for w, e in zip(all_widths[:-1], errors[:-1], strict=True)}
    for key, error in inner.items():
        torch.testing.assert_close(found.terms[key], error, rtol=1e-10, atol=1e-10)
    assert found.terms.keys() == {"mse_loss", *inner}
    found.total.backward()
    expected.backward()
    for (key, one), other in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("given", [None, (1.0, 1.0), (3.0, 5.0), (0.1, 0.0)])
def test_weights_sum_to_one_once(given: tuple[float, ...] | None) -> None:
    cfg = MatryoshkaBatchTopKSAEConfig(d_in=4, d_sae=64, matryoshka_widths=(32,), matryoshka_weights=given)
    assert sum(cfg.weights) == pytest.approx(1.0)
    assert len(cfg.weights) == len(cfg.widths) == 2
    if given is not None:
        assert cfg.weights[0] / sum(cfg.weights) == pytest.approx(given[0] / sum(given))


@pytest.mark.parametrize("normalization", list(NORMALIZATIONS))
def test_one_level_is_batchtopk(normalization: str) -> None:
    """Parameters, statistics, threshold and dead latents after training: to the bit."""
    fields = {**NORMALIZATIONS[normalization], "dead_after_tokens": 1}
    one = make_config("matryoshka_batchtopk", matryoshka_widths=(D_SAE,), **fields).build()
    plain = make_config("batchtopk", **fields).build()
    buffer = {"norm_estimate_tokens": 5 * BATCH}
    found, expected = fit(one, 6, buffer=buffer), fit(plain, 6, buffer=buffer)
    torch.testing.assert_close(one.state_dict(), plain.state_dict(), rtol=0, atol=0)
    assert found["losses/auxiliary_reconstruction_loss"] == expected["losses/auxiliary_reconstruction_loss"] > 0


def test_early_latents_are_trained_more() -> None:
    """All levels pull at the first prefix, the last level alone at the last latents."""
    sae = make(matryoshka_widths=(24,), matryoshka_weights=(1.0, 0.0))
    losses(sae, one_pass(sae, batch(sae, 30))).total.backward()
    assert sae.W_dec.grad is not None
    assert sae.W_dec.grad[:24].any()
    assert not sae.W_dec.grad[24:].any()


# ---- random prefixes -------------------------------------------------------------------------------------------------


def test_random_prefixes_follow_their_distribution() -> None:
    """n − 1 different lengths below d_sae, P(l) ∝ √l − √(l − 1), and d_sae; others in every step, alike in all runs."""
    sae = make(matryoshka_random_prefixes=3)
    draws = []
    for step in range(3000):
        sae.tokens_seen.fill_(step)
        draws.append(sae._random_widths(3))
    assert all(len(set(widths)) == 3 and widths[-1] == D_SAE and list(widths) == sorted(widths) for widths in draws)
    again = make(matryoshka_random_prefixes=3)
    again.tokens_seen.fill_(77)
    assert again._random_widths(3) == draws[77]
    assert len(set(draws)) > 500
    single = []
    for step in range(3000):
        sae.tokens_seen.fill_(step)
        single.append(sae._random_widths(2)[0])
    below = sum(length <= 24 for length in single) / 3000
    assert below == pytest.approx((24 / 95) ** 0.5, abs=0.03)
    assert sae._random_widths(1) == (D_SAE,)


def test_random_prefixes_are_a_mean_over_those_drawn() -> None:
    sae = make(matryoshka_random_prefixes=4)
    sae.tokens_seen.fill_(640)
    run = one_pass(sae, batch(sae, 30))
    widths = sae._random_widths(4)
    expected = torch.stack([prefix_error(sae, run, width) for width in widths]).mean()
    total, parts = sae.reconstruction_loss(run.encoding, run.y, run.y_hat)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    assert parts.keys() == {"mse_loss"}
    torch.testing.assert_close(parts["mse_loss"], prefix_error(sae, run, D_SAE), rtol=1e-10, atol=1e-10)


def test_a_seed_gives_its_prefixes() -> None:
    one, same, other = (make(matryoshka_random_prefixes=3, seed=seed) for seed in (1, 1, 2))
    for step in range(20):
        for sae in (one, same, other):
            sae.tokens_seen.fill_(64 * step)
        assert one._random_widths(3) == same._random_widths(3)
    assert one._random_widths(3) != other._random_widths(3)


# ---- AuxK of each level ----------------------------------------------------------------------------------------------


def with_dead(sae: MatryoshkaBatchTopKSAE, dead: list[int]) -> DeadLatents:
    sae.tokens_since_fired.zero_()
    sae.tokens_since_fired[dead] = 100
    counters = DeadLatents(sae, 100)
    counters.candidates = torch.tensor(dead, dtype=torch.int64)
    return counters


def test_each_level_asks_its_own_dead_latents() -> None:
    """Level g: those between w_{g−1} and w_g, on what the prefix of width w_g misses, with weight α_g."""
    fields = {"matryoshka_widths": (10, 50), "matryoshka_weights": (1.0, 2.0, 1.0), "use_matryoshka_aux_loss": True}
    sae = make(aux_coefficient=0.5, aux_k=4, **fields)
    dead = [2, 3, 20, 60, 61, 62, 63, 64]
    counters = with_dead(sae, dead)
    run = one_pass(sae, batch(sae, 40))
    found = losses(sae, run, counters).terms["auxiliary_reconstruction_loss"]
    expected = torch.zeros((), dtype=torch.float64)
    codes, h = to_dense(run.encoding.codes), sae.preactivations(run.x)
    for (first, last), weight in zip(itertools.pairwise((0, 10, 50, 96)), (0.25, 0.5, 0.25), strict=True):
        own = [latent for latent in dead if first <= latent < last]
        residual = (run.y - (codes[:, :last] @ sae.W_dec[:last] + sae.b_dec)).detach()
        acts = torch.relu(h[:, own])
        z = acts * sae.decoder_norms()[own]
        kept = torch.zeros_like(z).scatter(1, z.topk(min(4, len(own)), dim=1).indices, 1.0)
        error = (residual - (acts * kept) @ sae.W_dec[own]).square().sum(dim=1).mean()
        few = min(len(own) / 4, 1.0)
        expected = expected + weight * few * total_variance(run.y) / total_variance(residual) * error
    torch.testing.assert_close(found, 0.5 * expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dead", [[], [60, 70], [1]])
def test_levels_without_dead_latents_ask_for_nothing(dead: list[int]) -> None:
    sae = make(matryoshka_widths=(10, 50), use_matryoshka_aux_loss=True, aux_coefficient=0.5)
    terms = losses(sae, one_pass(sae, batch(sae, 40)), with_dead(sae, dead)).terms
    assert ("auxiliary_reconstruction_loss" in terms) == bool(dead)
    assert torch.stack(list(terms.values())).isfinite().all()


def test_auxiliary_gradients_reach_dead_latents_alone() -> None:
    sae = make(matryoshka_widths=(10, 50), use_matryoshka_aux_loss=True, aux_coefficient=0.5)
    dead = [2, 20, 60, 61]
    losses(sae, one_pass(sae, batch(sae, 40)), with_dead(sae, dead)).terms["auxiliary_reconstruction_loss"].backward()
    assert sae.b_dec.grad is None or not sae.b_dec.grad.any()
    for parameter, axis in ((sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)):
        assert parameter.grad is not None
        moved = parameter.grad.movedim(axis, 0).reshape(D_SAE, -1).any(dim=1).nonzero().squeeze(1).tolist()
        assert moved == dead


@pytest.mark.parametrize("normalization", list(NORMALIZATIONS))
def test_everything_on_trains_under_every_normalisation(normalization: str) -> None:
    sae = estimated(
        make_sae(
            "matryoshka_batchtopk",
            use_matryoshka_aux_loss=True,
            dead_after_tokens=1,
            reconstruction_loss="fvu",
            **NORMALIZATIONS[normalization],
        )
    )
    metrics = fit(sae, 6)
    assert 0 < metrics["losses/overall_loss"] < 1e6
    assert metrics["losses/auxiliary_reconstruction_loss"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"matryoshka_widths": ()}, "must be positive, rising and at most d_sae = 96"),
        ({"matryoshka_widths": (0, 4)}, "must be positive, rising"),
        ({"matryoshka_widths": (8, 8)}, "must be positive, rising"),
        ({"matryoshka_widths": (8, 97)}, "at most d_sae = 96"),
        ({"matryoshka_weights": (1.0, 2.0)}, r"for each of the widths \(3, 9, 21, 45, 96\)"),
        ({"matryoshka_widths": (8,), "matryoshka_weights": (1.0, -1.0)}, "a weight of at least 0"),
        ({"matryoshka_widths": (8,), "matryoshka_weights": (0.0, 0.0)}, "a weight of at least 0"),
        ({"matryoshka_random_prefixes": 0}, "must lie between 1 and 96"),
        ({"matryoshka_random_prefixes": 3, "matryoshka_widths": (8,)}, "draws its own widths"),
        ({"matryoshka_random_prefixes": 3, "use_matryoshka_aux_loss": True}, "without levels for AuxK"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("matryoshka_batchtopk", **fields)


def test_small_saes_have_as_many_levels_as_fit() -> None:
    assert MatryoshkaBatchTopKSAEConfig(d_in=4, d_sae=64, k=2).widths == (2, 6, 14, 30, 64)
    assert MatryoshkaBatchTopKSAEConfig(d_in=4, d_sae=6, k=2).widths == (1, 2, 6)
