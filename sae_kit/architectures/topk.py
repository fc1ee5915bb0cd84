"""TopK: the k largest latents of each row (Gao et al. 2024, arXiv 2406.04093; Makhzani & Frey 2013, 1312.5663)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.errors import ConfigError
from sae_kit.ops import SparseCodes
from sae_kit.registry import register
from sae_kit.sae import SAE, Encoding, SAEConfig, training_only


@dataclass(frozen=True, kw_only=True)
class TopKSAEConfig(SAEConfig):
    """Exactly k candidates per row; those of them that are positive are on."""

    k: int = 32
    """latents selected in each row"""
    rescale_acts_by_decoder_norm: bool = True
    """rank and report latents as h·n, n the norm of their decoder row"""
    aux_coefficient: float = training_only(1 / 32)
    """weight of AuxK, the loss in which dead latents explain what the living ones miss; 0 = off"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"k must lie between 1 and d_sae = {self.d_sae}, found {self.k}")


@register("topk", TopKSAEConfig)
class TopKSAE(SAE):
    """The k largest of z = h·n in each row are kept and relu is applied to them: ‖c‖₀ ≤ k, c ≥ 0.

    The kept value is relu(h)·n and the decoder divides by n again, so n decides only the ranking and its gradient
    is zero. The sparse codes here carry relu(h); `encode` multiplies by n.
    """

    cfg: TopKSAEConfig
    norm_fold_is_exact = False

    def encoding(self, x: Float[Tensor, "... d_in"], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        pre = self.preactivations(x)
        pre = on_pre(pre) if on_pre else pre
        rows = pre.reshape(-1, self.d_sae)
        ranked = rows.detach() * self.decoder_norms().detach() if self.rescales else rows.detach()
        indices = ranked.topk(self.cfg.k, dim=1, sorted=False).indices
        values = torch.relu(rows.gather(1, indices))
        return Encoding(SparseCodes(values, indices, self.d_sae, tuple(pre.shape[:-1])), pre)
