"""One file per architecture; importing this folder registers them all.

A new architecture is one file here: a frozen config, a class with `encoding` (how latents switch on) and
`sparsity_losses`, and the decorator that pairs them. The loader, the command line and the contract tests read the
registry.
"""

from sae_kit.architectures.gated import GatedSAE, GatedSAEConfig
from sae_kit.architectures.jumprelu import JumpReLUSAE, JumpReLUSAEConfig
from sae_kit.architectures.standard import StandardSAE, StandardSAEConfig
from sae_kit.architectures.topk import TopKSAE, TopKSAEConfig

__all__ = [
    "GatedSAE",
    "GatedSAEConfig",
    "JumpReLUSAE",
    "JumpReLUSAEConfig",
    "StandardSAE",
    "StandardSAEConfig",
    "TopKSAE",
    "TopKSAEConfig",
]
