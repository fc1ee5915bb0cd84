"""Dtypes (1.2): fp32 islands in half precision, float64 throughout, weights drawn alike for every width and device."""

import pytest
import torch
from helpers import (
    ARCHITECTURES,
    FORMS,
    NORMALIZATIONS,
    estimated,
    every,
    every_form,
    forms_in,
    has_form,
    inputs,
    make_config,
    make_sae,
)


@every_form
def test_half_precision_keeps_thresholds_and_statistics(name: str, geometry: str) -> None:
    normalization = "center" if has_form(name, geometry, "center") else "none"
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    exact = {key: tensor for key, tensor in sae.state_dict().items() if key in sae.exact_dtype_tensors}
    with torch.no_grad():
        for tensor in exact.values():
            tensor.fill_(1 / 3)  # not a number of bfloat16
    half = sae.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.cfg.dtype == "bfloat16"
    u = inputs(sae, 3)
    assert half.encode(u).dtype == half(u).dtype == half.decode(half.encode_sparse(u)).dtype == torch.bfloat16
    assert half(u).isfinite().all()
    assert len(exact) >= 2 or normalization == "none", "scale and mean at least"
    for key, tensor in half.state_dict().items():
        if key in exact:
            assert tensor.dtype == torch.float32, key
            torch.testing.assert_close(tensor, torch.full_like(tensor, 1 / 3), rtol=1e-7, atol=0)
        elif tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, key
    assert {half.decoder_norms().dtype} == {torch.float32}


@every_form
def test_half_precision_is_close(name: str, geometry: str) -> None:
    """Without a selection that rounding may tip: forward in bfloat16 is forward in float32, to its 8 bits."""
    normalization = "layer_norm" if has_form(name, geometry, "layer_norm") else "average"
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    u = inputs(sae, 200)
    exact, rounded = sae(u), sae.to(torch.bfloat16)(u)
    error = (rounded.float() - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.median() < 0.03


@forms_in("sae", "skip", "skip_transcoder", "clt_skip")
def test_input_of_another_dtype_is_cast(name: str, geometry: str) -> None:
    """R9: a bfloat16 model feeds a float32 SAE, its skip connection included, and the other way round."""
    sae = make_sae(name, geometry)
    u = inputs(sae, 5).bfloat16()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        out = sae.to(dtype)(u)
        assert out.dtype == dtype
        assert torch.equal(sae(u), sae(u.to(dtype)))
        assert torch.equal(sae(inputs(sae, 5).double()), sae(inputs(sae, 5)))


@pytest.mark.parametrize(
    ("name", "geometry", "normalization"),
    [
        (*form, key)
        for form in FORMS
        if form[1] in ("sae", "crosscoder", "clt_skip")
        for key in ("none", "average", "whitening")
        if has_form(*form, key)
    ],
)
def test_float64_is_float64_throughout(name: str, geometry: str, normalization: str) -> None:
    sae = estimated(make_sae(name, geometry, dtype="float64", **NORMALIZATIONS[normalization]))
    assert {tensor.dtype for tensor in sae.state_dict().values() if tensor.is_floating_point()} == {torch.float64}
    u = inputs(sae, 3)
    assert sae(u).dtype == sae.decoder_norms().dtype == torch.float64
    wide = sae(u)
    assert not torch.equal(wide, wide.float().double()), "no step was taken in float32"


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if has_form(name, "sae", "average")])
def test_statistics_have_more_digits_than_the_weights(name: str) -> None:
    """Estimated in float64 from bfloat16 rows, kept in float32."""
    sae = make_config(name, dtype="bfloat16", normalize_activations="expected_average_only_in").build()
    u = inputs(sae, 5000)
    sae.norm_in.estimate(u, chunk=700)
    expected = 32**0.5 / u.double().norm(dim=1).mean()
    torch.testing.assert_close(sae.norm_in.scale.double(), expected, rtol=1e-6, atol=0)


@every
def test_initial_weights(name: str) -> None:
    sae, same, other = (make_config(name, d_sae=1536).build(seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(sae.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert not torch.equal(sae.W_dec, other.W_dec)
    norm = 1.0 if sae.cfg.decoder_norm_constraint == "unit" else sae.cfg.decoder_init_norm
    assert norm is not None
    torch.testing.assert_close(sae.decoder_norms(), torch.full((1536,), norm))
    torch.testing.assert_close(sae.W_enc, sae.W_dec.T)
    assert all(parameter.is_contiguous() for parameter in sae.parameters())
    narrow = make_config(name, d_sae=1024).build(seed=1)
    assert torch.equal(narrow.W_dec, sae.W_dec[:1024]), "weights are drawn per block of latents"


@every_form
def test_initial_weights_of_a_geometry(name: str, geometry: str) -> None:
    """Rows of one norm, biases and skip zero, and an encoder that is the decoder's transpose where that can be."""
    sae = make_config(name, geometry, decoder_norm_constraint="unit").build(seed=1)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(sae.geometry.n_latents))
    assert (sae.b_dec == 0).all()
    assert not sae.geometry.skip or (sae.W_skip == 0).all()
    if "W_enc" in dict(sae.named_parameters()):
        for layer in range(sae.geometry.layers):
            encoder, decoder = sae.geometry.encoder(sae.W_enc, layer), sae.geometry.decoder(sae.W_dec, layer)
            if sae.geometry.same_site:
                torch.testing.assert_close(encoder, decoder.T)
            else:
                torch.testing.assert_close(encoder.norm(dim=0), torch.ones(sae.d_sae))
                width = min(len(encoder), decoder.shape[1])
                assert (encoder[:width] - decoder.T[:width]).abs().max() > 0.1
    if sae.geometry.layers > 1:
        assert (sae.geometry.encoder(sae.W_enc, 0) - sae.geometry.encoder(sae.W_enc, 1)).abs().max() > 0.1


@every_form
def test_building_leaves_global_randomness_alone(name: str, geometry: str) -> None:
    before = torch.get_rng_state()
    make_config(name, geometry).build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)
