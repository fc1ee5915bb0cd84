"""Accumulators on the device, in float64: no update waits for it, and any order of merging gives the same numbers."""

import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Count, mean and total squared deviation of vectors: n, ȳ, M2 = Σ‖y − ȳ‖².

    Merged by δ = ȳ_b − ȳ_a, M2 = M2_a + M2_b + ‖δ‖² n_a n_b / n (Chan, Golub & LeVeque 1979).
    Σ‖y‖² − n‖ȳ‖² would cancel where the mean is large.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        self.n = 0
        self.mean: Float[Tensor, " width"] = torch.zeros(width, dtype=torch.float64, device=device)
        self.m2: Float[Tensor, ""] = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, rows: Float[Tensor, "n width"]) -> None:
        """Take in rows of any dtype."""
        if len(rows):
            wide = rows.double()
            mean = wide.mean(0)
            self.add(len(rows), mean, (wide - mean).square().sum())

    def merge(self, other: "Moments") -> None:
        """Take in all that `other` has seen."""
        if other.n:
            self.add(other.n, other.mean.to(self.mean.device), other.m2.to(self.m2.device))

    def add(self, n: int, mean: Float[Tensor, " width"], m2: Float[Tensor, ""]) -> None:
        """Take in n rows of this mean and total squared deviation."""
        total = self.n + n
        delta = mean - self.mean
        self.mean = self.mean + delta * (n / total)
        self.m2 = self.m2 + m2 + delta.square().sum() * (self.n * n / total)
        self.n = total


class Sums:
    """Named totals."""

    def __init__(self, *names: str, device: torch.device | str = "cpu") -> None:
        self.names = names
        self._totals: Float[Tensor, " names"] = torch.zeros(len(names), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, **values: Tensor) -> None:
        """Add the sum of each tensor, of any shape, to the total of its name; every name is given."""
        self._totals = self._totals + torch.stack([values[name].sum(dtype=torch.float64) for name in self.names])

    def merge(self, other: "Sums") -> None:
        """Add the totals of `other`."""
        self._totals = self._totals + other._totals.to(self._totals.device)

    def totals(self) -> dict[str, float]:
        """All totals, in one transfer from the device."""
        return dict(zip(self.names, self._totals.tolist(), strict=True))
