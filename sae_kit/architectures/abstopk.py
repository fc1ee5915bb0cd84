"""AbsTopK: the k latents of largest magnitude in each row, with their sign (arXiv 2510.00404)."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from sae_kit.architectures._selection import RowSelectionConfig, RowSelectionSAE
from sae_kit.registry import register


@dataclass(frozen=True, kw_only=True)
class AbsTopKSAEConfig(RowSelectionConfig):
    """k latents per row, positive or negative: one direction can stand for two opposite concepts."""


@register("abstopk", AbsTopKSAEConfig)
class AbsTopKSAE(RowSelectionSAE):
    """The k largest of |z|, z = h·n, in each row are kept as they are: f(−z) = −f(z)."""

    def strength(self, z: Float[Tensor, "rows n_latents"]) -> Float[Tensor, "rows n_latents"]:
        return z.abs()

    def activation(self, pre: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return pre
