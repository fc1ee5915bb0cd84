"""Learning rates and coefficients as functions of the tokens trained on; nothing here counts steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError


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
