"""Contracts that every registered architecture keeps; a new one is tested here without an edit."""

import pytest
import torch
from helpers import ARCHITECTURES, D_IN, D_SAE, make_config, make_sae, relative, rows

from sae_kit.errors import ConfigError, ShapeError
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig

every = pytest.mark.parametrize("name", ARCHITECTURES)
HOOKS = ("input", "acts_pre", "acts_post", "recons", "error", "output")


@every
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)])
def test_leading_shape_is_kept(name: str, shape: tuple[int, ...]) -> None:
    sae, u = make_sae(name), rows(*shape)
    acts = sae.encode(u)
    assert acts.shape == (*shape, D_SAE)
    assert sae.decode(acts).shape == u.shape == sae(u).shape
    torch.testing.assert_close(sae(u), sae.decode(acts), rtol=1e-5, atol=1e-5)


@every
def test_rows_are_independent_and_mode_does_not_matter(name: str) -> None:
    sae, u = make_sae(name), rows(6)
    together = sae.encode(u)
    torch.testing.assert_close(sae.encode(u[2:3])[0], together[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.eval().encode(u), together, rtol=0, atol=0)


@every
def test_sparse_codes_equal_dense_ones(name: str) -> None:
    sae, u = make_sae(name, normalize_activations="expected_average_only_in"), rows(4, 3)
    sae.norm_in.estimate(u.reshape(-1, D_IN))
    codes = sae.encode_sparse(u)
    assert codes.leading == (4, 3)
    torch.testing.assert_close(codes.to_dense(), sae.encode(u), rtol=0, atol=0)
    torch.testing.assert_close(sae.decode(codes), sae.decode(sae.encode(u)), rtol=1e-5, atol=1e-5)
    assert 0 < (codes.values != 0).sum() < 12 * D_SAE


@every
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("scale", [0.02, 40.0])
def test_folds_are_exact(name: str, subtract: bool, scale: float) -> None:
    sae = make_sae(name, normalize_activations="expected_average_only_in", apply_b_dec_to_input=subtract)
    sae.norm_in.scale.fill_(scale)
    u = rows(50) / scale
    folded = make_sae(name, normalize_activations="expected_average_only_in", apply_b_dec_to_input=subtract)
    folded.norm_in.scale.fill_(scale)
    codes, output, norms = sae.encode(u), sae(u), sae.decoder_norms()
    rescaled = sae.rescales
    folded.fold_normalization()
    assert folded.norm_in.mode == "none"
    assert relative(folded(u), output) < 1e-5
    assert relative(folded.encode(u), codes) < 1e-5
    if sae.norm_fold_is_exact or rescaled:
        folded.fold_decoder_norm()
        torch.testing.assert_close(folded.decoder_norms(), torch.ones(D_SAE))
        assert relative(folded(u), output) < 1e-5
        factor = (1.0 if rescaled else norms) / scale  # codes are now lengths in raw units
        assert relative(folded.encode(u), codes * factor) < 1e-5
        assert torch.equal(folded.encode(u) != 0, codes != 0)


@every
def test_to_inference_is_exact_idempotent_and_leaves_its_source(name: str) -> None:
    sae = make_sae(name, normalize_activations="expected_average_only_in")
    u = rows(20) * 7
    sae.norm_in.estimate(u)
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    cfg = sae.cfg.to_dict()
    once = sae.to_inference()
    assert relative(once(u), sae(u)) < 1e-5
    assert once.cfg.normalize_activations == "none"
    assert not once.rescales
    torch.testing.assert_close(once.decoder_norms(), torch.ones(D_SAE))
    again = once.to_inference()
    assert again.cfg == once.cfg
    torch.testing.assert_close(again.state_dict(), once.state_dict(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)
    assert sae.cfg.to_dict() == cfg
    assert once.cfg.metadata.training_architecture == name
    details = once.cfg.metadata.training_architecture_details
    assert details is not None
    assert details["decoder_init_norm"] == 0.1


@every
def test_a_scale_on_the_data_changes_nothing_but_units(name: str) -> None:
    """Eight times the activations: the same codes, eight times the reconstruction."""
    sae, big = (make_sae(name, normalize_activations="expected_average_only_in") for _ in range(2))
    u = rows(30)
    sae.norm_in.estimate(u)
    big.norm_in.estimate(8 * u)
    torch.testing.assert_close(big.encode(8 * u), sae.encode(u), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(big(8 * u), 8 * sae(u), rtol=1e-4, atol=1e-3)


@every
def test_hooks_fire_in_order_with_the_right_tensors(name: str) -> None:
    sae, u = make_sae(name, normalize_activations="expected_average_only_in"), rows(2, 3)
    sae.norm_in.estimate(u.reshape(-1, D_IN))
    acts, out = sae.encode(u), sae(u)
    seen = {}

    def record(tensor: torch.Tensor, hook: object) -> None:
        seen[next(key for key in HOOKS if getattr(sae, f"hook_sae_{key}") is hook)] = tensor

    for key in HOOKS:
        getattr(sae, f"hook_sae_{key}").add_hook(record)
    sae(u, use_error_term=True)
    assert tuple(seen) == HOOKS
    torch.testing.assert_close(seen["input"], u)
    torch.testing.assert_close(seen["acts_post"], acts)
    torch.testing.assert_close(seen["recons"] / sae.norm_in.scale, out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen["error"], u - out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen["output"], u, rtol=1e-5, atol=1e-5)
    assert seen["acts_pre"].shape == (2, 3, D_SAE)
    for key in HOOKS:
        getattr(sae, f"hook_sae_{key}").remove_hooks()
        assert not getattr(sae, f"hook_sae_{key}").is_listening


@every
@pytest.mark.parametrize("key", HOOKS)
def test_what_a_hook_returns_is_used(name: str, key: str) -> None:
    sae, u = make_sae(name), rows(4)
    plain = sae(u, use_error_term=True)
    getattr(sae, f"hook_sae_{key}").add_hook(lambda tensor, hook: tensor * 0.5)
    assert (sae(u, use_error_term=True) - plain).abs().max() > 1e-2


@every
def test_error_term_adds_exactly_the_edit(name: str) -> None:
    sae, u = make_sae(name), rows(9)
    torch.testing.assert_close(sae(u, use_error_term=True), u, rtol=1e-5, atol=1e-5)
    latent = int(sae.encode(u).sum(dim=0).argmax())

    def ablate(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts = acts.clone()
        acts[..., latent] = 0
        return acts

    acts = sae.encode(u)
    edited = acts.clone()
    edited[..., latent] = 0
    expected = u + sae.decode(edited) - sae.decode(acts)
    sae.hook_sae_acts_post.add_hook(ablate)
    torch.testing.assert_close(sae(u, use_error_term=True), expected, rtol=1e-5, atol=1e-5)


@every
def test_error_term_passes_gradients_through_the_reconstruction_alone(name: str) -> None:
    sae = make_sae(name)
    u = rows(5).requires_grad_()
    weights = rows(5, seed=3)
    (sae(u) * weights).sum().backward()
    plain = u.grad
    u.grad = None
    (sae(u, use_error_term=True) * weights).sum().backward()
    torch.testing.assert_close(u.grad, plain)


@every
def test_heads_are_flattened_and_restored(name: str) -> None:
    sae = make_sae(name, reshape_activations="hook_z")
    flat = rows(2, 3)
    for heads in (4, 8):  # two splits in a row: nothing of the first may remain
        split = flat.reshape(2, 3, heads, D_IN // heads)
        torch.testing.assert_close(sae(split), sae(flat).reshape(split.shape))
        torch.testing.assert_close(sae.encode(split), sae.encode(flat))
    assert sae(flat).shape == flat.shape


@every
def test_wrong_width_is_named(name: str) -> None:
    sae = make_sae(name)
    with pytest.raises(ShapeError, match=r"expected activations of shape \[\.\.\., 32\], found \[4, 31\]"):
        sae.encode(torch.zeros(4, 31))
    with pytest.raises(ShapeError, match=r"heads · d_head = 32"):
        make_sae(name, reshape_activations="hook_z")(torch.zeros(4, 4, 9))


@every
def test_half_precision_keeps_thresholds_and_statistics(name: str) -> None:
    sae = make_sae(name, normalize_activations="expected_average_only_in")
    sae.norm_in.scale.fill_(1 / 3)
    if hasattr(sae, "threshold"):
        sae.get_parameter("threshold").data.fill_(1 / 3)
    half = sae.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.encode(rows(3)).dtype == torch.bfloat16
    assert half(rows(3)).isfinite().all()
    for key, tensor in half.state_dict().items():
        if key in type(sae).exact_dtype_tensors:
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1 / 3), rtol=1e-7, atol=0)


@every
def test_float64_is_float64_throughout(name: str) -> None:
    sae = make_sae(name, dtype="float64")
    assert {p.dtype for p in sae.parameters()} == {torch.float64}
    assert sae(rows(3, dtype=torch.float64)).dtype == torch.float64


@every
def test_initial_weights(name: str) -> None:
    sae, same, other = (make_config(name, d_sae=1500).build(seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(sae.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(sae.W_dec, other.W_dec)
    torch.testing.assert_close(sae.decoder_norms(), torch.full((1500,), 0.1))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert sae.W_enc.is_contiguous()
    narrow = make_config(name, d_sae=1024).build(seed=1)
    assert torch.equal(narrow.W_dec, sae.W_dec[:1024]), "weights are drawn per block of latents"


@every
def test_building_leaves_global_randomness_alone(name: str) -> None:
    before = torch.get_rng_state()
    make_config(name).build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@every
def test_configs_are_strict_and_round_trip(name: str) -> None:
    cfg = make_config(name, apply_b_dec_to_input=False, dead_after_tokens="5%")
    assert SAEConfig.from_dict(cfg.to_dict()) == cfg
    assert type(cfg).from_dict({key: v for key, v in cfg.to_dict().items() if key != "architecture"}) == cfg
    with pytest.raises(ConfigError, match=r"unknown key 'sae\.d_sea'.*Did you mean 'd_sae'\?"):
        SAEConfig.from_dict({**cfg.to_dict(), "d_sea": 3}, "sae")
    with pytest.raises(ConfigError, match="d_in is not set"):
        make_config(name, d_in=None).build()


def test_an_unknown_architecture_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown architecture 'topc'. Did you mean 'topk'\? Known: gated, jumprelu"):
        SAEConfig.from_dict({"architecture": "topc", "d_in": 2, "d_sae": 4})


@every
def test_two_saes_share_no_metadata(name: str) -> None:
    cfg = make_config(name)
    first, second = cfg.build(), cfg.build()
    first.fold_normalization()
    first.cfg.metadata.model_name = "x"
    assert second.cfg.metadata.model_name is None


def test_a_subclass_needs_its_own_config() -> None:
    from sae_kit import StandardSAE

    with pytest.raises(ConfigError, match="StandardSAE needs a StandardSAEConfig, found TopKSAEConfig"):
        StandardSAE(make_config("topk"))
    assert isinstance(StandardSAE(make_config("standard")), SAE)
