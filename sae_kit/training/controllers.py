"""What steers a coefficient while a run goes on."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import State

RATE, UNIT = 1e-3, 4096  # change of ln f, at most, over so many tokens
WINDOW = 100_000  # tokens over which L0 is averaged
LARGEST = 100.0  # factor, either way


class L0Controller:
    """The factor f on the penalty's coefficient that brings the mean L0 to its target.

        ln f ← ln f + η · rows/4096 · clip(ln(L̄0 / target), −1, 1),   0.01 <= f <= 100,

    with L̄0 averaged over 100,000 tokens and η = 1e-3. All of it stays on the device.
    """

    def __init__(self, target: float, device: torch.device, rate: float = RATE, window: int = WINDOW) -> None:
        self.target, self.rate, self.window = target, rate, window
        self._log_factor = torch.zeros((), dtype=torch.float64, device=device)
        self._average = torch.zeros((), dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def factor(self) -> Float[Tensor, ""]:
        return self._log_factor.exp()

    @torch.no_grad()
    def observe(self, fired: Int[Tensor, ""], rows: int, *, steers: bool, bad: Bool[Tensor, ""]) -> None:
        """Take in a step on `rows` with so many firings; the factor moves only if it `steers`, after the warm-up."""
        beta = math.exp(-rows / self.window)
        average = beta * self._average + (1 - beta) * fired.double() / rows
        weight = beta * self._weight + (1 - beta)
        self._average = torch.where(bad, self._average, average)
        self._weight = torch.where(bad, self._weight, weight)
        if not steers:
            return
        off = (average / weight / self.target).clamp(min=1e-30).log().clamp(-1, 1)
        limit = math.log(LARGEST)
        moved = (self._log_factor + self.rate * rows / UNIT * off).clamp(-limit, limit)
        self._log_factor = torch.where(bad, self._log_factor, moved)

    def state_dict(self) -> State:
        """Tensors from which `load_state_dict` goes on."""
        return {"log_factor": self._log_factor, "average": self._average, "weight": self._weight}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        for name, tensor in state.items():
            setattr(self, f"_{name}", tensor.to(self._log_factor.device, copy=True))
