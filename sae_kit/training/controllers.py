"""What steers a coefficient while a run goes on."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import State

RATE, UNIT = 1e-3, 4096  # of a run of any length, at least: change of ln f over so many tokens, by unit of its error
CROSSINGS = 15.0  # how often f could go through a factor of e in the course of a run, if it always went one way
WINDOW = 100_000  # tokens over which L0 is averaged, at most
WINDOWS = 80  # of these averages in a run
SLOWER, LEAD = 3, 2.0  # the window of the other average; how far ahead their difference looks
FURTHEST = 0.5  # errors beyond it count as that
LARGEST = 100.0  # factor, either way


class L0Controller:
    """The factor f on the penalty's coefficient that brings the mean L0 to its target.

        ln f ← ln f + η · rows/4096 · clip(ln(L̄ / target) + 2 ln(L̄ / L̄₃), −½, ½),   0.01 <= f <= 100,

    with L̄ averaged over a window and L̄₃ over three of them: the second term is where L0 is going. Without it a
    coefficient that is too high keeps growing while L0 comes down from its start, and comes back when latents are dead.
    All of it stays on the device.
    """

    def __init__(self, target: float, device: torch.device, rate: float = RATE, window: int = WINDOW) -> None:
        self.target, self.rate, self.window = target, rate, window
        self._slower = torch.tensor([1.0, SLOWER], dtype=torch.float64, device=device)
        self._log_factor = torch.zeros((), dtype=torch.float64, device=device)
        self._averages = torch.zeros(2, dtype=torch.float64, device=device)
        self._weights = torch.zeros(2, dtype=torch.float64, device=device)

    @classmethod
    def of_run(cls, target: float, device: torch.device, total: int) -> "L0Controller":
        """One that has the time to reach its target in a run of `total` tokens, and then to hold it."""
        rate = max(RATE, CROSSINGS / FURTHEST * UNIT / total)
        return cls(target, device, rate, min(WINDOW, max(total // WINDOWS, 1)))

    @property
    def factor(self) -> Float[Tensor, ""]:
        return self._log_factor.exp()

    @torch.no_grad()
    def observe(self, fired: Int[Tensor, ""], rows: int, *, steers: bool, bad: Bool[Tensor, ""]) -> None:
        """Take in a step on `rows` with so many firings; the factor moves only if it `steers`, after the warm-up."""
        beta = torch.exp(-rows / self.window / self._slower)
        averages = beta * self._averages + (1 - beta) * fired.double() / rows
        weights = beta * self._weights + (1 - beta)
        self._averages = torch.where(bad, self._averages, averages)
        self._weights = torch.where(bad, self._weights, weights)
        if not steers:
            return
        now, before = (averages / weights / self.target).clamp(min=1e-30).log().unbind()
        off = (now + LEAD * (now - before)).clamp(-FURTHEST, FURTHEST)
        limit = math.log(LARGEST)
        moved = (self._log_factor + self.rate * rows / UNIT * off).clamp(-limit, limit)
        self._log_factor = torch.where(bad, self._log_factor, moved)

    def state_dict(self) -> State:
        """Tensors from which `load_state_dict` goes on."""
        return {"log_factor": self._log_factor, "averages": self._averages, "weights": self._weights}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        for name, tensor in state.items():
            setattr(self, f"_{name}", tensor.to(self._log_factor.device, copy=True))
