"""What one SAE is trained on: reconstruction, the architecture's own terms, and AuxK for dead latents."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.ops import Codes, SparseCodes, firing_counts
from sae_kit.sae import SAE


class Losses(NamedTuple):
    """Loss terms of one batch, each with its coefficient, and what statistics need."""

    terms: dict[str, Float[Tensor, ""]]
    codes: Codes
    """detached"""
    reconstruction: Float[Tensor, "batch d_out"]
    """of the raw activations, detached"""

    @property
    def total(self) -> Float[Tensor, ""]:
        return torch.stack(list(self.terms.values())).sum()


class DeadLatents:
    """Which latents have been silent for `after` tokens, known without asking the device in every step.

    The list of candidates is read from the counters every `after / 10` tokens (at most a million); in between,
    those that fired again are masked on the device. A latent that dies in between waits for the next reading.
    """

    def __init__(self, sae: SAE, after: int) -> None:
        self.after = after
        self.refresh_every = max(min(1_000_000, after // 10), 1)
        self._sae = sae
        self._next_refresh = 0
        self.candidates: Int[Tensor, " candidates"] = torch.empty(0, dtype=torch.int64, device=sae.device)

    def observe(self, codes: Codes, rows: int, tokens: int) -> None:
        """Count the firings of a batch: once per optimizer step, before the dead mask is read."""
        sae = self._sae
        fired = firing_counts(codes)
        sae.firing_count += fired
        sae.tokens_seen += rows
        sae.tokens_since_fired += rows
        sae.tokens_since_fired.masked_fill_(fired > 0, 0)
        if tokens >= self._next_refresh:
            self.candidates = self.mask().nonzero().squeeze(1)
            self._next_refresh = tokens + self.refresh_every

    def mask(self) -> Bool[Tensor, " d_sae"]:
        return self._sae.tokens_since_fired >= self.after


def training_losses(
    sae: SAE, batch: Batch, coefficients: Mapping[str, float], dead: DeadLatents, tokens: int
) -> Losses:
    """All loss terms of `sae` on raw rows; losses live in training space. Advances the counters of firings.

    `tokens` is the number of rows trained on before this batch.
    """
    x, y = sae.norm_in(batch.x.to(sae.dtype)), sae.norm_in(batch.y.to(sae.dtype))
    encoding = sae.encoding(x)
    y_hat = sae.reconstruct(encoding.codes)
    error = widen(y_hat) - widen(y)
    terms = {"mse_loss": error.square().sum(dim=1).mean()}
    terms |= sae.sparsity_losses(x, encoding, coefficients)
    codes = detached(encoding.codes)
    dead.observe(codes, len(x), tokens)
    aux_coefficient = getattr(sae.cfg, "aux_coefficient", 0.0)
    if aux_coefficient and len(dead.candidates):
        aux_k = getattr(sae.cfg, "aux_k", None) or max(sae.d_in // 2, 1)
        terms["auxiliary_reconstruction_loss"] = aux_coefficient * auxk_loss(sae, x, y, -error.detach(), dead, aux_k)
    return Losses(terms, codes, sae.norm_in.inverse(y_hat.detach()))


def auxk_loss(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    y: Float[Tensor, "batch d_out"],
    residual: Float[Tensor, "batch d_out"],
    dead: DeadLatents,
    aux_k: int,
) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, A.2): the `aux_k` strongest dead latents of each row reconstruct what the rest missed.

    min(n_dead / aux_k, 1) · V_y · E‖e − ê‖² / V_e with the variances V of target y and residual e, so that a
    coefficient means the same in any units. Gradients reach the weights of dead latents and nothing else.
    """
    latents = dead.candidates
    W_enc, W_dec = sae.W_enc[:, latents], sae.W_dec[latents]
    bias = sae.b_enc[latents]
    if sae.cfg.apply_b_dec_to_input:
        bias = bias - sae.b_dec.detach() @ W_enc
    still_dead = sae.tokens_since_fired[latents] >= dead.after
    acts = torch.relu(x @ W_enc + bias) * still_dead
    if len(latents) > aux_k:
        ranked = acts.detach() * sae.decoder_norms().detach()[latents] if sae.rescales else acts.detach()
        chosen = ranked.topk(aux_k, dim=1, sorted=False).indices
        codes: Codes = SparseCodes(acts.gather(1, chosen), chosen, len(latents), (len(x),))
        explained = codes.decode(W_dec)
    else:
        explained = acts @ W_dec
    few = (still_dead.sum() / aux_k).clamp(max=1.0)
    variance = total_variance(residual)
    scale = torch.where(variance > 0, few * total_variance(widen(y)) / variance, 0.0)
    return scale.detach() * (residual - widen(explained)).square().sum(dim=1).mean()


def total_variance(rows: Float[Tensor, "batch d"]) -> Float[Tensor, ""]:
    """E‖row − mean row‖² over the batch."""
    return (rows - rows.mean(dim=0)).square().sum(dim=1).mean()


def widen(tensor: Tensor) -> Tensor:
    """float32 where the tensor is narrower: losses are never summed in half precision."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def detached(codes: Codes) -> Codes:
    if isinstance(codes, SparseCodes):
        return SparseCodes(codes.values.detach(), codes.indices, codes.d_sae, codes.leading, codes.row_offsets)
    return codes.detach()
