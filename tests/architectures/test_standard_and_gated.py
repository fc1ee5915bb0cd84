"""Losses and invariants of the two architectures with an L1 penalty."""

import pytest
import torch
from helpers import D_SAE, make_config, make_sae, rows

from sae_kit.architectures.standard import lp_penalty
from sae_kit.errors import ConfigError


@pytest.mark.parametrize("p", [1.0, 2.0, 1.5, 0.5])
def test_lp_penalty(p: float) -> None:
    lengths = torch.rand(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lengths[2] = 0
    lengths.requires_grad_()
    penalty = lp_penalty(lengths, p)
    expected = lengths.norm(p=p, dim=1) if p >= 1 else ((lengths + 1e-3) ** p - 1e-3**p).sum(dim=1)
    torch.testing.assert_close(penalty, expected)
    assert penalty[2] == 0
    penalty.sum().backward()
    assert lengths.grad is not None
    assert lengths.grad.isfinite().all()
    if p > 1:
        assert (lengths.grad[2] == 0).all()


def test_standard_penalty_ignores_how_length_is_shared_between_code_and_decoder() -> None:
    sae, u = make_sae("standard"), rows(20)
    before = sae.sparsity_losses(sae.encoding(u), u, {"l1_coefficient": 2.0})["l1_loss"]
    torch.testing.assert_close(before, 2.0 * (sae.encode(u) * sae.decoder_norms()).sum(dim=1).mean())
    factor = torch.linspace(0.3, 3.0, D_SAE)
    with torch.no_grad():
        sae.scale_latents(1 / factor)
        sae.W_dec *= factor[:, None]
    after = sae.sparsity_losses(sae.encoding(u), u, {"l1_coefficient": 2.0})["l1_loss"]
    torch.testing.assert_close(after, before)


def test_standard_penalty_does_not_move_silent_latents() -> None:
    sae, u = make_sae("standard"), rows(20)
    with torch.no_grad():
        sae.b_enc[3] = -100
    sae.sparsity_losses(sae.encoding(u), u, {"l1_coefficient": 1.0})["l1_loss"].backward()
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None
    assert (sae.W_enc.grad[:, 3] == 0).all()
    assert (sae.W_dec.grad[3] == 0).all()
    assert (sae.W_dec.grad != 0).any(), "the decoder norm takes part with its gradient"


def test_gated_auxiliary_loss_sees_a_frozen_decoder() -> None:
    sae, u = make_sae("gated"), rows(20)
    y = rows(20, seed=4)
    losses = sae.sparsity_losses(sae.encoding(u), y, {"l1_coefficient": 0.7})
    gate = torch.relu((u - sae.b_dec) @ sae.W_enc + sae.get_parameter("b_gate"))
    torch.testing.assert_close(losses["l1_loss"], 0.7 * (gate * sae.decoder_norms()).sum(dim=1).mean())
    expected = (gate @ sae.W_dec + sae.b_dec - y).square().sum(dim=1).mean()
    torch.testing.assert_close(losses["auxiliary_reconstruction_loss"], expected)
    losses["auxiliary_reconstruction_loss"].backward()
    assert sae.W_dec.grad is None
    assert (sae.get_parameter("b_gate").grad != 0).any()
    assert sae.get_parameter("b_mag").grad is None
    attached = make_sae("gated", detach_aux_decoder=False)
    attached.sparsity_losses(attached.encoding(u), u, {"l1_coefficient": 0.0})[
        "auxiliary_reconstruction_loss"
    ].backward()
    assert attached.W_dec.grad is not None


def test_gated_frozen_decoder_keeps_the_bias_out_too() -> None:
    """b_dec is read by the encoder (which may learn) and added by the frozen decoder (which may not)."""
    sae, u = make_sae("gated", apply_b_dec_to_input=False), rows(20)
    sae.sparsity_losses(sae.encoding(u), u, {"l1_coefficient": 0.0})["auxiliary_reconstruction_loss"].backward()
    assert sae.b_dec.grad is None


def test_gated_equals_its_jumprelu() -> None:
    sae, u = make_sae("gated"), rows(60)
    r_mag, b_mag, b_gate = (sae.get_parameter(key) for key in ("r_mag", "b_mag", "b_gate"))
    m = ((u - sae.b_dec) @ sae.W_enc) * r_mag.exp() + b_mag
    threshold = torch.relu(b_mag - r_mag.exp() * b_gate)
    torch.testing.assert_close(sae.encode(u), torch.relu(m) * (m > threshold), rtol=1e-4, atol=1e-5)


def test_lp_norm_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="lp_norm must be positive, found 0"):
        make_config("standard", lp_norm=0.0)
