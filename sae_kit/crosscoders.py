"""What the decoder of a crosscoder says about its sites: which latents they share, and which belong to one of them.

With the sites being two models this is model diffing (Lindsey et al. 2024, "Sparse crosscoders for cross-layer
features and model diffing"; Minder et al. 2025, arXiv 2504.02922).
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.errors import ConfigError
from sae_kit.geometry import SMALLEST_NORM
from sae_kit.sae import SAE


class DecoderStatistics(NamedTuple):
    """Of every latent; float32 or wider."""

    norms: Float[Tensor, "d_sae sites"]
    """‖W_dec[i, p]‖, in units of each site's activations"""
    relative_norms: Float[Tensor, "d_sae sites"]
    """‖W_dec[i, p]‖ / Σ_q ‖W_dec[i, q]‖: near 1 at one site = exclusive to it, equal everywhere = shared"""
    cosines: Float[Tensor, "d_sae sites sites"]
    """cosine of the directions that a latent writes at two sites; 0 where it writes nothing at one of them"""


@torch.no_grad()
def decoder_statistics(sae: SAE) -> DecoderStatistics:
    """Norms of the decoder rows at each site, and cosines between sites, of the SAE as it is.

    Norms compare what is comparable: with a normalisation that is not folded, activations of mean norm √d at each site
    (what Lindsey et al. do); after `to_inference()`, raw units. Cosines between two models compare their coordinates:
    they mean something where these are shared, as between a base model and its fine-tuning.

    Raises:
        ConfigError: not a crosscoder.
    """
    if sae.geometry.kind != "crosscoder":
        raise ConfigError(f"expected a crosscoder, which writes several sites, found a {sae.geometry.kind}")
    rows = sae.W_dec if sae.W_dec.dtype.itemsize >= 4 else sae.W_dec.float()
    norms = torch.linalg.vector_norm(rows, dim=-1)
    directions = rows / norms.clamp(min=SMALLEST_NORM)[..., None]
    relative = norms / norms.sum(dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)
    return DecoderStatistics(norms, relative, directions @ directions.mT)
