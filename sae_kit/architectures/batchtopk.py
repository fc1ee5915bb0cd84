"""BatchTopK: the k·B largest latents of a batch, and a threshold for use (Bussmann et al. 2024, arXiv 2412.06410)."""

from dataclasses import dataclass

from sae_kit.architectures._selection import BatchSelectionConfig, BatchSelectionSAE
from sae_kit.registry import register


@dataclass(frozen=True, kw_only=True)
class BatchTopKSAEConfig(BatchSelectionConfig):
    """k latents per row on average: rows that need more of them take them from rows that need fewer."""


@register("batchtopk", BatchTopKSAEConfig)
class BatchTopKSAE(BatchSelectionSAE):
    """Selection over the batch while training, over a learned threshold in use; saved for use as JumpReLU."""
