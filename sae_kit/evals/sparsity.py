"""How many latents are on, how strongly, and which never are.

| group / key | definition, over n tokens |
|---|---|
| sparsity / l0, l1 | #{a ≠ 0} / n; Σ\\|a\\| / n |
| misc_metrics / frac_alive, dead_latents | share of latents that fired at least once; count of those that did not |
| / dead_resolution | 3 / n, the 95% upper bound on how often a silent latent fires |
| features / feature_density | fires / n of each latent |
"""

import torch
from torch import Tensor

from sae_kit.evals.family import EvalStep, Family, Metrics, family, ratio
from sae_kit.evals.moments import Sums


@family("sparsity")
class Sparsity(Family[EvalStep]):
    """The table above; firings are counted in int64."""

    def __init__(self, d_out: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        super().__init__(d_out, d_sae, device)
        self.n = 0
        self.sums = Sums("l1", device=device)
        self.firing_counts = torch.zeros(d_sae, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, step: EvalStep) -> None:
        self.n += step.codes.n_rows
        self.sums.add(l1=step.codes.values.abs())
        self.firing_counts += step.codes.firing_counts()

    def merge(self, other: "Sparsity") -> None:
        self.n += other.n
        self.sums.merge(other.sums)
        self.firing_counts += other.firing_counts.to(self.device)

    def compute(self) -> Metrics:
        alive = int((self.firing_counts > 0).sum())
        return {
            "sparsity": {
                "l0": ratio(int(self.firing_counts.sum()), self.n),
                "l1": ratio(self.sums.totals()["l1"], self.n),
            },
            "misc_metrics": {
                "frac_alive": alive / self.d_sae if self.n else None,
                "dead_latents": float(self.d_sae - alive) if self.n else None,
                "dead_resolution": ratio(3, self.n),
            },
        }

    def features(self) -> dict[str, Tensor]:
        return {"feature_density": (self.firing_counts.double() / max(self.n, 1)).cpu()}
