"""What a run logs: sums kept on the device over a window of tokens, divided once, when they are asked for.

Nothing here waits for the device but `take`. Losses are in training space, explained variance is of raw activations;
both cover all rows since the last `take`, whatever the batch size. Dead latents are those of the moment, and firing
frequencies are of a window of their own.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.evals.moments import Moments
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass

STATE = ("rows", "mean", "m2", "squared_error", "window_rows", "window_counts", "density", "has_window")
"""What is kept beside the sums."""


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
        device, shape = self._sae.device, self._sae.geometry.out_shape
        self._sums: dict[str, Tensor] = {}
        sites = math.prod(shape[:-1])
        self._rows = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(sites, shape[-1], dtype=torch.float64, device=device)
        self._m2 = torch.zeros(sites, dtype=torch.float64, device=device)
        self._squared_error = torch.zeros_like(self._m2)
        self._open_step()

    def _open_step(self) -> None:
        """What a step adds waits until it is known whether the step counts."""
        self._step_rows = 0
        self._step_sums: dict[str, Tensor] = {}
        self._step_squared_error = torch.zeros_like(self._m2)
        self._step_targets = [Moments(self._mean.shape[1], device=self._mean.device) for _ in self._mean]

    @torch.no_grad()
    def update(
        self, run: Pass, losses: Losses, target: Float[Tensor, "rows ..."], fired: Int[Tensor, " n_latents"]
    ) -> None:
        """Add a pass; `target` holds the raw rows to reproduce, `fired` in how many of them each latent was on."""
        rows, sums = len(target), self._step_sums
        self._step_rows += rows
        for name, term in {"overall_loss": losses.total, **losses.terms}.items():
            _add(sums, f"losses/{name}", term.double() * rows)
        for name, value in run.encoding.details.items():
            _add(sums, f"metrics/{name}", value.double() * rows)
        error = self._sae.norm_target.undo(run.y_hat, run.scale, run.shift) - target
        for moments, values in zip(self._step_targets, _by_site(target), strict=True):
            moments.update(values)
        self._step_squared_error += torch.stack([each.square().sum(dtype=torch.float64) for each in _by_site(error)])
        _add(sums, "active", fired.sum().double())

    @torch.no_grad()
    def settle(self, grad_norm: Float[Tensor, ""], clip: float | None, bad: Bool[Tensor, ""]) -> None:
        """The step is over; where it was skipped, nothing of it is counted."""
        sums, rows = self._step_sums, self._step_rows
        _add(sums, "grad_norm", grad_norm.double())
        _add(sums, "clipped", (grad_norm > (math.inf if clip is None else clip)).double())
        _add(sums, "steps", torch.ones_like(self._rows))
        for name, value in sums.items():
            _add(self._sums, name, torch.where(bad, 0.0, value))
        mean = torch.stack([moments.mean for moments in self._step_targets])
        m2 = torch.stack([moments.m2 for moments in self._step_targets])
        total, delta = self._rows + rows, mean - self._mean  # as `Moments` merges, with a count on the device
        self._m2 = torch.where(bad, self._m2, self._m2 + m2 + delta.square().sum(1) * (self._rows * rows / total))
        self._squared_error += torch.where(bad, 0.0, self._step_squared_error)
        self._mean = torch.where(bad, self._mean, self._mean + delta * (rows / total))
        self._rows = torch.where(bad, self._rows, total)
        self._window_rows += rows
        if self._window_rows >= self._density_window:
            self._density = self._density_since_window_start()
            self._window_rows, self._window_counts = 0, self._sae.firing_count.clone()
            self._has_window = True
        self._open_step()

    def forget(self, latents: Int[Tensor, " latents"]) -> None:
        """The firing counts of these latents were set to 0."""
        self._window_counts[latents] = 0

    def density(self) -> Float[Tensor, " n_latents"]:
        """Share of rows in which each latent fired, over the last full window; before there is one, since the start."""
        return self._density if self._has_window else self._density_since_window_start()

    def _density_since_window_start(self) -> Float[Tensor, " d_sae"]:
        return (self._sae.firing_count - self._window_counts).double() / max(self._window_rows, 1)

    def take(self) -> dict[str, float | int]:
        """Values by name, of all steps since the last call; NaN if none of them counted."""
        sae, sums = self._sae, {name: value.item() for name, value in self._sums.items()}
        rows, steps = self._rows.item() or math.nan, sums.get("steps") or math.nan
        totals = [value.item() for value in self._m2]
        errors = [value.item() for value in self._squared_error]
        fvu = _ratio(sum(errors), sum(totals))
        means = {name: value / rows for name, value in sums.items() if "/" in name}
        dead = self._dead.mask().sum().item()
        density = self.density()
        since = sae.tokens_since_fired
        metrics: dict[str, float | int] = {
            "losses/overall_loss": math.nan,
            **means,
            "metrics/explained_variance": 1 - fvu,
            "metrics/fvu": fvu,
            "metrics/l0": sums.get("active", math.nan) / rows,
            "metrics/mean_log10_feature_sparsity": torch.log10(density + 1e-10).mean().item(),
            "sparsity/dead_features": int(dead),
            "sparsity/dead_fraction": dead / sae.geometry.n_latents,
            "sparsity/dead_features_1e5": int((since >= 100_000).sum()),
            "sparsity/dead_features_1e6": int((since >= 1_000_000).sum()),
            "sparsity/below_1e-5": int((density < 1e-5).sum()),
            "sparsity/above_1e-1": int((density > 1e-1).sum()),
            "optim/grad_norm": sums.get("grad_norm", math.nan) / steps,
            "optim/clipped_fraction": sums.get("clipped", math.nan) / steps,
        }
        metrics |= {name: value.item() for name, value in sae.training_state().items()}
        if len(totals) > 1:
            for site, (error, total) in enumerate(zip(errors, totals, strict=True)):
                metrics[f"metrics/explained_variance_site_{site}"] = 1 - _ratio(error, total)
        self._reset()
        return metrics

    def state_dict(self) -> State:
        """Where the windows stand, between two steps."""
        return {name: getattr(self, f"_{name}") for name in STATE} | {"sums": dict(self._sums)}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        device = self._sae.device
        for name in STATE:
            value = state[name]
            setattr(self, f"_{name}", value.to(device, copy=True) if isinstance(value, Tensor) else value)
        self._sums = {name: value.to(device, copy=True) for name, value in state["sums"].items()}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.detach()
    sums[name] = sums[name] + value if name in sums else value


def _by_site(rows: Float[Tensor, "rows ..."]) -> list[Float[Tensor, "rows width"]]:
    return [rows] if rows.ndim == 2 else list(rows.unbind(1))


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else float("nan")
