"""What a run logs: sums kept on the device over a window of tokens, divided once, when they are asked for.

Nothing here waits for the device but `take`. Losses are in training space, explained variance is of raw activations;
both cover all rows since the last `take`, whatever the batch size. Dead latents are those of the moment, and firing
frequencies are of a window of their own.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.evals.moments import Moments
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass


class TrainingMetrics:
    """Metrics of one SAE over the tokens since the last log row."""

    def __init__(self, sae: SAE, dead: DeadLatents, density_window: int) -> None:
        self._sae, self._dead = sae, dead
        self._density_window = density_window
        self._window_rows, self._window_counts = 0, sae.firing_count.clone()
        self._density = torch.zeros(sae.geometry.n_latents, dtype=torch.float64, device=sae.device)
        self._has_window = False
        self._reset()

    def _reset(self) -> None:
        device = self._sae.device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self._rows = 0
        self._steps = 0
        self._terms: dict[str, Tensor] = {}
        shape = self._sae.geometry.out_shape
        self._targets = [Moments(shape[-1], device=device) for _ in range(math.prod(shape[:-1]))]
        self._details: dict[str, Tensor] = {}
        self._squared_error = zero.repeat(len(self._targets))
        self._active = zero.clone()
        self._norm, self._clipped = zero.clone(), zero.clone()

    @torch.no_grad()
    def update(
        self,
        run: Pass,
        losses: Losses,
        target: Float[Tensor, "rows ..."],
        fired: Int[Tensor, " n_latents"],
        grad_norm: Float[Tensor, ""],
        clip: float | None,
    ) -> None:
        """Add one step; `target` holds the raw rows to reproduce, `fired` in how many of them each latent was on."""
        rows = len(target)
        for name, term in {"overall_loss": losses.total, **losses.terms}.items():
            _add(self._terms, name, term.double() * rows)
        for name, value in run.encoding.details.items():
            _add(self._details, name, value.double() * rows)
        self._rows += rows
        self._steps += 1
        error = self._sae.norm_target.undo(run.y_hat, run.scale, run.shift) - target
        for site, (moments, values) in enumerate(zip(self._targets, _by_site(target), strict=True)):
            moments.update(values)
            self._squared_error[site] += _by_site(error)[site].square().sum(dtype=torch.float64)
        self._active += fired.sum()
        self._norm += grad_norm
        if clip is not None:
            self._clipped += grad_norm > clip
        self._window_rows += rows
        if self._window_rows >= self._density_window:
            self._density = self._density_since_window_start()
            self._window_rows, self._window_counts = 0, self._sae.firing_count.clone()
            self._has_window = True

    def forget(self, latents: Int[Tensor, " latents"]) -> None:
        """The firing counts of these latents were set to 0."""
        self._window_counts[latents] = 0

    def density(self) -> Float[Tensor, " n_latents"]:
        """Share of rows in which each latent fired, over the last full window; before there is one, since the start."""
        return self._density if self._has_window else self._density_since_window_start()

    def _density_since_window_start(self) -> Float[Tensor, " d_sae"]:
        return (self._sae.firing_count - self._window_counts).double() / max(self._window_rows, 1)

    def take(self) -> dict[str, float | int]:
        """Values by name, of all steps since the last call."""
        sae, rows = self._sae, max(self._rows, 1)
        errors = [value.item() for value in self._squared_error]
        totals = [moments.m2.item() for moments in self._targets]
        fvu = _ratio(sum(errors), sum(totals))
        terms = {f"losses/{name}": value.item() / rows for name, value in self._terms.items()}
        dead = self._dead.mask().sum().item()
        density = self.density()
        since = sae.tokens_since_fired
        metrics: dict[str, float | int] = {
            "losses/overall_loss": terms.pop("losses/overall_loss", 0.0),
            **terms,
            "metrics/explained_variance": 1 - fvu,
            "metrics/fvu": fvu,
            "metrics/l0": self._active.item() / rows,
            "metrics/mean_log10_feature_sparsity": torch.log10(density + 1e-10).mean().item(),
            "sparsity/dead_features": int(dead),
            "sparsity/dead_fraction": dead / sae.geometry.n_latents,
            "sparsity/dead_features_1e5": int((since >= 100_000).sum()),
            "sparsity/dead_features_1e6": int((since >= 1_000_000).sum()),
            "sparsity/below_1e-5": int((density < 1e-5).sum()),
            "sparsity/above_1e-1": int((density > 1e-1).sum()),
            "optim/grad_norm": self._norm.item() / max(self._steps, 1),
            "optim/clipped_fraction": self._clipped.item() / max(self._steps, 1),
        }
        metrics |= {f"metrics/{name}": value.item() / rows for name, value in self._details.items()}
        metrics |= {name: value.item() for name, value in sae.training_state().items()}
        if len(totals) > 1:
            for site, (error, total) in enumerate(zip(errors, totals, strict=True)):
                metrics[f"metrics/explained_variance_site_{site}"] = 1 - _ratio(error, total)
        self._reset()
        return metrics


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


def _by_site(rows: Float[Tensor, "rows ..."]) -> list[Float[Tensor, "rows width"]]:
    return [rows] if rows.ndim == 2 else list(rows.unbind(1))


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else float("nan")
