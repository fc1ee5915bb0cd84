"""AbsTopK: ranking by magnitude, codes with their sign; and the group maximum, which the row-wise family shares."""

import pytest
import torch
from helpers import D_SAE, SITES, batch, inputs, make_config, make_sae, one_pass, relative, values_of

from sae_kit.errors import ConfigError
from sae_kit.ops import to_dense
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses

ROW_WISE = pytest.mark.parametrize("name", ["topk", "abstopk"])


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("geometry", ["sae", "crosscoder", "clt"])
def test_the_largest_magnitudes_are_kept_with_their_sign(rescale: bool, geometry: str) -> None:
    sae = make_sae("abstopk", geometry, dtype="float64", rescale_acts_by_decoder_norm=rescale)
    u = inputs(sae, 30)
    z = sae.preactivations(u) * (sae.decoder_norms() if rescale else 1.0)
    blocks = z.view(30, -1, D_SAE)
    smallest = blocks.abs().topk(8, dim=2).values[..., -1:]
    torch.testing.assert_close(sae.encode(u).view_as(blocks), blocks * (blocks.abs() >= smallest))
    codes = sae.encode(u)
    assert (codes < 0).any()
    assert (codes > 0).any()
    assert ((codes != 0).view(30, -1, D_SAE).sum(dim=2) == 8).all()


def test_opposite_preactivations_give_opposite_codes() -> None:
    """f(−z) = −f(z)."""
    sae = make_sae("abstopk", dtype="float64", apply_b_dec_to_input=False)
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    u = inputs(sae, 30)
    torch.testing.assert_close(sae.encode(-u), -sae.encode(u))
    torch.testing.assert_close(sae(-u), -sae(u))


def test_values_and_gradients_equal_a_dense_reference() -> None:
    sae, reference = (make_sae("abstopk", dtype="float64") for _ in range(2))
    u, weights = inputs(sae, 40), inputs(sae, 40, seed=9)
    h = (u - reference.b_dec) @ reference.W_enc + reference.b_enc
    z = (h * reference.W_dec.norm(dim=1)).abs()
    kept = torch.zeros_like(h).scatter(1, z.topk(8, dim=1).indices, 1.0)
    expected = (h * kept) @ reference.W_dec + reference.b_dec
    torch.testing.assert_close(sae(u), expected, rtol=1e-10, atol=1e-10)
    (sae(u) * weights).sum().backward()
    (expected * weights).sum().backward()
    for (key, one), other in zip(sae.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10, msg=key)


def test_dead_latents_speak_with_their_sign() -> None:
    """AuxK ranks by |z| and keeps h as it is."""
    sae = make_sae("abstopk", dtype="float64", aux_coefficient=1.0, aux_k=3)
    dead = list(range(40, 60))
    sae.tokens_since_fired[dead] = 100
    counters = DeadLatents(sae, 100)
    counters.candidates = torch.tensor(dead)
    run = one_pass(sae, batch(sae, 30))
    found = training_losses(sae, run, values_of(sae), counters).terms["auxiliary_reconstruction_loss"]
    h = sae.preactivations(run.x)[:, dead]
    z = (h * sae.decoder_norms()[dead]).abs()
    kept = torch.zeros_like(h).scatter(1, z.topk(3, dim=1).indices, 1.0)
    residual = (run.y - run.y_hat).detach()
    error = (residual - (h * kept) @ sae.W_dec[dead]).square().sum(dim=1).mean()
    ratio = (run.y - run.y.mean(0)).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(found, ratio * error)
    assert (h * kept < 0).any()


def test_negative_codes_count_as_active() -> None:
    sae = make_sae("abstopk")
    data = batch(sae, 50)
    codes = one_pass(sae, data).encoding.codes
    counters = DeadLatents(sae, 100)
    counters.observe(codes, 50, 0)
    assert sae.firing_count.sum() == 50 * 8
    assert torch.equal(sae.firing_count, (to_dense(codes) != 0).sum(dim=0))


def test_folded_it_stays_abstopk() -> None:
    sae = make_sae("abstopk", normalize_activations="expected_average_only_in")
    sae.norm_in.scale.fill_(3.0)
    inference = sae.to_inference()
    assert inference.cfg.architecture == "abstopk"
    u = inputs(sae, 20) / 3
    assert relative(inference(u), sae(u)) < 1e-5
    assert (inference.encode(u) < 0).any()


# ---- the largest of each group ---------------------------------------------------------------------------------------


def grouped(name: str, k: int, geometry: str = "sae") -> SAE:
    return make_sae(name, geometry, dtype="float64", k=k, selection="groupmax")


@ROW_WISE
@pytest.mark.parametrize("geometry", ["sae", "clt"])
def test_group_maximum_keeps_the_largest_of_each_group_of_neighbours(name: str, geometry: str) -> None:
    sae = grouped(name, 12, geometry)
    u = inputs(sae, 30)
    z = sae.preactivations(u) * sae.decoder_norms()
    groups = z.view(30, -1, 12, D_SAE // 12)
    strength = groups.abs() if name == "abstopk" else groups
    kept = strength == strength.amax(dim=3, keepdim=True)
    expected = sae.activation(groups) * kept
    torch.testing.assert_close(sae.encode(u), expected.view(30, *sae.latent_shape))
    assert (sae.encode(u) != 0).sum() <= 30 * 12 * (SITES if geometry == "clt" else 1)


@ROW_WISE
def test_groups_of_one_latent_and_one_group(name: str) -> None:
    everything, single = grouped(name, D_SAE), grouped(name, 1)
    u = inputs(everything, 10)
    z = everything.preactivations(u) * everything.decoder_norms()
    torch.testing.assert_close(everything.encode(u), everything.activation(z))
    plain = make_sae(name, dtype="float64", k=1)
    torch.testing.assert_close(single.encode(u), plain.encode(u))


@ROW_WISE
def test_groups_must_be_of_one_size(name: str) -> None:
    with pytest.raises(ConfigError, match="groupmax needs d_sae to be a multiple of k, found 96 and 10"):
        make_config(name, k=10, selection="groupmax")
