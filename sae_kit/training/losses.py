"""What one SAE is trained on: reconstruction, the architecture's own terms, and AuxK for dead latents.

Losses live in training space (normalised activations), whatever the units of the model.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.ops import Codes, SparseCodes, widen
from sae_kit.sae import SAE, Encoding
from sae_kit.training.dead import DeadLatents


class Pass(NamedTuple):
    """One forward pass in training space; tensors are in the dtype of the SAE."""

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
    encoding: Encoding
    y_hat: Float[Tensor, "batch d_out"]


def training_pass(sae: SAE, batch: Batch) -> Pass:
    """Normalise, encode and reconstruct raw rows."""
    x, y = sae.norm_in(batch.x.to(sae.dtype)), sae.norm_in(batch.y.to(sae.dtype))
    encoding = sae.encoding(x)
    return Pass(x, y, encoding, sae.reconstruct(encoding.codes))


def training_losses(
    sae: SAE, run: Pass, coefficients: Mapping[str, float], dead: DeadLatents
) -> dict[str, Float[Tensor, ""]]:
    """All loss terms of a pass, each with its coefficient; `dead` has observed its codes already."""
    error = widen(run.y) - widen(run.y_hat)
    terms = {"mse_loss": error.square().sum(dim=1).mean()}
    terms |= sae.sparsity_losses(run.encoding, run.y, coefficients)
    aux_coefficient = sae.cfg.aux_coefficient
    if aux_coefficient and len(dead.candidates):
        aux_k = sae.cfg.aux_k or max(sae.d_in // 2, 1)
        aux = aux_coefficient * auxk_loss(sae, run, error.detach(), dead, aux_k)
        own = terms.get("auxiliary_reconstruction_loss", 0.0)  # the gated SAE has a term of this name
        terms["auxiliary_reconstruction_loss"] = own + aux
    return terms


def auxk_loss(
    sae: SAE, run: Pass, residual: Float[Tensor, "batch d_out"], dead: DeadLatents, aux_k: int
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, A.2): each row's `aux_k` strongest dead latents reconstruct what the living ones missed.

    min(n_dead / aux_k, 1) · V_y · E‖e − ê‖² / V_e with the variances V of target y and residual e, so that a
    coefficient means the same in any units. Gradients reach the encoder, bias and decoder rows of dead latents alone.
    """
    latents = dead.candidates
    W_dec = sae.W_dec[latents]
    still_dead = sae.tokens_since_fired[latents] >= dead.after
    acts = torch.relu(sae.preactivations(run.x, latents)) * still_dead
    if len(latents) > aux_k:
        ranked = acts.detach()
        if sae.rescales:
            ranked = ranked * torch.linalg.vector_norm(W_dec.detach(), dim=1)
        chosen = ranked.topk(aux_k, dim=1, sorted=False).indices
        codes: Codes = SparseCodes(acts.gather(1, chosen), chosen, len(latents), (len(acts),))
        explained = codes.decode(W_dec)
    else:
        explained = acts @ W_dec
    few = (still_dead.sum() / aux_k).clamp(max=1.0)
    variance = total_variance(residual)
    scale = torch.where(variance > 0, few * total_variance(widen(run.y)) / variance, 0.0)
    return scale.detach() * (residual - widen(explained)).square().sum(dim=1).mean()


def total_variance(rows: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """E‖row − mean row‖² over the batch."""
    return (rows - rows.mean(dim=0)).square().sum(dim=1).mean()
