"""What a run logs: sums kept on the device over a window of tokens, divided once, when they are asked for.

Nothing here waits for the device but `take`. Losses are in training space; what compares activations (explained
variance and its kin, as `sae_kit.evals` defines them) is of raw ones. Both cover all rows since the last `take`,
whatever the batch size. Dead latents and norms of weights are those of the moment, and firing frequencies are of a
window of their own.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import Batch, State
from sae_kit.evals.moments import Moments
from sae_kit.evals.reconstruction import ABOUT_ZERO, RatiosByNorm
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass

STATE = ("rows", "mean", "m2", "squared_error", "ratios", "window_rows", "window_counts", "density", "has_window")
"""What is kept beside the sums."""
COMPARED = ("square", "cosine", "nonzero")
"""Sums over rows: ‖y‖², the cosine of y and ŷ, and whether y is not 0."""
QUANTILES = {"p05": 0.05, "median": 0.5, "p95": 0.95}
"""Of the norms of weights over all latents."""


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
        self._sums = NamedSums(device)
        sites = math.prod(shape[:-1])
        self._rows = torch.zeros((), dtype=torch.float64, device=device)
        self._mean = torch.zeros(sites, shape[-1], dtype=torch.float64, device=device)
        self._m2 = torch.zeros(sites, dtype=torch.float64, device=device)
        self._squared_error = torch.zeros_like(self._m2)
        self._ratios = RatiosByNorm(device).sums
        self._open_step()

    def _open_step(self) -> None:
        """What a step adds waits until it is known whether the step counts."""
        self._step_rows = 0
        self._step_sums = NamedSums(self._mean.device)
        self._step_squared_error = torch.zeros_like(self._m2)
        self._step_ratios = RatiosByNorm(self._mean.device)
        self._step_targets = [Moments(self._mean.shape[1], device=self._mean.device) for _ in self._mean]

    @torch.no_grad()
    def update(self, run: Pass, losses: Losses, batch: Batch, fired: Int[Tensor, " n_latents"]) -> None:
        """Add a pass over raw rows; `fired` says in how many of them each latent was on."""
        rows = len(batch.y)
        self._step_rows += rows
        values = {f"losses/{name}": term for name, term in {"overall_loss": losses.total, **losses.terms}.items()}
        values |= {f"metrics/{name}": value for name, value in run.encoding.details.items()}
        values["metrics/l0"] = fired.sum().double() / rows
        means = rows * torch.stack([value.detach().double() for value in values.values()])
        y, y_hat = widen(batch.y), widen(self._sae.norm_target.undo(run.y_hat, run.scale, run.shift))
        error = y_hat - y
        for moments, mean, m2 in zip(self._step_targets, *batch.moments, strict=True):
            moments.add(rows, mean, m2)
        self._step_squared_error += torch.stack([each.square().sum(dtype=torch.float64) for each in _by_site(error)])
        compared = self._compare(y.flatten(1), y_hat.flatten(1))
        self._step_sums.add([*values, *COMPARED], torch.cat([means, compared]))

    def _compare(self, y: Float[Tensor, "rows width"], y_hat: Float[Tensor, "rows width"]) -> Float[Tensor, " sums"]:
        """Sums of what is found for each row: what COMPARED names. Sites of a row are taken together."""
        square = y.square().sum(1)
        norm, norm_hat = square.sqrt(), y_hat.square().sum(1).sqrt()
        both = (norm > 0) & (norm_hat > 0)
        cosine = torch.where(both, (y * y_hat).sum(1) / torch.where(both, norm * norm_hat, 1), 0)
        self._step_ratios.update(norm, norm_hat)
        return torch.stack([square, cosine, (norm > 0).to(square.dtype)], dim=1).sum(dim=0, dtype=torch.float64)

    @torch.no_grad()
    def settle(self, grad_norm: Float[Tensor, ""], clip: float | None, bad: Bool[Tensor, ""]) -> None:
        """The step is over; where it was skipped, nothing of it is counted."""
        sums, rows = self._step_sums, self._step_rows
        clipped = grad_norm > (math.inf if clip is None else clip)
        of_step = torch.stack([grad_norm.double(), clipped.double(), torch.ones_like(self._rows)])
        totals = torch.where(bad, 0.0, torch.cat([sums.totals, of_step]))
        self._sums.add([*sums.names, "grad_norm", "clipped", "steps"], totals)
        mean = torch.stack([moments.mean for moments in self._step_targets])
        m2 = torch.stack([moments.m2 for moments in self._step_targets])
        total, delta = self._rows + rows, mean - self._mean  # as `Moments` merges, with a count on the device
        self._m2 = torch.where(bad, self._m2, self._m2 + m2 + delta.square().sum(1) * (self._rows * rows / total))
        self._squared_error += torch.where(bad, 0.0, self._step_squared_error)
        self._ratios = self._ratios + torch.where(bad, 0.0, self._step_ratios.sums)
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
        sae, sums = self._sae, self._sums.read()
        rows, steps = self._rows.item() or math.nan, sums.get("steps") or math.nan
        totals = [value.item() for value in self._m2]
        errors = [value.item() for value in self._squared_error]
        fvu, square = _ratio(sum(errors), sum(totals)), sums.get("square", math.nan)
        means = {name: value / rows for name, value in sums.items() if "/" in name}
        dead = self._dead.mask().sum().item()
        density = self.density()
        since, least = sae.tokens_since_fired, ABOUT_ZERO * math.sqrt(square / rows)
        ratio = RatiosByNorm(sae.device, self._ratios).mean(least)
        metrics: dict[str, float | int] = {
            "losses/overall_loss": math.nan,
            "metrics/l0": math.nan,
            **means,
            "metrics/explained_variance": 1 - fvu,
            "metrics/fvu": fvu,
            "metrics/nmse": _ratio(sum(errors), square),
            "metrics/cosine_similarity": _ratio(sums.get("cosine", math.nan), sums.get("nonzero", math.nan)),
            "metrics/l2_ratio": math.nan if ratio is None else ratio,
            "metrics/mean_log10_feature_sparsity": torch.log10(density + 1e-10).mean().item(),
            "sparsity/dead_features": int(dead),
            "sparsity/dead_fraction": dead / sae.geometry.n_latents,
            "sparsity/dead_features_1e5": int((since >= 100_000).sum()),
            "sparsity/dead_features_1e6": int((since >= 1_000_000).sum()),
            "sparsity/below_1e-5": int((density < 1e-5).sum()),
            "sparsity/below_1e-6": int((density < 1e-6).sum()),
            "sparsity/above_1e-2": int((density > 1e-2).sum()),
            "sparsity/above_1e-1": int((density > 1e-1).sum()),
            "optim/grad_norm": sums.get("grad_norm", math.nan) / steps,
            "optim/clipped_fraction": sums.get("clipped", math.nan) / steps,
        }
        metrics |= {name: value.item() for name, value in (sae.training_state() | norms_of_weights(sae)).items()}
        if len(totals) > 1:
            for site, (error, total) in enumerate(zip(errors, totals, strict=True)):
                metrics[f"metrics/explained_variance_site_{site}"] = 1 - _ratio(error, total)
        self._reset()
        return metrics

    def state_dict(self) -> State:
        """Where the windows stand, between two steps."""
        sums = {"names": list(self._sums.names), "totals": self._sums.totals}
        return {name: getattr(self, f"_{name}") for name in STATE} | {"sums": sums}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        device = self._sae.device
        for name in STATE:
            value = state[name]
            setattr(self, f"_{name}", value.to(device, copy=True) if isinstance(value, Tensor) else value)
        self._sums = NamedSums(device)
        self._sums.add(list(state["sums"]["names"]), state["sums"]["totals"].to(device))


@torch.no_grad()
def norms_of_weights(sae: SAE) -> dict[str, Float[Tensor, ""]]:
    """Quantiles over all latents of the norms of what they read by and of what they write, and the norm of b_dec."""
    found: dict[str, Tensor] = {"weights/b_dec_norm": widen(sae.b_dec).square().sum().sqrt()}
    encoder = widen(sae.geometry.encoder_rows(sae.W_enc)).square().sum(1).sqrt()
    for name, norms in (("W_enc", encoder), ("W_dec", sae.decoder_norms())):
        shares = torch.tensor(list(QUANTILES.values()), dtype=norms.dtype, device=norms.device)
        values = torch.quantile(norms, shares).unbind()
        found |= {f"weights/{name}_norms_{quantile}": v for quantile, v in zip(QUANTILES, values, strict=True)}
    return found


class NamedSums:
    """Totals by name in one tensor, so that a step adds to all of them at once; names may come later than others."""

    def __init__(self, device: torch.device) -> None:
        self.names: list[str] = []
        self.totals: Float[Tensor, " names"] = torch.zeros(0, dtype=torch.float64, device=device)

    def add(self, names: list[str], values: Float[Tensor, " given"]) -> None:
        """Add one value to each of these totals."""
        if names != self.names:
            new = [name for name in names if name not in self.names]
            self.totals = torch.cat([self.totals, self.totals.new_zeros(len(new))])
            self.names = self.names + new
            given = dict(zip(names, values.unbind(), strict=True))
            values = torch.stack([given.get(name, values.new_zeros(())) for name in self.names])
        self.totals = self.totals + values

    def read(self) -> dict[str, float]:
        """All totals, in one transfer from the device."""
        return {name: value.item() for name, value in zip(self.names, self.totals.cpu(), strict=True)}


def _by_site(rows: Float[Tensor, "rows ..."]) -> list[Float[Tensor, "rows width"]]:
    return [rows] if rows.ndim == 2 else list(rows.unbind(1))


def _ratio(part: float, total: float) -> float:
    return part / total if total > 0 else float("nan")
