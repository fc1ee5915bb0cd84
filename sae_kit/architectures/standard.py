"""ReLU with an L1 or Lp penalty (Cunningham et al. 2023, arXiv 2309.08600; Bricken et al. 2023).

p can be annealed towards 0 (Karvonen et al. 2024, arXiv 2408.00113).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit import ops
from sae_kit.annealing import PAnnealing
from sae_kit.config import Tokens
from sae_kit.errors import ConfigError
from sae_kit.ops import Codes
from sae_kit.registry import register
from sae_kit.sae import SAE, Encoding
from sae_kit.sae_config import Coefficient, SAEConfig, training_only

LP_OFFSET = 1e-3  # bounds the slope of x^p at 0 for p < 1


@dataclass(frozen=True, kw_only=True)
class StandardSAEConfig(SAEConfig):
    """ReLU latents, penalised by the length of their contributions."""

    l1_coefficient: float = training_only(1.0)
    """weight of the sparsity penalty"""
    lp_norm: float = training_only(1.0)
    """p of the penalty; 1 is the usual L1"""
    l1_warm_up_tokens: Tokens = training_only(0)
    """the penalty grows linearly over so many tokens"""
    target_l0: float | None = training_only(None)
    """after the warm-up, move the coefficient until the mean L0 is this; None = it stays"""
    p_annealing: PAnnealing | None = training_only(None)
    """let p fall in the course of the run; None = p stays at lp_norm"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lp_norm <= 0:
            raise ConfigError(f"lp_norm must be positive, found {self.lp_norm}")
        if self.p_annealing is not None and self.lp_norm != 1:
            raise ConfigError(f"p_annealing sets p itself: leave lp_norm out, found {self.lp_norm}")

    def coefficients(self) -> dict[str, Coefficient]:
        return {"l1_coefficient": Coefficient(self.l1_coefficient, self.l1_warm_up_tokens)}

    def controlled_l0(self) -> float | None:
        return self.target_l0

    def penalty_annealing(self) -> PAnnealing | None:
        return self.p_annealing


@register("standard", StandardSAEConfig)
class StandardSAE(SAE):
    """c = relu(h); loss λ · E_b ‖c ⊙ n‖_p with n_i = ‖W_dec[i]‖.

    The norm takes part with its gradient: that is what keeps the decoder from growing while the codes shrink.
    """

    cfg: StandardSAEConfig

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        pre = self.preactivations(x)
        pre = on_pre(pre) if on_pre else pre
        return Encoding(torch.relu(pre), pre)

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        pre = self.project_above(x, self.b_enc, torch.zeros_like(self.b_enc).flatten())
        return Encoding(ops.with_values(pre, torch.relu(ops.values_of(pre))), pre)

    def penalty(self, encoding: Encoding, p: float) -> Float[Tensor, ""]:
        """E_b ‖c ⊙ n‖_p."""
        return lp_penalty(ops.scale(encoding.codes, self.decoder_norms()), p).mean()

    def sparsity_losses(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], values: Mapping[str, float]
    ) -> dict[str, Float[Tensor, ""]]:
        p = values.get("p", self.cfg.lp_norm)
        return {"l1_loss": values["l1_coefficient"] * self.penalty(encoding, p)}


def lp_penalty(lengths: Codes, p: float) -> Float[Tensor, " batch"]:
    """‖row‖_p of non-negative codes; for p < 1, Σ (w + ε)^p − ε^p, which is 0 at 0 and has a bounded slope."""
    if p == 1:
        return ops.row_sums(lengths)
    values = ops.values_of(lengths)
    if p > 1:
        # A row of zeros has no gradient, but the root's slope there is infinite: keep it out of the graph.
        total = ops.row_sums(ops.with_values(lengths, values.pow(p)))
        return torch.where(total > 0, total, 1.0).pow(1 / p) * (total > 0)
    return ops.row_sums(ops.with_values(lengths, (values + LP_OFFSET).pow(p) - LP_OFFSET**p))
