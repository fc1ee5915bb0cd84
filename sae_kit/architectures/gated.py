"""Gated: one product decides which latents are on, the same product says how much (arXiv 2404.16014)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.config import Tokens
from sae_kit.ops import widen
from sae_kit.registry import register
from sae_kit.sae import SAE, Coefficient, Encoding, SAEConfig, training_only


@dataclass(frozen=True, kw_only=True)
class GatedSAEConfig(SAEConfig):
    """A gate that is penalised and a magnitude that is not, so codes do not shrink."""

    l1_coefficient: float = training_only(1.0)
    """weight of the penalty on the gate"""
    l1_warm_up_tokens: Tokens = training_only(0)
    """the penalty grows linearly over so many tokens"""
    detach_aux_decoder: bool = training_only(True)
    """the gate's own reconstruction sees a frozen copy of the decoder, as in the paper"""

    def coefficients(self) -> dict[str, Coefficient]:
        return {"l1": Coefficient(self.l1_coefficient, self.l1_warm_up_tokens)}


@register("gated", GatedSAEConfig)
class GatedSAE(SAE):
    """c = 1[π > 0] ⊙ relu(m) with q = (x − a·b_dec) W_enc, π = q + b_gate, m = exp(r_mag) ⊙ q + b_mag.

    Losses: λ · E_b Σ relu(π_i) n_i, and E_b ‖relu(π) W_dec + b_dec − y‖², which gives the gate its gradient (the
    step 1[π > 0] has none).
    """

    cfg: GatedSAEConfig
    b_gate: Float[Tensor, " d_sae"]
    b_mag: Float[Tensor, " d_sae"]
    r_mag: Float[Tensor, " d_sae"]

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        d, s = self.d_in, self.d_sae
        return {"W_enc": (d, s), "W_dec": (s, d), "b_dec": (d,), "b_gate": (s,), "b_mag": (s,), "r_mag": (s,)}

    def encoding(self, x: Float[Tensor, "... d_in"], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        shared = x @ self.W_enc
        if self.cfg.apply_b_dec_to_input:
            shared = shared - self.b_dec @ self.W_enc
        gate = shared + self.b_gate
        magnitude = shared * self.r_mag.exp() + self.b_mag
        magnitude = on_pre(magnitude) if on_pre else magnitude
        return Encoding((gate > 0) * torch.relu(magnitude), gate)

    def preactivations(
        self, x: Float[Tensor, "... d_in"], latents: Int[Tensor, " latents"] | None = None
    ) -> Float[Tensor, "... _"]:
        """m; of some latents only (dead ones, in AuxK) r_mag and b_dec are taken as constants."""
        W_enc, b_mag, r_mag, b_dec = self.W_enc, self.b_mag, self.r_mag, self.b_dec
        if latents is not None:
            W_enc, b_mag, r_mag, b_dec = W_enc[:, latents], b_mag[latents], r_mag[latents].detach(), b_dec.detach()
        shared = x @ W_enc
        if self.cfg.apply_b_dec_to_input:
            shared = shared - b_dec @ W_enc
        return shared * r_mag.exp() + b_mag

    def sparsity_losses(
        self, encoding: Encoding, y: Float[Tensor, "batch d_out"], coefficients: Mapping[str, float]
    ) -> dict[str, Float[Tensor, ""]]:
        gate = torch.relu(encoding.pre)
        W_dec, b_dec = self.W_dec, self.b_dec
        if self.cfg.detach_aux_decoder:
            W_dec, b_dec = W_dec.detach(), b_dec.detach()
        error = widen(gate @ W_dec + b_dec) - widen(y)
        return {
            "l1_loss": coefficients["l1"] * (gate * self.decoder_norms()).sum(dim=1).mean(),
            "auxiliary_reconstruction_loss": error.square().sum(dim=1).mean(),
        }

    def scale_latents(self, factor: Float[Tensor, " d_sae"]) -> None:
        for parameter in (self.W_enc, self.b_gate, self.b_mag):
            parameter.mul_(factor)
