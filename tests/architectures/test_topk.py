"""Selection of TopK and its gradients, against a dense autograd reference in float64."""

import pytest
import torch
from helpers import D_SAE, make_config, make_sae, rows

from sae_kit import TopKSAEConfig
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE


def dense_reference(sae: SAE, u: torch.Tensor, k: int) -> torch.Tensor:
    """The reconstruction by plain autograd: mask the pre-activations, decode by a matrix product."""
    h = (u - sae.b_dec) @ sae.W_enc + sae.b_enc
    z = h * sae.W_dec.norm(dim=1) if sae.rescales else h
    kept = torch.zeros_like(h).scatter(1, z.topk(k, dim=1).indices, 1.0)
    return (torch.relu(h) * kept) @ sae.W_dec + sae.b_dec


@pytest.mark.parametrize("rescale", [True, False])
def test_values_and_gradients_equal_the_dense_reference(rescale: bool) -> None:
    sae = make_sae("topk", dtype="float64", rescale_acts_by_decoder_norm=rescale)
    reference = make_sae("topk", dtype="float64", rescale_acts_by_decoder_norm=rescale)
    u, weights = rows(40, dtype=torch.float64), rows(40, seed=9, dtype=torch.float64)
    found, expected = sae(u), dense_reference(reference, u, 8)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for (name, parameter), other in zip(sae.named_parameters(), reference.parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_kept_values_are_the_largest() -> None:
    sae, u = make_sae("topk"), rows(30)
    z = torch.relu(sae.preactivations(u)) * sae.decoder_norms()
    found = sae.encode(u).sort(dim=1, descending=True).values[:, :8]
    torch.testing.assert_close(found, z.sort(dim=1, descending=True).values[:, :8])


def test_a_row_may_have_fewer_than_k_latents() -> None:
    sae = make_sae("topk", k=60)
    with torch.no_grad():
        sae.b_enc.fill_(-2.0)
    acts = sae.encode(rows(30))
    l0 = (acts != 0).sum(dim=1)
    assert (acts >= 0).all()
    assert l0.max() < 60
    assert l0.float().mean() > 0
    assert torch.equal(sae.encode_sparse(rows(30)).l0(), l0)


def test_a_common_factor_on_the_decoder_leaves_the_support() -> None:
    sae, u = make_sae("topk"), rows(30)
    before = sae.encode(u) != 0
    with torch.no_grad():
        sae.W_dec *= 7
    assert torch.equal(sae.encode(u) != 0, before)


def test_unequal_norms_without_rescale_are_not_folded() -> None:
    sae = make_sae("topk", rescale_acts_by_decoder_norm=False)
    with pytest.raises(ConfigError, match="folding them would change which latents are on"):
        sae.fold_decoder_norm()
    kept = sae.to_inference()
    torch.testing.assert_close(kept(rows(5)), sae(rows(5)))
    torch.testing.assert_close(kept.decoder_norms(), sae.decoder_norms())


@pytest.mark.parametrize("k", [0, D_SAE + 1])
def test_k_must_fit(k: int) -> None:
    with pytest.raises(ConfigError, match=f"k must lie between 1 and d_sae = 96, found {k}"):
        make_config("topk", k=k)


def test_other_impossible_configs() -> None:
    with pytest.raises(ConfigError, match="aux_k must be at least 1"):
        TopKSAEConfig(d_in=4, d_sae=8, k=2, aux_k=0)
    with pytest.raises(ConfigError, match="d_sae must be at least 1"):
        TopKSAEConfig(d_in=4, d_sae=0)
