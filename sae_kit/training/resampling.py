"""Resampling (Bricken et al. 2023): dead latents get the directions of rows that are reconstructed badly.

Rows are drawn from the batches of training with P ∝ (their error ‖ŷ − y‖²)², without replacement and in one pass: each
row gets the key log(u) / weight, u uniform, and the largest keys are the sample (Efraimidis & Spirakis 2006). So no row
is read twice, and only as many are kept as latents can be dead.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.data.batch import State
from sae_kit.errors import ConfigError
from sae_kit.geometry import SMALLEST_NORM
from sae_kit.ops import widen
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.training.losses import Pass

SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class ResampleConfig:
    """When dead latents are given new directions, and how."""

    interval_tokens: Tokens = 200_000_000
    """tokens from one time to the next"""
    times: int = 4
    """how often at most"""
    window_tokens: Tokens = 100_000_000
    """a latent silent for so many tokens is dead"""
    rows: int = 819_200
    """new directions come from the last so many rows before"""
    encoder_scale: float = 0.2
    """norm of a new encoder column, relative to the mean of the living"""
    reset_second_moment: Literal["zero", "alive_mean"] = "zero"
    """alive_mean: that of the living, without which the next 100 steps or so are several learning rates long"""

    def __post_init__(self) -> None:
        for name in ("interval_tokens", "window_tokens"):
            if resolve_tokens(getattr(self, name), 10**12, name) == 0:
                raise ConfigError(f"{name}: expected a positive number of tokens, found {getattr(self, name)!r}")
        for name in ("times", "rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.encoder_scale > 0:
            raise ConfigError(f"encoder_scale must be positive, found {self.encoder_scale}")


class Resampler:
    """Resampling of one SAE: `observe` after every pass, `apply` after every optimizer step.

    Random numbers depend on the seed of the SAE and on the tokens trained on alone, so `state_dict` holds all there is.
    """

    def __init__(self, sae: SAE, cfg: ResampleConfig, total: int) -> None:
        """For a run of `total` tokens.

        Raises:
            ConfigError: latents that compete with each other, which a new direction would not wake.
        """
        if not sae.norm_fold_is_exact:
            raise ConfigError(
                f"resample: latents of {sae.cfg.architecture} SAEs compete with each other, and a small new one would "
                "never be selected; AuxK keeps them alive (aux_coefficient). Leave resample out"
            )
        self.cfg = cfg
        self.interval = max(resolve_tokens(cfg.interval_tokens, total, "resample.interval_tokens"), 1)
        self.window = max(resolve_tokens(cfg.window_tokens, total, "resample.window_tokens"), 1)
        self.done = 0
        """times that latents were resampled, or could have been"""
        self.resampled = 0
        """latents so far"""
        self.keys: Float[Tensor, " kept"] | None = None
        """of the rows kept for the next time; None while none are collected"""
        self.x: Float[Tensor, "kept ..."] | None = None
        """what was read in them, in training space"""
        self.residual: Float[Tensor, "kept ..."] | None = None
        """y − ŷ of them, where another site is written"""
        self._sae, self._total = sae, total

    def _next(self, tokens: int, rows: int) -> int | None:
        """When latents are resampled next; with the last step of the run no more, for nothing would train them."""
        following = (tokens // self.interval + 1) * self.interval
        last = self._total // rows * rows - rows
        return following if self.done < self.cfg.times and following <= last else None

    @torch.no_grad()
    def observe(self, run: Pass, tokens: int) -> None:
        """Draw from the rows of a pass, `tokens` rows into the run."""
        rows = len(run.x)
        following = self._next(tokens, rows)
        if following is None or tokens + rows <= following - self.cfg.rows:
            return
        if self.keys is None:
            self._open(following - tokens, run)
        assert self.keys is not None
        assert self.x is not None
        number = min(len(self.keys), rows)
        if not number:
            return
        weight = (widen(run.y_hat) - widen(run.y)).flatten(1).square().sum(dim=1, dtype=torch.float64).square()
        draw = generator(self._sae.seed, "resample", index=tokens)
        # 1 − u lies in (0, 1], so its logarithm is finite; a row without error gets −∞, or NaN, and is never taken.
        chance = torch.log1p(-torch.rand(rows, generator=draw, dtype=torch.float64)).to(weight.device)
        keys = torch.where(weight > 0, chance / weight, -torch.inf)
        # The j-th best new row takes the place of the j-th worst kept one if it is better: no wait for the device.
        new, old = keys.topk(number), self.keys.topk(number, largest=False)
        better = new.values > old.values
        self._replace(self.keys, old.indices, better, new.values)
        self._replace(self.x, old.indices, better, run.x[new.indices])
        if self.residual is not None:
            self._replace(self.residual, old.indices, better, (run.y - run.y_hat)[new.indices])

    def _open(self, left: int, run: Pass) -> None:
        """A place for every latent that can be dead at the end of the step that comes to `left` tokens from here."""
        candidates = int((self._sae.tokens_since_fired + left >= self.window).sum())
        self.keys = torch.full((candidates,), -torch.inf, dtype=torch.float64, device=run.x.device)
        self.x = run.x.new_zeros(candidates, *run.x.shape[1:])
        same = self._sae.geometry.same_site
        self.residual = None if same else run.y.new_zeros(candidates, *run.y.shape[1:])

    @staticmethod
    def _replace(kept: Tensor, where: Int[Tensor, " number"], better: Bool[Tensor, " number"], new: Tensor) -> None:
        better = better.reshape(-1, *[1] * (new.ndim - 1))
        kept[where] = torch.where(better, new, kept[where])

    @torch.no_grad()
    def apply(self, optimizer: torch.optim.Optimizer, tokens: int, rows: int) -> Int[Tensor, " latents"] | None:
        """Resample if the time has come with the step of `rows` after `tokens`; returns the latents that are new."""
        following = self._next(tokens, rows)
        if following is None or tokens + rows < following:
            return None
        assert self.keys is not None
        self.done += 1
        dead = self._sae.tokens_since_fired >= self.window
        found = self.keys.sort(descending=True)
        chosen = found.indices[found.values > -torch.inf]
        latents = dead.nonzero().squeeze(1)[: len(chosen)]
        chosen = chosen[: len(latents)]
        if len(latents):
            self._give_directions(latents, dead, chosen)
            self._sae.reset_latents(latents)
            self._sae.tokens_since_fired[latents] = 0
            self._sae.firing_count[latents] = 0
            reset_moments(optimizer, self._sae, latents, ~dead, self.cfg.reset_second_moment)
        self.resampled += len(latents)
        self.keys = self.x = self.residual = None
        return latents

    def _give_directions(
        self, latents: Int[Tensor, " latents"], dead: Bool[Tensor, " n_latents"], chosen: Int[Tensor, " latents"]
    ) -> None:
        sae, geometry = self._sae, self._sae.geometry
        assert self.x is not None
        x = widen(self.x[chosen])
        if sae.cfg.apply_b_dec_to_input:
            x = x - widen(sae.b_dec)
        target = x if self.residual is None else widen(self.residual[chosen])
        norms, of_block = sae.decoder_norms(), latents // geometry.d_sae
        for layer, own in geometry.by_layer(latents):
            here, alive = of_block == layer, ~geometry.latents(dead, layer)
            read = torch.nn.functional.normalize(geometry.read(x[here], layer), dim=1, eps=SMALLEST_NORM)
            encoder = geometry.encoder(sae.W_enc, layer)
            length = _mean(torch.linalg.vector_norm(widen(encoder), dim=0), alive)
            encoder[:, own] = (read * (self.cfg.encoder_scale * length)).T.to(encoder.dtype)
            written = geometry.written(target[here], layer)
            norm = _mean(geometry.latents(norms, layer), alive)  # 1 where rows are kept at it
            factor = norm / geometry.block_norms(written).clamp(min=SMALLEST_NORM)
            decoder = geometry.decoder(sae.W_dec, layer)
            decoder[own] = (written * factor[:, None]).to(decoder.dtype)

    def state_dict(self) -> State:
        """Numbers and tensors from which `load_state_dict` goes on."""
        names = ("done", "resampled", "keys", "x", "residual")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: State) -> None:
        """Go on from a `state_dict` of the same SAE."""
        for name in ("done", "resampled"):
            setattr(self, name, int(state[name]))
        for name in ("keys", "x", "residual"):
            tensor = state[name]
            setattr(self, name, None if tensor is None else tensor.to(self._sae.device, copy=True))


@torch.no_grad()
def reset_moments(
    optimizer: torch.optim.Optimizer,
    sae: SAE,
    latents: Int[Tensor, " latents"],
    alive: Bool[Tensor, " n_latents"],
    second: Literal["zero", "alive_mean"] = "zero",
) -> None:
    """Forget what the optimizer knows of the parameters of these latents, and of nothing else.

    "alive_mean" gives them the mean second moment of the living instead of 0, entry by entry.
    """
    for layer, own in sae.geometry.by_layer(latents):
        living = sae.geometry.latents(alive, layer)
        for name, parameter in sae.named_parameters():
            for key, moment in optimizer.state.get(parameter, {}).items():
                if not isinstance(moment, Tensor) or moment.shape != parameter.shape:
                    continue  # the number of steps
                rows = latents_first(sae, name, moment, layer)
                if rows is not None:
                    mean = second == "alive_mean" and key in SECOND_MOMENTS and living.any()
                    rows[own] = rows[living].mean(dim=0) if mean else 0.0


def latents_first(sae: SAE, name: str, tensor: Tensor, layer: int) -> Tensor | None:
    """A view [d_sae, ...] of the latents of a block in a tensor shaped like this parameter; None if it has none."""
    several = sae.geometry.cross_layer
    if name == "W_enc":
        return (tensor[layer] if several else tensor).movedim(-1, 0)
    if name in ("W_dec", f"W_dec.{layer}"):
        return tensor
    if name != "b_dec" and tensor.shape == sae.latent_shape:
        return tensor[layer] if several else tensor
    return None


def _mean(values: Float[Tensor, " latents"], alive: Bool[Tensor, " latents"]) -> Float[Tensor, ""]:
    """Mean over the living; over all if none lives."""
    return values[alive].mean() if alive.any() else values.mean()
