"""C5: moving scales, norms and batch rules into weights changes nothing that an SAE computes."""

import copy
import math
from typing import Any

import pytest
import torch
from fields import others_of, refused
from helpers import (
    ARCHITECTURES,
    D_IN,
    FORMS,
    GEOMETRIES,
    NORMALIZATIONS,
    PER_ROW,
    estimated,
    every,
    has_form,
    inputs,
    make_config,
    make_sae,
    relative,
)

from sae_kit.errors import ConfigError
from sae_kit.sae import SAE

FOLDABLE = (("average", 0.02), ("average", 40.0), ("center", 40.0), ("whitening", 0.02))
"""Normalisations, with the factor by which activations are smaller than of norm √d."""


def subtracting(geometry: str, subtract: bool, normalization: str) -> dict[str, Any]:
    """Fields of a form that subtracts b_dec, or does not."""
    fields: dict[str, Any] = {**GEOMETRIES[geometry], **NORMALIZATIONS[normalization]}
    if subtract and "out_shape" in fields and not fields.get("cross_layer"):
        fields["out_shape"] = (D_IN,)  # another site of the same width
    return {**fields, "apply_b_dec_to_input": subtract}


CASES = [
    pytest.param(name, geometry, fields, scale, id=f"{name}-{geometry}-{subtract}-{normalization}-{scale}")
    for name, geometry in FORMS
    for subtract in (False, True)
    for normalization, scale in FOLDABLE
    if not refused(name, fields := subtracting(geometry, subtract, normalization))
]


def fold_normalization(sae: SAE) -> None:
    """Fold, where the architecture allows it.

    Raises:
        ConfigError: it says that it cannot.
    """
    sae.fold_normalization()
    assert sae.norm_in.mode == sae.norm_target.mode == sae.cfg.normalize_activations == "none"


@pytest.mark.parametrize(("name", "geometry", "fields", "scale"), CASES)
def test_folds_are_exact(name: str, geometry: str, fields: dict[str, Any], scale: float) -> None:
    """Activations of norm √d / scale, b_dec not zero, unequal decoder norms, other statistics where other sites are
    written."""
    sae = estimated(make_sae(name, geometry, **fields), 1 / scale)
    folded = copy.deepcopy(sae)
    if not sae.geometry.same_site:
        assert not torch.allclose(sae.norm_in.affine().matrix[..., 0, 0], sae.norm_out.affine().matrix[..., 0, 0])
    u = inputs(sae, 50) / scale
    codes, output = sae.encode(u), sae(u)
    fold_normalization(folded)
    # One matrix that is encoder and decoder takes the scale only once: there the unit of the codes changes.
    tied = "W_enc" not in dict(sae.named_parameters())
    scaled = codes / sae.norm_in.affine().matrix[0, 0].float() if tied else codes
    assert relative(folded(u), output) < 1e-5
    assert relative(folded.encode(u), scaled) < 1e-5
    assert torch.equal(folded.encode(u) != 0, codes != 0)
    again = folded.decode(scaled, folded.row_context(u))
    assert relative(again, sae.decode(codes, sae.row_context(u))) < 1e-5


RESCALING = {True: {"rescale_acts_by_decoder_norm": True}, False: {"rescale_acts_by_decoder_norm": False}, None: {}}


@pytest.mark.parametrize(
    ("name", "geometry", "rescale"),
    [
        (*form, rescale)
        for form in FORMS
        for rescale in ((True, False) if "rescale_acts_by_decoder_norm" in others_of(form[0]) else (None,))
    ],
)
def test_decoder_norms_fold_exactly_or_are_refused(name: str, geometry: str, rescale: bool | None) -> None:
    normalization = "average" if has_form(name, geometry, "average") else "none"
    fields = {**NORMALIZATIONS[normalization], **RESCALING[rescale]}
    sae = estimated(make_sae(name, geometry, **fields))
    folded = copy.deepcopy(sae)
    u = inputs(sae, 50)
    codes, output, norms = sae.encode(u), sae(u), sae.decoder_norms()
    if not sae.decoder_norm_folds():
        with pytest.raises(ConfigError, match="folding them would change which latents are on"):
            folded.fold_decoder_norm()
        assert torch.equal(folded(u), output)
        return
    folded.fold_decoder_norm()
    torch.testing.assert_close(folded.decoder_norms(), torch.ones_like(norms))
    assert relative(folded(u), output) < 1e-5
    factor = torch.ones_like(norms) if sae.rescales else norms
    scaled = codes * factor.reshape(sae.latent_shape)
    assert relative(folded.encode(u), scaled) < 1e-5
    assert torch.equal(folded.encode(u) != 0, codes != 0)
    assert relative(folded.decode(scaled, sae.row_context(u)), sae.decode(codes, sae.row_context(u))) < 1e-5


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if "rescale_acts_by_decoder_norm" in others_of(name)])
def test_equal_norms_fold_whatever_the_selection(name: str) -> None:
    sae, folded = (make_sae(name, rescale_acts_by_decoder_norm=False) for _ in range(2))
    for one in (sae, folded):
        with torch.no_grad():
            one.geometry.scale_decoder(one.W_dec, 3 / one.decoder_norms())
            one.restore_constraints()
    assert folded.decoder_norm_folds()
    u = inputs(sae, 20)
    output = sae(u)
    assert relative(folded.fold_decoder_norm()(u), output) < 1e-5


@pytest.mark.parametrize(
    ("name", "geometry", "normalization"),
    [(*form, key) for form in FORMS for key in NORMALIZATIONS if has_form(*form, key)],
)
def test_to_inference_is_exact_idempotent_and_leaves_its_source(name: str, geometry: str, normalization: str) -> None:
    sae = estimated(make_sae(name, geometry, **NORMALIZATIONS[normalization]), 7.0)
    u = inputs(sae, 20) * 7
    before = {key: value.clone() for key, value in sae.state_dict().items()}
    cfg = sae.cfg.to_dict()
    once = sae.to_inference()
    torch.testing.assert_close(sae.state_dict(), before, rtol=0, atol=0)
    assert sae.cfg.to_dict() == cfg
    assert relative(once(u), sae(u)) < 1e-5
    assert once.cfg.normalize_activations == ("none" if normalization not in PER_ROW else sae.norm_in.mode)
    assert not once.selects_over_batch
    assert not once.rescales
    one_scale = len(sae.geometry.out_shape) == 1 and normalization != "whitening"
    if once.norm_fold_is_exact or (sae.rescales and one_scale):  # unit decoder rows wherever that changes no selection
        torch.testing.assert_close(once.decoder_norms(), torch.ones_like(sae.decoder_norms()))
    assert all(parameter.is_contiguous() for parameter in once.parameters())
    again = once.to_inference()
    assert again.cfg == once.cfg
    torch.testing.assert_close(again.state_dict(), once.state_dict(), rtol=1e-6, atol=1e-6)
    assert once.cfg.metadata.training_architecture == name
    details = once.cfg.metadata.training_architecture_details
    assert details is not None
    assert details["decoder_init_norm"] == sae.cfg.decoder_init_norm


@pytest.mark.parametrize(
    ("name", "normalization"),
    [
        (name, key)
        for name in ARCHITECTURES
        for key in ("average", "rms", "center", "whitening")
        if has_form(name, "sae", key)
    ],
)
def test_a_scale_on_the_data_changes_nothing_but_units(name: str, normalization: str) -> None:
    """C9: eight times the activations: the same codes, eight times the reconstruction."""
    sae, big = (estimated(make_sae(name, **NORMALIZATIONS[normalization]), scale) for scale in (1, 8))
    u = inputs(sae, 30)
    torch.testing.assert_close(big.encode(8 * u), sae.encode(u), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(big(8 * u), 8 * sae(u), rtol=1e-4, atol=1e-3)


@every
def test_two_saes_share_no_metadata(name: str) -> None:
    cfg = make_config(name)
    first, second = cfg.build(), cfg.build()
    first.fold_normalization()
    first.cfg.metadata.model_name = "x"
    assert second.cfg.metadata.model_name is None


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if has_form(name, "sae", "average")])
def test_what_was_folded_is_noted(name: str) -> None:
    sae = estimated(make_sae(name, normalize_activations="expected_average_only_in"))
    notes = sae.to_inference().cfg.metadata.extra["sae_kit"]["folded"]
    assert math.isclose(notes["scale_in"], float(sae.norm_in.scale), rel_tol=1e-6)
    assert "sae_kit" not in sae.cfg.metadata.extra
