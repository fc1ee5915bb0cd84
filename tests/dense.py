"""A dense reference of training: codes are a tensor [rows, latents], and every gradient is autograd's own.

It does what the sparse path does by the definitions alone, for SAEs of one site. Architectures with a threshold have a
dense path of their own, which `train.sparse_below` = 0 selects; here are those that always train on sparse codes.
"""

from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sae_kit.architectures._selection import BatchSelectionSAE, SelectionConfig, SelectionSAE
from sae_kit.architectures.matryoshka import MatryoshkaBatchTopKSAE
from sae_kit.ops import SparseCodes
from sae_kit.sae import SAE, Encoding, squared_error


def densely(sae: SAE) -> SAE:
    """`sae` itself, which selects latents into dense codes in training from now on."""
    replaced: dict[str, Any] = {}
    if isinstance(sae, SelectionSAE):
        replaced["training_encoding"] = partial(selected, sae)
    if isinstance(sae, BatchSelectionSAE):
        replaced["observe"] = partial(observe, sae)
    if isinstance(sae, MatryoshkaBatchTopKSAE):
        replaced["reconstruction_loss"] = partial(nested_loss, sae)
    for name, value in replaced.items():
        setattr(sae, name, value)
    return sae


def selected(sae: SelectionSAE, x: Tensor, values: Mapping[str, float]) -> Encoding:
    """c = activation(h) where z = h·n is among the k largest of a row, or the k·B largest of the batch."""
    centred = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    pre = centred @ sae.W_enc + sae.b_enc
    z = (pre * sae.W_dec.norm(dim=1) if sae.rescales else pre).detach()
    assert isinstance(sae.cfg, SelectionConfig)
    k = values.get("k", sae.cfg.k)
    pool = z.reshape(1, -1) if isinstance(sae, BatchSelectionSAE) else z
    strength = pool.abs() if sae.cfg.architecture == "abstopk" else pool
    number = round(k * len(x)) if isinstance(sae, BatchSelectionSAE) else round(k)
    on = torch.zeros_like(pool).scatter(1, strength.topk(number).indices, 1.0).reshape(z.shape)
    return Encoding(sae.activation(pre) * on, pre)


def observe(sae: BatchSelectionSAE, encoding: Encoding, values: Mapping[str, float]) -> None:
    """The threshold's average, which is taken over entries."""
    assert isinstance(encoding.codes, Tensor)
    sparse = SparseCodes.from_dense(encoding.codes.detach())
    type(sae).observe(sae, encoding._replace(codes=sparse), values)


def nested_loss(
    sae: MatryoshkaBatchTopKSAE, encoding: Encoding, y: Tensor, y_hat: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ_g α_g E‖ŷ_g − y‖² over the fixed prefixes, each from its own product."""
    codes, so_far, total = encoding.codes, sae.b_dec, torch.zeros(())
    assert isinstance(codes, Tensor)
    for (first, last), weight in zip(pairwise((0, *sae.cfg.widths)), sae.cfg.weights, strict=True):
        so_far = so_far + codes[:, first:last] @ sae.W_dec[first:last]
        total = total + weight * squared_error(so_far, y)
    return total, {}
