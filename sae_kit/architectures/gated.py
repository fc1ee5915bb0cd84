"""Gated: one product decides which latents are on, the same product says how much (arXiv 2404.16014)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit import ops
from sae_kit.annealing import PAnnealing
from sae_kit.architectures.standard import lp_penalty
from sae_kit.config import Tokens
from sae_kit.ops import Codes
from sae_kit.registry import register
from sae_kit.sae import SAE, Encoding, squared_error
from sae_kit.sae_config import Coefficient, SAEConfig, training_only


@dataclass(frozen=True, kw_only=True)
class GatedSAEConfig(SAEConfig):
    """A gate that is penalised and a magnitude that is not, so codes do not shrink."""

    l1_coefficient: float = training_only(1.0)
    """weight of the penalty on the gate"""
    l1_warm_up_tokens: Tokens = training_only(0)
    """the penalty grows linearly over so many tokens"""
    target_l0: float | None = training_only(None)
    """after the warm-up, move the coefficient until the mean L0 is this; None = it stays"""
    detach_aux_decoder: bool = training_only(True)
    """the gate's own reconstruction sees a frozen copy of the decoder, as in the paper"""
    decoder_norm_constraint: Literal["free", "unit"] = training_only("unit")
    """unit, as in the paper: the penalty on the gate would shrink free rows, and nothing would hold them"""
    p_annealing: PAnnealing | None = training_only(None)
    """penalise Σ|gate|^p with a p that falls in the course of the run; None = p stays 1"""

    def coefficients(self) -> dict[str, Coefficient]:
        return {"l1_coefficient": Coefficient(self.l1_coefficient, self.l1_warm_up_tokens)}

    def controlled_l0(self) -> float | None:
        return self.target_l0

    def penalty_annealing(self) -> PAnnealing | None:
        return self.p_annealing


@register("gated", GatedSAEConfig)
class GatedSAE(SAE):
    """c = 1[π > 0] ⊙ relu(m) with q = (x − a·b_dec) W_enc, π = q + b_gate, m = exp(r_mag) ⊙ q + b_mag.

    Losses: λ · E_b Σ relu(π_i) n_i, and E_b ‖relu(π) W_dec + b_dec − y‖², which gives the gate its gradient (the
    step 1[π > 0] has none).
    """

    cfg: GatedSAEConfig
    b_gate: Tensor
    b_mag: Tensor
    r_mag: Tensor

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super().parameter_shapes()
        del shapes["b_enc"]
        return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), self.latent_shape)

    def encoding(self, x: Float[Tensor, "..."], on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        return self._encoding(self.project(x, torch.zeros_like(self.b_gate)), on_pre)

    def training_encoding(self, x: Float[Tensor, "rows ..."], values: Mapping[str, float]) -> Encoding:
        return self._encoding(self.project_above(x, torch.zeros_like(self.b_gate), -self.b_gate.detach().flatten()))

    def _encoding(self, shared: Codes, on_pre: Callable[[Tensor], Tensor] | None = None) -> Encoding:
        q = ops.values_of(shared)
        b_gate, b_mag, r_mag = (
            ops.of_latents(each.flatten(), shared) for each in (self.b_gate, self.b_mag, self.r_mag)
        )
        gate, magnitude = q + b_gate, q * r_mag.exp() + b_mag
        magnitude = on_pre(magnitude) if on_pre else magnitude
        codes = ops.with_values(shared, (gate > 0) * torch.relu(magnitude))
        return Encoding(codes, ops.with_values(shared, gate))

    def preactivations_of(
        self, x: Float[Tensor, "rows ..."], latents: Int[Tensor, " latents"], layer: int = 0
    ) -> Float[Tensor, "rows latents"]:
        """m, with r_mag as a constant."""
        r_mag = self.geometry.latents(self.r_mag.detach().flatten(), layer)[latents]
        b_mag = self.geometry.latents(self.b_mag.flatten(), layer)[latents]
        return self.project_some(x, latents, layer) * r_mag.exp() + b_mag

    def penalty(self, encoding: Encoding, p: float) -> Float[Tensor, ""]:
        """E_b ‖relu(π) ⊙ n‖_p."""
        return lp_penalty(ops.scale(self._gate_codes(encoding), self.decoder_norms()), p).mean()

    def _gate_codes(self, encoding: Encoding) -> Codes:
        """relu(π)"""
        assert encoding.pre is not None
        return ops.with_values(encoding.pre, torch.relu(ops.values_of(encoding.pre)))

    def sparsity_losses(
        self, encoding: Encoding, y: Float[Tensor, "rows ..."], values: Mapping[str, float]
    ) -> dict[str, Float[Tensor, ""]]:
        W_dec, b_dec = self.W_dec, self.b_dec
        if self.cfg.detach_aux_decoder:
            W_dec, b_dec = self.geometry.detached(W_dec), b_dec.detach()
        reconstructed = self.geometry.decode(self._gate_codes(encoding), W_dec) + b_dec
        if encoding.extra is not None:
            reconstructed = reconstructed + encoding.extra.detach()
        return {
            "l1_loss": values["l1_coefficient"] * self.penalty(encoding, values.get("p", 1.0)),
            "auxiliary_reconstruction_loss": squared_error(reconstructed, y),
        }

    def reset_latents(self, latents: Int[Tensor, " latents"]) -> None:
        for bias in (self.b_gate, self.b_mag, self.r_mag):
            bias.view(-1)[latents] = 0.0

    def scale_biases(self, factor: Float[Tensor, "..."]) -> None:
        self.b_gate.mul_(factor)
        self.b_mag.mul_(factor)

    def shift_preactivations(self, delta: Float[Tensor, " n_latents"]) -> None:
        delta = delta.reshape(self.latent_shape)
        self.b_gate.add_(delta)
        self.b_mag.add_(delta * self.r_mag.double().exp())
