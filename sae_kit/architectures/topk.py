"""TopK: the k largest latents of each row (Gao et al. 2024, arXiv 2406.04093; Makhzani & Frey 2013, 1312.5663)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae_kit.architectures._selection import RowSelectionConfig, RowSelectionSAE
from sae_kit.registry import register


@dataclass(frozen=True, kw_only=True)
class TopKSAEConfig(RowSelectionConfig):
    """Exactly k candidates per row; those of them that are positive are on."""


@register("topk", TopKSAEConfig)
class TopKSAE(RowSelectionSAE):
    """The k largest of z = h·n in each row are kept and relu is applied to them: ‖c‖₀ ≤ k, c ≥ 0."""

    def strength(self, z: Float[Tensor, "rows n_latents"]) -> Float[Tensor, "rows n_latents"]:
        return z
