"""Capacity (Scherlis et al. 2022, 2210.01892): how much of a dimension each vector has for itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.errors import ShapeError
from sae_kit.ops import widen

MOST = 4_096
"""Vectors at once: all pairs of them are compared."""


@torch.no_grad()
def capacity(vectors: Float[Tensor, "vectors width"]) -> Float[Tensor, " vectors"]:
    """(v_i·v_i)² / Σ_j (v_i·v_j)²: 1 if v_i is orthogonal to all others, 1/n for n that are equal, NaN if it is 0.

    Of the rows of `W_dec` it is that of the paper; of the codes of a batch it says how far tokens share latents.

    Raises:
        ShapeError: more than 4,096 vectors; take a sample of them.
    """
    if len(vectors) > MOST:
        raise ShapeError(f"expected at most {MOST:,} vectors, because all pairs are compared, found {len(vectors):,}")
    wide = vectors.double()  # of which fourth powers are taken
    products = (wide @ wide.T).square()
    return (products.diagonal() / products.sum(dim=1)).to(widen(vectors).dtype)  # 0 / 0 is NaN
