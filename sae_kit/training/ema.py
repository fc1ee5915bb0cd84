"""An average of the weights over the last steps, which is evaluated and saved in their place."""

import copy

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.training.resampling import latents_first

UNIT = 4096
"""tokens over which the decay is stated"""


class WeightEMA:
    """a ← βa + (1 − β)p after each step, β = decay^(rows / 4096), from the first step on, in float32 or wider."""

    def __init__(self, sae: SAE, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {}
        self._sae = sae

    @torch.no_grad()
    def update(self, rows: int, bad: Bool[Tensor, ""]) -> None:
        """Take in the weights after a step on so many rows; nothing where the step was skipped."""
        if not self.weights:
            self.weights = {name: widen(p.detach()).clone() for name, p in self._sae.named_parameters()}
            return
        share = torch.where(bad, 0.0, 1 - self.decay ** (rows / UNIT))
        for name, parameter in self._sae.named_parameters():
            average = self.weights[name]
            average.lerp_(parameter.to(average.dtype), share.to(average.dtype))

    @torch.no_grad()
    def restart(self, latents: Int[Tensor, " latents"]) -> None:
        """These latents were given new weights: what they were before does not count."""
        for layer, own in self._sae.geometry.by_layer(latents):
            for name, parameter in self._sae.named_parameters():
                now = latents_first(self._sae, name, parameter.detach(), layer)
                if self.weights and now is not None:
                    average = latents_first(self._sae, name, self.weights[name], layer)
                    assert average is not None
                    average[own] = now[own].to(average.dtype)

    @torch.no_grad()
    def averaged(self) -> SAE:
        """A copy of the SAE with these weights, decoder rows of norm 1 if they are kept at it."""
        sae = copy.deepcopy(self._sae)
        for name, average in self.weights.items():
            sae.get_parameter(name).copy_(average)
        sae.restore_constraints()
        return sae

    def state_dict(self) -> State:
        """The averages by the names of their parameters."""
        return dict(self.weights)

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        own = dict(self._sae.named_parameters())
        self.weights = {name: torch.empty_like(own[name], dtype=t.dtype).copy_(t) for name, t in state.items()}
