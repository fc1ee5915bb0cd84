"""C2, C4: shapes that go in and come out, what a row depends on, and what decoding needs to know of it."""

import pytest
import torch
from helpers import (
    D_IN,
    FORMS,
    GEOMETRIES,
    NORMALIZATIONS,
    PER_ROW,
    estimated,
    every,
    every_form,
    forms_in,
    has_form,
    inputs,
    make_sae,
    relative,
)

from sae_kit.errors import MissingContextError, ShapeError
from sae_kit.sae import SAE

EVERY_NORMALIZED_FORM = [
    (*form, key) for form in FORMS for key in NORMALIZATIONS if key != "rms" and has_form(*form, key)
]
every_normalized_form = pytest.mark.parametrize(("name", "geometry", "normalization"), EVERY_NORMALIZED_FORM)


def assert_one_function(sae: SAE, u: torch.Tensor) -> None:
    """forward, encode then decode, and the sparse path are the same function, in the shape of what is written."""
    leading = u.shape[: u.ndim - len(sae.geometry.in_shape)]
    out, acts, codes = sae(u), sae.encode(u), sae.encode_sparse(u)
    assert out.shape == (*leading, *sae.geometry.out_shape)
    assert acts.shape == (*leading, *sae.latent_shape)
    assert codes.leading == leading
    assert out.isfinite().all()
    assert torch.equal(codes.to_dense(), acts)
    torch.testing.assert_close(sae.decode(acts, sae.row_context(u)), out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(codes), out, rtol=1e-5, atol=1e-5)


@every_form
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_shape_is_kept(name: str, geometry: str, shape: tuple[int, ...]) -> None:
    sae = make_sae(name, geometry)
    assert_one_function(sae, inputs(sae, *shape))


@every_normalized_form
def test_every_normalisation_is_one_function(name: str, geometry: str, normalization: str) -> None:
    """With a row of zeros among the others: it stays finite, and leaves its neighbours alone."""
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    u = inputs(sae, 2, 3)
    plain = sae(u)
    u[0, 1] = 0
    assert_one_function(sae, u)
    torch.testing.assert_close(sae(u)[1], plain[1], rtol=1e-5, atol=1e-5)


@every_form
def test_rows_are_independent_and_mode_does_not_matter(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    u, other = inputs(sae, 6), inputs(sae, 4, seed=9)
    together = sae.encode(u)
    if sae.reads_sequences:  # a row may depend on those before it, and on no other
        torch.testing.assert_close(sae.encode(u[:3]), together[:3], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sae.encode(torch.stack([u[:3], u[3:]]))[0], together[:3], rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(sae.encode(u[2:3])[0], together[2], rtol=1e-5, atol=1e-5)
    context = sae.row_context(u)
    for call in (sae.encode, sae.encode_sparse, sae):
        call(other)  # nothing of another call may be left behind
    torch.testing.assert_close(sae.decode(together, context), sae(u), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.eval().encode(u), together, rtol=0, atol=0)
    codes = sae.encode_sparse(u)
    assert 0 < (codes.values != 0).sum() < 6 * sae.geometry.n_latents


@pytest.mark.parametrize(
    ("name", "geometry", "normalization"), [case for case in EVERY_NORMALIZED_FORM if case[2] in ("center", *PER_ROW)]
)
def test_decode_asks_for_context_exactly_where_it_is_needed(name: str, geometry: str, normalization: str) -> None:
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]))
    assert sae.needs_context >= (normalization in PER_ROW or "skip" in geometry)
    u = inputs(sae, 5)
    acts = sae.encode(u)
    if not sae.needs_context:
        torch.testing.assert_close(sae.decode(acts), sae(u), rtol=1e-5, atol=1e-5)
        assert sae.encode_sparse(u).context is None
        return
    with pytest.raises(MissingContextError, match=r"decode\(acts, context=sae\.row_context\(u\)\)"):
        sae.decode(acts)
    # ... and there it matters: the context of other rows gives another output.
    assert relative(sae.decode(acts, sae.row_context(2 * u.flip(0))), sae(u)) > 1e-3


@forms_in("sae", "skip", "transcoder")
def test_heads_are_flattened_and_restored(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry, reshape_activations="hook_z")
    flat = inputs(sae, 2, 3)
    for heads in (4, 8):  # two splits in a row: nothing of the first may remain
        split = flat.reshape(2, 3, heads, D_IN // heads)
        wanted = split.shape if sae.geometry.same_site else (2, 3, *sae.geometry.out_shape)
        torch.testing.assert_close(sae(split), sae(flat).reshape(wanted))
        torch.testing.assert_close(sae.encode(split), sae.encode(flat))
        decoded = sae.decode(sae.encode(split), sae.row_context(split))
        torch.testing.assert_close(decoded, sae(split), rtol=1e-5, atol=1e-5)
    assert sae(flat).shape == (2, 3, *sae.geometry.out_shape)
    if not sae.needs_context:
        assert sae.decode(sae.encode(flat.reshape(2, 3, 4, 8))).shape == (2, 3, *sae.geometry.out_shape)


@every
def test_wrong_width_is_named(name: str) -> None:
    sae = make_sae(name)
    with pytest.raises(ShapeError, match=r"expected activations of shape \[\.\.\., 32\], found \[4, 31\]"):
        sae.encode(torch.zeros(4, 31))
    with pytest.raises(ShapeError, match="expected codes of width d_sae = 96, found 95"):
        sae.decode(torch.zeros(4, 95), sae.row_context(torch.zeros(4, D_IN)))
    with pytest.raises(ShapeError, match=r"heads · d_head = 32"):
        make_sae(name, reshape_activations="hook_z")(torch.zeros(4, 4, 9))


@forms_in("crosscoder", "clt")
def test_several_sites_are_named(name: str, geometry: str) -> None:
    sae = make_sae(name, geometry)
    with pytest.raises(ShapeError, match=r"expected activations of shape \[\.\.\., 3, 32\], found \[4, 2, 32\]"):
        sae(torch.zeros(4, 2, 32))
    with pytest.raises(ShapeError, match=r"expected activations of shape \[\.\.\., 3, 32\], found \[96\]"):
        sae.encode(torch.zeros(96))


def test_every_architecture_has_the_plain_form() -> None:
    assert {name for name, geometry in FORMS if geometry == "sae"} == {name for name, _ in FORMS}
    assert {geometry for _, geometry in FORMS} == set(GEOMETRIES)
