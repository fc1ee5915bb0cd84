"""Schedules of coefficients, of k, and of p of an Lp penalty, as functions of the tokens trained on.

Any architecture that has such a number takes them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError

EXPONENT = 3.0


def linear_warm_up(tokens: int, length: int) -> float:
    """clip(tokens / length, 0, 1); a warm-up of length 0 is over before it begins."""
    return min(max(tokens / length, 0.0), 1.0) if length else 1.0


@dataclass(frozen=True, kw_only=True)
class KAnnealing:
    """Begin with many latents in each row, so that all of them learn something, and come down to k."""

    start: int
    """latents selected in each row at the beginning; common are d_in and 10 · d_in"""
    cold_tokens: Tokens = 0
    """k stays at `start` for so many tokens"""
    tokens: Tokens = "10%"
    """and comes down over so many"""
    shape: Literal["linear", "exponential"] = "linear"
    """exponential: fast at first, slow at the end"""

    def __post_init__(self) -> None:
        if self.start < 1:
            raise ConfigError(f"k_annealing.start must be at least 1, found {self.start}")
        for name in ("cold_tokens", "tokens"):
            resolve_tokens(getattr(self, name), 1, f"k_annealing.{name}")

    def k(self, end: float, tokens: int, total: int) -> float:
        """k after `tokens` of a run of `total`: whole numbers, rounded up, until `end` is reached."""
        cold = resolve_tokens(self.cold_tokens, total, "k_annealing.cold_tokens")
        length = resolve_tokens(self.tokens, total, "k_annealing.tokens")
        if tokens < cold:
            return float(self.start)
        done = linear_warm_up(tokens - cold, length)
        if done == 1.0:
            return float(end)
        if self.shape == "exponential":
            done = (1 - math.exp(-EXPONENT * done)) / (1 - math.exp(-EXPONENT))
        return float(math.ceil(max(self.start + (end - self.start) * done, end)))


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
