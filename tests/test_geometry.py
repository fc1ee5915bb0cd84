"""What is read and written, against the formulas written out: sites, layers, skip, norms."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import (
    D_IN,
    D_OUT,
    D_SAE,
    GEOMETRIES,
    SITES,
    batch,
    forms_in,
    inputs,
    make_config,
    make_sae,
    values_of,
)
from torch import Tensor, nn

from sae_kit.data.batch import Batch
from sae_kit.geometry import Geometry
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses, training_pass

geometries = pytest.mark.parametrize("geometry", GEOMETRIES)


def decoders(sae: SAE) -> list[Tensor]:
    return list(sae.W_dec) if isinstance(sae.W_dec, nn.ParameterList) else [sae.W_dec]


@forms_in("clt", "clt_skip")
def test_cross_layer_transcoder_is_its_double_loop(name: str, geometry: str) -> None:
    """ŷ_t = Σ_{l ≤ t} c_l W_dec[l][:, t − l] + b_dec[t] (+ x_t W_skip[t]ᵀ), the last layer included."""
    sae = make_sae(name, geometry, dtype="float64")
    u = inputs(sae, 7)
    codes = sae.encode(u)
    if sae.rescales:
        codes = codes / sae.decoder_norms().view(sae.latent_shape)
    expected = torch.zeros(7, *sae.geometry.out_shape, dtype=torch.float64)
    for target in range(SITES):
        for source in range(target + 1):
            expected[:, target] += codes[:, source] @ decoders(sae)[source][:, target - source]
        expected[:, target] += sae.b_dec[target]
        if sae.geometry.skip:
            expected[:, target] += u[:, target] @ sae.W_skip[target].T
    torch.testing.assert_close(sae(u), expected, rtol=1e-10, atol=1e-10)


def test_a_layer_of_a_transcoder_reads_that_layer_alone() -> None:
    sae = make_sae("standard", "clt")
    u = inputs(sae, 5)
    for layer in range(SITES):
        h = u[:, layer] @ sae.W_enc[layer] + sae.b_enc[layer]
        torch.testing.assert_close(sae.encode(u)[:, layer], torch.relu(h), rtol=1e-5, atol=1e-5)
        other = u.clone()
        other[:, layer] += 1
        changed = (sae.encode(other) != sae.encode(u)).flatten(2).any(dim=2).any(dim=0)
        assert changed.tolist() == [one == layer for one in range(SITES)]
        moved = (sae(other) - sae(u)).abs().amax(dim=(0, 2)) > 1e-4
        assert moved.tolist() == [one >= layer for one in range(SITES)], "no layer writes to an earlier one"


@forms_in("crosscoder_joint")
def test_joint_crosscoder_is_an_sae_on_sites_laid_side_by_side(name: str, geometry: str) -> None:
    """The same outputs, losses and gradients, tensor by tensor."""
    fields: dict[str, Any] = {"dtype": "float64", "apply_b_dec_to_input": False}
    cross = make_sae(name, geometry, **fields)
    flat = make_config(name, d_in=SITES * D_IN, **fields).build()
    with torch.no_grad():
        for (key, one), (_, other) in zip(flat.state_dict().items(), cross.state_dict().items(), strict=True):
            wide = key.startswith("W_enc") or key == "b_dec"
            one.copy_(other.flatten(0, 1) if wide else other.flatten(1) if key == "W_dec" else other)
    data = batch(cross, 30)
    x = data.x.flatten(1)
    torch.testing.assert_close(cross.encode(data.x), flat.encode(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cross(data.x).flatten(1), flat(x), rtol=1e-10, atol=1e-10)
    totals = []
    for sae, part in ((cross, data), (flat, Batch(x, x))):
        run = training_pass(sae, part, values_of(sae))
        total = training_losses(sae, run, values_of(sae), DeadLatents(sae, 10**9)).total
        total.backward()
        totals.append(total.detach())
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-10, atol=1e-10)
    for (key, one), other in zip(cross.named_parameters(), flat.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad.reshape(other.shape), other.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_summed_norms_rank_otherwise_than_joint_ones() -> None:
    summed, joint = (make_sae("topk", geometry) for geometry in ("crosscoder", "crosscoder_joint"))
    with torch.no_grad():
        for one, other in zip(summed.parameters(), joint.parameters(), strict=True):
            one.copy_(other)
    u = inputs(summed, 50)
    norms = torch.linalg.vector_norm(summed.W_dec, dim=2)
    torch.testing.assert_close(summed.decoder_norms(), norms.sum(dim=1))
    torch.testing.assert_close(joint.decoder_norms(), norms.square().sum(dim=1).sqrt())
    assert ((summed.encode(u) != 0) != (joint.encode(u) != 0)).any()


@geometries
def test_norms_are_over_all_that_a_latent_writes(geometry: str) -> None:
    sae = make_sae("standard", geometry)
    parts = [block.flatten(1).norm(dim=1) for block in decoders(sae)]
    if geometry == "crosscoder":
        parts = [sae.W_dec.norm(dim=2).sum(dim=1)]
    torch.testing.assert_close(sae.decoder_norms(), torch.cat(parts))
    with torch.no_grad():
        for block in decoders(sae):
            block.zero_()
    assert (sae.decoder_norms() == 1e-8).all(), "a row of zeros divides by no zero"


@geometries
def test_normals_point_where_the_norm_grows_fastest(geometry: str) -> None:
    sae = make_sae("standard", geometry, dtype="float64")
    rows = sae.geometry.decoder(sae.W_dec, 0).detach().clone().requires_grad_()
    sae.geometry.block_norms(rows).sum().backward()
    normals = sae.geometry.normals(rows.detach())
    assert rows.grad is not None
    torch.testing.assert_close(normals, rows.grad / rows.grad.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("geometry", ["skip", "skip_transcoder", "clt_skip"])
def test_skip_is_used_as_rows_times_its_transpose(geometry: str) -> None:
    """W_skip [d_out, d_in], also where both are equal and the matrix is not symmetric."""
    sae = make_sae("standard", geometry)
    u = inputs(sae, 4)
    W = sae.W_skip.detach().clone()
    with_skip = sae(u)
    with torch.no_grad():
        sae.W_skip.zero_()
    expected = torch.stack([u[:, i] @ W[i].T for i in range(SITES)], dim=1) if W.ndim == 3 else u @ W.T
    torch.testing.assert_close(with_skip - sae(u), expected, rtol=1e-4, atol=1e-5)
    if W.shape[-1] == W.shape[-2]:
        assert (W - W.mT).abs().max() > 0.1


def test_skip_acts_on_normalised_rows() -> None:
    sae = make_sae("standard", "skip_transcoder", normalize_activations="expected_average_only_in")
    sae.norm_in.scale.fill_(4.0)
    sae.norm_out.scale.fill_(0.5)
    u = inputs(sae, 4)
    context = sae.row_context(u)
    torch.testing.assert_close(context.extra, 4 * u @ sae.W_skip.T, rtol=1e-5, atol=1e-5)
    without = sae.decode(sae.encode(u), context._replace(extra=None))
    torch.testing.assert_close(sae(u) - without, 4 * u @ sae.W_skip.T / 0.5, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("geometry", "kind", "shapes"),
    [
        ("sae", "sae", {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}),
        ("transcoder", "transcoder", {"W_dec": (D_SAE, D_OUT), "b_dec": (D_OUT,)}),
        ("skip_transcoder", "skip_transcoder", {"W_skip": (D_OUT, D_IN)}),
        ("crosscoder", "crosscoder", {"W_enc": (SITES, D_IN, D_SAE), "W_dec": (D_SAE, SITES, D_IN)}),
        ("clt", "clt", {"b_enc": (SITES, D_SAE), "W_dec.1": (D_SAE, SITES - 1, D_OUT), "b_dec": (SITES, D_OUT)}),
        ("clt_skip", "clt", {"W_skip": (SITES, D_IN, D_IN), "W_dec.2": (D_SAE, 1, D_IN)}),
    ],
)
def test_public_shapes(geometry: str, kind: str, shapes: dict[str, tuple[int, ...]]) -> None:
    sae = make_sae("standard", geometry)
    assert sae.geometry.kind == kind
    found = {key: tuple(parameter.shape) for key, parameter in sae.named_parameters()}
    assert shapes.items() <= found.items()
    assert ("W_skip" in found) == sae.geometry.skip


def test_blocks_and_latents() -> None:
    clt = Geometry((3, 4), (3, 5), 10, same_site=False, cross_layer=True)
    assert (clt.layers, clt.n_latents, clt.latent_shape, clt.d_read) == (3, 30, (3, 10), 4)
    found = clt.by_layer(torch.tensor([0, 9, 20, 29]))
    assert [(layer, part.tolist()) for layer, part in found] == [(0, [0, 9]), (2, [0, 9])]
    y = torch.arange(30.0).reshape(2, 3, 5)
    assert torch.equal(clt.written(y, 1), y[:, 1:].flatten(1))
    assert torch.equal(clt.read(y, 1), y[:, 1])
    cross = dataclasses.replace(clt, cross_layer=False)
    assert (cross.layers, cross.n_latents, cross.latent_shape, cross.d_read) == (1, 10, (10,), 12)
    assert torch.equal(cross.written(y, 0), y.flatten(1))
    assert cross.by_layer(torch.tensor([], dtype=torch.int64)) == []
