"""Moving scales and norms into weights, in place, without changing what an SAE computes.

With x = (u − m) M and v̂ = ŷ M'⁻¹ + m' (an affine normalisation of what is read and of what is written):

    W_enc ← M W_enc      W_dec ← W_dec M'⁻¹      A = M W_skipᵀ M'⁻¹, W_skip ← Aᵀ      b_dec ← b_dec M'⁻¹ + m' − m A

and pre-activations are shifted by what (x − a·b_dec) W_enc loses: (a·b_dec' − m − a·b_dec M⁻¹) W_enc'.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kit.errors import ConfigError
from sae_kit.normalization import Affine, Normalization

if TYPE_CHECKING:
    from sae_kit.sae import SAE
    from sae_kit.weights import SAEWeights


def fold_decoder_norm(sae: SAE) -> None:
    """See `SAE.fold_decoder_norm`."""
    if not sae.decoder_norm_folds():
        raise ConfigError(
            f"the decoder norms of this {sae.cfg.architecture} SAE differ and take no part in its selection: "
            "folding them would change which latents are on"
        )
    norms = sae.decoder_norms()
    sae.scale_latents(norms)
    sae.geometry.scale_decoder(sae.W_dec, (1 / norms).to(sae.dtype))
    record(sae, decoder_norm=True)
    if sae.rescales:
        sae.cfg = dataclasses.replace(sae.cfg, rescale_acts_by_decoder_norm=False)


def fold_normalization(sae: SAE) -> None:
    """See `SAE.fold_normalization`."""
    if sae.rescales:
        fold_decoder_norm(sae)
    read, written = sae.norm_in.affine(), sae.norm_target.affine()
    facts: dict[str, object] = {}
    for key, norm in (("in", sae.norm_in), ("out", sae.norm_target)):
        if norm.mode == "covariance_whitening":
            facts["whitening"] = True
        else:
            facts[f"scale_{key}"] = norm.scale.tolist()
    sae.fold_affine(read, written)
    record(sae, **facts)
    sae.norm_in = Normalization("none", sae.geometry.in_shape)
    if not sae.geometry.same_site:
        sae.norm_out = Normalization("none", sae.geometry.out_shape)
    sae.cfg = dataclasses.replace(sae.cfg, normalize_activations="none")


def fold_affine(sae: SAEWeights, read: Affine, written: Affine) -> None:
    """Weights that read and write raw activations. See the formulas of this file."""
    geometry, subtracts = sae.geometry, bool(sae.cfg.apply_b_dec_to_input)
    W_enc = read.matrix @ sae.W_enc.double()
    b_dec = sae.b_dec.double()
    new = _rows(b_dec, written.inverse)
    if written.shift is not None:
        new = new + written.shift
    if geometry.skip:
        A = read.matrix @ sae.W_skip.double().mT @ written.inverse
        if read.shift is not None:
            new = new - _rows(read.shift, A)
        sae.W_skip.copy_(A.mT)
    shift = torch.zeros_like(b_dec) if read.shift is None else -read.shift
    if subtracts:
        shift = shift + new - _rows(b_dec, read.inverse)
    exact = subtracts and geometry.same_site and not geometry.skip  # the new b_dec then shifts the input as well
    if not exact and shift.any():
        zeros = torch.zeros(geometry.n_latents, dtype=torch.float64, device=shift.device)
        sae.shift_preactivations(geometry.project(shift[None], W_enc, zeros)[0])
    sae.W_enc.copy_(W_enc)
    for layer in range(geometry.layers):
        if geometry.cross_layer:
            sae.W_dec[layer].copy_(_rows(sae.W_dec[layer].double(), written.inverse[layer:]))
        else:
            sae.W_dec.copy_(_rows(sae.W_dec.double(), written.inverse))
    sae.b_dec.copy_(new)


def record(sae: SAE, **facts: object) -> None:
    """Note in the metadata what was folded: history, never applied."""
    ours = sae.cfg.metadata.extra.setdefault("sae_kit", {})
    ours.setdefault("folded", {}).update(facts)


def _rows(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows [..., sites, d] times the matrix of their site; without a site axis, times the one matrix."""
    return (rows[..., None, :] @ matrix).squeeze(-2) if matrix.ndim > 2 else rows @ matrix
