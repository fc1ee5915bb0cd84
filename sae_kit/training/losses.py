"""What one SAE is trained on: reconstruction, the architecture's own terms, and the terms for dead latents.

Losses live in training space (normalised activations), whatever the units of the model.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit import ops
from sae_kit.data.batch import Batch
from sae_kit.ops import SparseCodes, widen
from sae_kit.sae import SAE, AuxiliaryTask, Encoding
from sae_kit.training.dead import DeadLatents


class Pass(NamedTuple):
    """One forward pass in training space; tensors are in the dtype of the SAE."""

    x: Float[Tensor, "rows ..."]
    y: Float[Tensor, "rows ..."]
    encoding: Encoding
    y_hat: Float[Tensor, "rows ..."]
    scale: Float[Tensor, "..."] | None
    """of rows that were normalised one by one, to undo it; see `Normalization.undo`"""
    shift: Float[Tensor, "..."] | None


class Losses(NamedTuple):
    """What is minimised, and what is logged."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    """by name, each with its coefficient; parts that are logged beside the reconstruction among them"""


def training_pass(sae: SAE, batch: Batch, values: Mapping[str, float], *, amp: bool = False) -> Pass:
    """Normalise, encode by the rule of training, and reconstruct raw rows.

    With `amp` the products of encoder and decoder are of bfloat16; what they give is float32 again.
    """
    x, scale, shift = sae.norm_in.normalize(batch.x.to(sae.dtype))
    y = x if batch.y is batch.x and sae.geometry.same_site else sae.norm_target(batch.y.to(sae.dtype))
    # Threads share one cache of rounded weights, so on a CPU it would depend on their order which bits are found.
    cached = x.device.type != "cpu"
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp, cache_enabled=cached):
        encoding = sae.training_encoding(x, values)
        if encoding.extra is None:
            encoding = encoding._replace(extra=sae.extra_output(x))
        y_hat = sae.reconstruct(encoding.codes)
    if amp:
        encoding, y_hat = widened(encoding, sae.dtype), y_hat.to(sae.dtype)
    return Pass(x, y, encoding, y_hat if encoding.extra is None else y_hat + encoding.extra, scale, shift)


def widened(encoding: Encoding, dtype: torch.dtype) -> Encoding:
    """The encoding in the precision of losses."""
    codes, pre = (
        None if each is None else ops.with_values(each, ops.values_of(each).to(dtype))
        for each in (encoding.codes, encoding.pre)
    )
    assert codes is not None
    extra = None if encoding.extra is None else encoding.extra.to(dtype)
    return encoding._replace(codes=codes, pre=pre, extra=extra)


def training_losses(
    sae: SAE,
    run: Pass,
    values: Mapping[str, float],
    dead: DeadLatents,
    penalty_factor: Float[Tensor, ""] | None = None,
    reconstruction: float = 1.0,
) -> Losses:
    """All loss terms of a pass; `values` are coefficients and schedules, `dead` has observed its codes already.

    `penalty_factor` multiplies the terms that have a coefficient in `values`, `reconstruction` what is minimised of the
    error; the terms of that are logged without it.
    """
    cfg = sae.cfg
    objective, parts = sae.reconstruction_loss(run.encoding, run.y, run.y_hat)
    unit = None
    if cfg.reconstruction_loss == "fvu":
        unit = total_variance(run.y)
        unit = torch.where(unit > 0, unit, 1.0)  # rows that are all alike have none
        objective = objective / unit
    terms = parts if unit is None else {name: term / unit for name, term in parts.items()}
    own = sae.sparsity_losses(run.encoding, run.y, values)
    if penalty_factor is not None:
        for name in penalty_names(sae):
            own[name] = own[name] * penalty_factor.to(own[name].dtype)
    if cfg.aux_coefficient and len(dead.candidates):
        aux_k = cfg.aux_k or max(sae.d_out // 2, 1)
        tasks = sae.auxiliary_tasks(run.encoding, run.y, run.y_hat, dead.candidates)
        found = [task.weight * auxk_loss(sae, run, task, dead, aux_k) for task in tasks]
        if found:
            aux = cfg.aux_coefficient * torch.stack(found).sum() / (1.0 if unit is None else unit)
            # The gated SAE has a term of this name.
            own["auxiliary_reconstruction_loss"] = own.get("auxiliary_reconstruction_loss", 0.0) + aux
    if cfg.pre_act_loss_coefficient is not None:
        own["pre_act_loss"] = cfg.pre_act_loss_coefficient * pre_act_loss(sae, run.encoding, dead)
    return Losses(torch.stack([reconstruction * objective, *own.values()]).sum(), terms | own)


def penalty_names(sae: SAE) -> list[str]:
    """Loss terms that have a coefficient: `l1_coefficient` is that of `l1_loss`."""
    return [f"{name.removesuffix('_coefficient')}_loss" for name in sae.cfg.coefficients()]


def auxk_loss(sae: SAE, run: Pass, task: AuxiliaryTask, dead: DeadLatents, aux_k: int) -> Float[Tensor, ""]:
    """AuxK (Gao et al. 2024, A.2): each row's `aux_k` strongest dead latents reconstruct what the living ones missed.

    min(n_dead / aux_k, 1) · V_y · E‖e − ê‖² / V_e with the variances V of target y and residual e, so that a
    coefficient means the same in any units. Gradients reach the encoder, bias and decoder rows of dead latents alone.
    """
    _, layer, latents, residual = task
    W_dec = sae.geometry.decoder(sae.W_dec, layer)[latents]
    still_dead = sae.geometry.latents(sae.tokens_since_fired, layer)[latents] >= dead.after
    acts = sae.activation(sae.preactivations_of(run.x, latents, layer)) * still_dead
    if len(latents) > aux_k:
        ranked = acts.detach().abs()
        if sae.rescales:
            ranked = ranked * sae.geometry.block_norms(W_dec.detach())
        chosen = ranked.topk(aux_k, dim=1, sorted=False).indices
        codes = SparseCodes(acts.gather(1, chosen), chosen, len(latents), (len(acts),))
        dense = aux_k > sae.sparse_share * len(latents)
        explained = ops.decode(codes.to_dense() if dense else codes, W_dec)
    else:
        explained = acts @ W_dec
    few = (still_dead.sum() / aux_k).clamp(max=1.0)
    variance = total_variance(residual)
    target = sae.geometry.written(run.y, layer)
    scale = torch.where(variance > 0, few * total_variance(target) / variance, 0.0)
    return scale.detach() * (residual - widen(explained)).square().sum(dim=1).mean()


def pre_act_loss(sae: SAE, encoding: Encoding, dead: DeadLatents) -> Float[Tensor, ""]:
    """E_b Σ relu(θ_i − h_i) n_i over dead latents, or over all (Anthropic, January 2025).

    n is a constant: a lone gradient moves a parameter at full speed under Adam, and would shrink dead decoder rows.
    """
    assert isinstance(encoding.pre, Tensor)
    pre, norms, threshold = widen(encoding.pre), sae.decoder_norms().detach(), sae.gate_threshold()
    below = -pre if threshold is None else threshold - pre
    if sae.cfg.pre_act_on == "dead":
        latents = dead.candidates
        weight = norms[latents] * (sae.tokens_since_fired[latents] >= dead.after)
        return (torch.relu(below[:, latents]) * weight).sum(dim=1).mean()
    return (torch.relu(below) * norms).sum(dim=1).mean()


def total_variance(rows: Float[Tensor, "rows ..."]) -> Float[Tensor, ""]:
    """E‖row − mean row‖² over the batch, without gradient."""
    flat = widen(rows.detach()).flatten(1)
    return (flat - flat.mean(dim=0)).square().sum(dim=1).mean()
