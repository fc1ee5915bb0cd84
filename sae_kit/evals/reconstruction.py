"""How well activations are reproduced, and whether reconstructions are too short.

With e = y − ŷ and ȳ the mean of all n tokens:

| group / key | definition |
|---|---|
| reconstruction_quality / explained_variance, fvu | 1 − fvu; Σ‖e‖² / Σ‖y − ȳ‖² |
| / nmse | Σ‖e‖² / Σ‖y‖²: changes when a constant is added to y |
| / mse, mse_per_dim | Σ‖e‖² / n; the same / d_out |
| / cossim | mean cosine of y and ŷ; ŷ = 0 counts 0, y = 0 is left out |
| shrinkage / l2_norm_in, l2_norm_out | mean ‖y‖, mean ‖ŷ‖ |
| / l2_ratio | mean ‖ŷ‖ / ‖y‖ of the tokens that are not about zero |
| / relative_reconstruction_bias | Σ‖ŷ‖² / Σ⟨y, ŷ⟩; below 1 = shrinks (Rajamanoharan et al. 2024, 2404.16014, eq. 10) |
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.evals.family import EvalStep, Family, Metrics, family, ratio
from sae_kit.evals.moments import Moments, Sums

CONSTANT = 1e-12  # share of Σ‖y‖² under which the variance of y is rounding
ABOUT_ZERO = 1e-6  # share of the rms norm under which ‖ŷ‖ / ‖y‖ says nothing
EXPONENTS = 1_100  # those of float64 lie between −1,074 and 1,024


@family("reconstruction")
class Reconstruction(Family[EvalStep]):
    """The table above. Scalars of a token are computed in float32 or wider and summed in float64."""

    def __init__(self, d_out: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        super().__init__(d_out, d_sae, device)
        self.moments = Moments(d_out, device)
        self.sums = Sums(
            "error", "square_in", "square_out", "dot", "norm_in", "norm_out", "cos", "nonzero", device=device
        )
        self.ratios = RatiosByNorm(device)

    @torch.no_grad()
    def update(self, step: EvalStep) -> None:
        wide = torch.promote_types(torch.promote_types(step.y.dtype, step.y_hat.dtype), torch.float32)
        y, y_hat = step.y.to(wide), step.y_hat.to(wide)
        dot, square_in, square_out = (y * y_hat).sum(1), y.square().sum(1), y_hat.square().sum(1)
        norm_in, norm_out = square_in.sqrt(), square_out.sqrt()
        both = (norm_in > 0) & (norm_out > 0)
        self.moments.update(step.y)
        self.sums.add(
            error=(y - y_hat).square().sum(1),
            square_in=square_in,
            square_out=square_out,
            dot=dot,
            norm_in=norm_in,
            norm_out=norm_out,
            cos=torch.where(both, dot / torch.where(both, norm_in * norm_out, 1), 0),
            nonzero=norm_in > 0,
        )
        self.ratios.update(norm_in, norm_out)

    def merge(self, other: "Reconstruction") -> None:
        self.moments.merge(other.moments)
        self.sums.merge(other.sums)
        self.ratios.merge(other.ratios)

    def compute(self) -> Metrics:
        n, s = self.moments.n, self.sums.totals()
        fvu = ratio(s["error"], self.moments.m2.item(), CONSTANT * s["square_in"])
        mse = ratio(s["error"], n)
        return {
            "reconstruction_quality": {
                "explained_variance": None if fvu is None else 1 - fvu,
                "fvu": fvu,
                "nmse": ratio(s["error"], s["square_in"]),
                "mse": mse,
                "mse_per_dim": None if mse is None else mse / self.d_out,
                "cossim": ratio(s["cos"], s["nonzero"]),
            },
            "shrinkage": {
                "l2_norm_in": ratio(s["norm_in"], n),
                "l2_norm_out": ratio(s["norm_out"], n),
                "l2_ratio": self.ratios.mean(ABOUT_ZERO * math.sqrt(s["square_in"] / n)) if n else None,
                "relative_reconstruction_bias": ratio(s["square_out"], s["dot"]),
            },
        }


class RatiosByNorm:
    """Σ ‖ŷ‖/‖y‖ for every binary exponent of ‖y‖: which norms are about zero is only known after the last token."""

    def __init__(self, device: torch.device | str, sums: Tensor | None = None) -> None:
        self.sums: Tensor = torch.zeros(2, 2 * EXPONENTS, dtype=torch.float64, device=device) if sums is None else sums
        """Σ of the ratios, and their number, [2, exponents]"""

    def update(self, norm_in: Float[Tensor, " tokens"], norm_out: Float[Tensor, " tokens"]) -> None:
        some = norm_in > 0
        exponent: Int[Tensor, " tokens"] = torch.frexp(norm_in).exponent.clamp(-EXPONENTS, EXPONENTS - 1)
        ratios = torch.where(some, norm_out / torch.where(some, norm_in, 1), 0)
        self.sums.index_add_(1, exponent + EXPONENTS, torch.stack([ratios.double(), some.double()]))

    def merge(self, other: "RatiosByNorm") -> None:
        self.sums += other.sums.to(self.sums.device)

    def mean(self, least: float) -> float | None:
        """The mean over norms above `least`, rounded down to a power of two."""
        total, number = self.sums[:, max(0, math.frexp(least)[1] + EXPONENTS) :].sum(1).tolist()
        return ratio(total, number)
