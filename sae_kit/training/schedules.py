"""Learning rates, coefficients and annealed values as functions of the tokens trained on; nothing here counts steps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError

if TYPE_CHECKING:
    from sae_kit.annealing import KAnnealing, PAnnealing
    from sae_kit.sae import SAE, Encoding
    from sae_kit.sae_config import SAEConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate: warm-up, a main part, and a final linear decay."""

    name: Literal["wsd", "constant", "cosine", "linear"] = "wsd"
    """main part; wsd = constant with a decay at the end"""
    warm_up_tokens: Tokens = "1%"
    """linear growth from 0 over so many tokens"""
    decay_tokens: Tokens | None = None
    """linear decay over the last so many tokens; None = 20% for wsd, else 0"""
    end_ratio: float | None = None
    """factor at the end of a cosine or linear main part; None = 0.1"""
    decay_end_ratio: float = 0.0
    """factor at the end of the decay"""

    def __post_init__(self) -> None:
        for name in ("end_ratio", "decay_end_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, found {ratio}")
        if self.end_ratio is not None and self.name in ("wsd", "constant"):
            raise ConfigError(
                f"end_ratio has no meaning in the {self.name} schedule: leave it out or choose cosine or linear"
            )

    def build(self, total: int) -> LearningRate:
        """The schedule of a run of `total` tokens.

        Raises:
            ConfigError: warm-up and decay together are longer than the run.
        """
        warm_up = resolve_tokens(self.warm_up_tokens, total, "schedule.warm_up_tokens")
        wanted = self.decay_tokens if self.decay_tokens is not None else "20%" if self.name == "wsd" else 0
        decay = resolve_tokens(wanted, total, "schedule.decay_tokens")
        if warm_up + decay > total:
            raise ConfigError(
                f"schedule: warm-up ({warm_up:,} tokens) and decay ({decay:,}) do not fit into train.tokens = {total:,}"
            )
        if self.decay_end_ratio and not decay:
            raise ConfigError("decay_end_ratio has no meaning without a decay: set decay_tokens or leave it out")
        end = self.end_ratio if self.end_ratio is not None else 0.1
        return LearningRate(self.name, total, warm_up, decay, end, self.decay_end_ratio)


@dataclass(frozen=True)
class LearningRate:
    """Factor on the learning rate; lengths in tokens, a length of 0 is a part that is already over."""

    name: str
    total: int
    warm_up: int
    decay: int
    end_ratio: float
    decay_end_ratio: float

    def factor(self, tokens: int, batch: int) -> float:
        """Factor of the step that trains on the `batch` rows after the first `tokens`."""
        main = self.total - self.warm_up - self.decay
        u = min(max((tokens - self.warm_up) / main, 0.0), 1.0) if main else 0.0
        left = self.total - tokens
        if left < self.decay:
            last = self._main(1.0 if main else 0.0)  # without a main part the decay starts from the full rate
            factor = self.decay_end_ratio + (last - self.decay_end_ratio) * left / self.decay
        else:
            factor = self._main(u)
        return linear_warm_up(tokens + batch, self.warm_up) * factor

    def _main(self, u: float) -> float:
        if self.name == "cosine":
            return self.end_ratio + (1 - self.end_ratio) * (1 + math.cos(math.pi * u)) / 2
        if self.name == "linear":
            return 1 - (1 - self.end_ratio) * u
        return 1.0


def linear_warm_up(tokens: int, length: int) -> float:
    """clip(tokens / length, 0, 1); a warm-up of length 0 is over before it begins."""
    return min(tokens / length, 1.0) if length else 1.0


class StepValues:
    """What varies over the run of one SAE: coefficients, k, p, and what keeps an annealed penalty continuous."""

    def __init__(self, cfg: SAEConfig, total: int) -> None:
        self._total = total
        self._coefficients = {
            name: (c.value, resolve_tokens(c.warm_up, total, f"{name.removesuffix('_coefficient')}_warm_up_tokens"))
            for name, c in cfg.coefficients().items()
        }
        self._k: tuple[KAnnealing, float] | None = None
        if (annealing := getattr(cfg, "k_annealing", None)) is not None:
            self._k = (annealing, float(cfg.k))  # pyright: ignore[reportAttributeAccessIssue]
        self._window: dict[str, float] = {}
        if (window := getattr(cfg, "threshold_window_tokens", None)) is not None:
            tokens = resolve_tokens(window, total, "threshold_window_tokens")
            self._window = {"threshold_window_tokens": float(max(tokens, 1))}
        self._p: PAnnealing | None = getattr(cfg, "p_annealing", None)
        self.p = self._p.p(0, total) if self._p is not None else 1.0
        """p of the penalty now"""
        self.factor = 1.0
        """product of mean(P_p) / mean(P_p') over the changes of p so far"""
        self._measured: deque[Tensor] = deque(maxlen=self._p.window if self._p is not None else 0)

    def at(self, tokens: int) -> dict[str, float]:
        """Values of the step that comes after `tokens`."""
        values = {
            name: value * linear_warm_up(tokens, length) for name, (value, length) in self._coefficients.items()
        } | self._window
        if self._k is not None:
            annealing, end = self._k
            values["k"] = annealing.k(end, tokens, self._total)
        if self._p is not None:
            self._change_p(self._p.p(tokens, self._total))
            values = {name: v * self.factor if name in self._coefficients else v for name, v in values.items()}
            values["p"] = self.p
        return values

    def k_settles(self, tokens: int, rows: int) -> bool:
        """Whether k comes to its end with this step, of `rows` after `tokens`."""
        if self._k is None or tokens == 0:
            return False
        annealing, end = self._k
        before, now = (annealing.k(end, t, self._total) for t in (max(tokens - rows, 0), tokens))
        return now == end != before

    @torch.no_grad()
    def observe(self, sae: SAE, encoding: Encoding) -> None:
        """Measure the penalty at p and at the next p, on the same codes."""
        if self._p is not None and self.p > self._p.end:
            following = self.p - (self._p.start - self._p.end) / self._p.n_updates
            penalty = cast("Penalised", sae).penalty
            self._measured.append(torch.stack([penalty(encoding, self.p), penalty(encoding, following)]))

    def _change_p(self, p: float) -> None:
        if p == self.p:
            return
        if self._measured:
            before, after = torch.stack(list(self._measured)).mean(dim=0).tolist()
            if before > 0 and after > 0:
                self.factor *= before / after
        self.p = p
        self._measured.clear()


class Penalised(Protocol):
    """An SAE whose penalty has a p."""

    def penalty(self, encoding: Encoding, p: float) -> Tensor: ...
