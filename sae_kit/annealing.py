"""Schedules of coefficients, of k, and of p of an Lp penalty, as functions of the tokens trained on.

Any architecture that has such a number takes them.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError

RATE = 3.0


def linear_warm_up(tokens: int, length: int) -> float:
    """clip(tokens / length, 0, 1); a warm-up of length 0 is over before it begins."""
    return min(max(tokens / length, 0.0), 1.0) if length else 1.0


@dataclass(frozen=True, kw_only=True)
class KAnnealing:
    """Begin with many latents in each row, so that all of them learn something, and come down to k."""

    start: int | str
    """latents selected in each row at the beginning, or a multiple of the k at the end, as "10x"; common are d_in and \
10x"""
    cold_tokens: Tokens = 0
    """k stays at `start` for so many tokens"""
    tokens: Tokens = "10%"
    """and comes down over so many"""
    shape: Literal["linear", "exponential"] = "linear"
    """exponential: fast at first, slow at the end"""
    rate: float | None = None
    """exponential: how steeply, e^rate between the slopes at the two ends; None = 3"""

    def __post_init__(self) -> None:
        if isinstance(self.start, str) and not re.fullmatch(r"\d+(\.\d+)?x", self.start):
            raise ConfigError(
                f'k_annealing.start must be a number of latents, or a multiple of k as "10x", found {self.start!r}'
            )
        if not isinstance(self.start, str) and self.start < 1:
            raise ConfigError(f"k_annealing.start must be at least 1, found {self.start}")
        if self.rate is not None and self.shape != "exponential":
            raise ConfigError(f"k_annealing.rate has no meaning in the {self.shape} shape: choose exponential")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ConfigError(f"k_annealing.rate must be positive, found {self.rate}")
        for name in ("cold_tokens", "tokens"):
            resolve_tokens(getattr(self, name), 1, f"k_annealing.{name}")

    def k_start(self, end: float) -> float:
        """k at the beginning, a whole number, if it is `end` at the end."""
        if isinstance(self.start, str):
            return float(math.ceil(float(self.start.removesuffix("x")) * end))
        return float(self.start)

    def k(self, end: float, tokens: int, total: int) -> float:
        """k after `tokens` of a run of `total`: whole numbers, rounded up, until `end` is reached."""
        cold = resolve_tokens(self.cold_tokens, total, "k_annealing.cold_tokens")
        length = resolve_tokens(self.tokens, total, "k_annealing.tokens")
        start = self.k_start(end)
        if tokens < cold:
            return start
        done = linear_warm_up(tokens - cold, length)
        if done == 1.0:
            return float(end)
        if self.shape == "exponential":
            rate = RATE if self.rate is None else self.rate
            done = math.expm1(-rate * done) / math.expm1(-rate)
        return float(math.ceil(max(start + (end - start) * done, end)))


@dataclass(frozen=True, kw_only=True)
class PAnnealing:
    """Bring p of the penalty Σ|c|^p down from `start` to `end`, towards a count of latents (arXiv 2408.00113).

    p moves in equal steps. At each of them the coefficient is multiplied by mean(P_p) / mean(P_p'), both measured on
    the codes of the steps before, so that the penalty does not jump.
    """

    start: float = 1.0
    """p at the beginning"""
    end: float = 0.2
    """p at the end"""
    start_tokens: Tokens = "10%"
    """when p begins to move"""
    end_tokens: Tokens = "90%"
    """when it reaches its end"""
    n_updates: int = 10
    """steps of p"""
    window: int = 10
    """steps of the optimizer over which the two penalties are measured"""

    def __post_init__(self) -> None:
        if not 0 < self.end <= self.start:
            raise ConfigError(f"p_annealing needs 0 < end <= start, found {self.end} and {self.start}")
        if self.n_updates < 1 or self.window < 1:
            raise ConfigError("p_annealing.n_updates and p_annealing.window must be at least 1")
        for name in ("start_tokens", "end_tokens"):
            resolve_tokens(getattr(self, name), 1, f"p_annealing.{name}")

    def p(self, tokens: int, total: int) -> float:
        """p after `tokens` of a run of `total`.

        Raises:
            ConfigError: it ends before it begins.
        """
        begin = resolve_tokens(self.start_tokens, total, "p_annealing.start_tokens")
        end = resolve_tokens(self.end_tokens, total, "p_annealing.end_tokens")
        if end < begin:
            raise ConfigError(f"p_annealing: end_tokens ({end:,}) lies before start_tokens ({begin:,})")
        if tokens < begin:
            return self.start
        done = linear_warm_up(tokens - begin, end - begin)
        step = math.floor(done * self.n_updates + 1e-9)
        return self.start + (self.end - self.start) * step / self.n_updates
