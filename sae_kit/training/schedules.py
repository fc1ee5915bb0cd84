"""Learning rates, coefficients and annealed values as functions of the tokens trained on; nothing here counts steps."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
from torch import Tensor

from sae_kit.annealing import linear_warm_up
from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError

if TYPE_CHECKING:
    from sae_kit.data.batch import State
    from sae_kit.sae import SAE, Encoding
    from sae_kit.sae_config import SAEConfig


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Shape of the learning rate: warm-up, a main part, and a final linear decay."""

    name: Literal["wsd", "constant", "cosine", "linear", "exponential", "cosine_restarts"] = "wsd"
    """main part; wsd = constant with a decay at the end"""
    warm_up_tokens: Tokens = "1%"
    """linear growth from 0 over so many tokens"""
    decay_tokens: Tokens | None = None
    """linear decay over the last so many tokens; None = 20% for wsd, else 0"""
    end_ratio: float | None = None
    """factor at the end of a main part that falls, of cosine_restarts of each cycle; None = 0.1"""
    decay_end_ratio: float = 0.0
    """factor at the end of the decay"""
    cycles: int = 1
    """cosine_restarts: how often the main part falls"""

    def __post_init__(self) -> None:
        for name in ("end_ratio", "decay_end_ratio"):
            ratio = getattr(self, name)
            if ratio is not None and not 0 <= ratio <= 1:
                raise ConfigError(f"{name} must lie between 0 and 1, found {ratio}")
        if self.end_ratio is not None and self.name in ("wsd", "constant"):
            raise ConfigError(
                f"end_ratio has no meaning in the {self.name} schedule: leave it out, or choose cosine, linear or "
                "exponential"
            )
        if self.name == "exponential" and self.end_ratio == 0:
            raise ConfigError("an exponential never comes to 0: end_ratio must be positive, or choose linear")
        if self.cycles < 1:
            raise ConfigError(f"cycles must be at least 1, found {self.cycles}")
        if self.cycles > 1 and self.name != "cosine_restarts":
            raise ConfigError(f"cycles has no meaning in the {self.name} schedule: choose cosine_restarts")

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
        return LearningRate(self.name, total, warm_up, decay, end, self.decay_end_ratio, self.cycles)


@dataclass(frozen=True)
class LearningRate:
    """Factor on the learning rate; lengths in tokens, a length of 0 is a part that is already over."""

    name: str
    total: int
    warm_up: int
    decay: int
    end_ratio: float
    decay_end_ratio: float
    cycles: int = 1

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
        if self.name in ("cosine", "cosine_restarts"):
            part = u * self.cycles % 1.0 if u < 1 else 1.0  # the end is that of the last cycle, not another start
            return self.end_ratio + (1 - self.end_ratio) * (1 + math.cos(math.pi * part)) / 2
        if self.name == "linear":
            return 1 - (1 - self.end_ratio) * u
        if self.name == "exponential":
            return self.end_ratio**u
        return 1.0


class StepValues:
    """What varies over the run of one SAE: coefficients, k, p, and what keeps an annealed penalty continuous."""

    def __init__(self, cfg: SAEConfig, total: int, accumulate: int = 1) -> None:
        """For a run of `total` tokens, with `accumulate` passes in each step."""
        self._cfg, self._total = cfg, total
        self._annealing = cfg.penalty_annealing()
        self.p = cfg.values(0, total).get("p", 1.0)
        """p of the penalty now"""
        self.factor = 1.0
        """product of mean(P_p) / mean(P_p') over the changes of p so far"""
        self._last_k: float | None = None
        passes = 0 if self._annealing is None else self._annealing.window * accumulate
        self._measured: deque[Tensor] = deque(maxlen=passes)

    def at(self, tokens: int) -> dict[str, float]:
        """Values of the step that comes after `tokens`."""
        values = self._cfg.values(tokens, self._total)
        if self._annealing is not None:
            self._change_p(values["p"])
            values |= {name: values[name] * self.factor for name in self._cfg.coefficients()}
        return values

    def k_settles(self, tokens: int, rows: int) -> bool:
        """Whether k comes to its end with this step, of `rows` after `tokens`."""
        now, end = (self._cfg.values(t, self._total).get("k") for t in (tokens, self._total))
        before = self._last_k  # batches may differ in length; only a run that goes on has to infer the one before
        if before is None:
            before = self._cfg.values(tokens - rows, self._total).get("k")
        self._last_k = now
        return tokens > 0 and now == end != before

    @torch.no_grad()
    def observe(self, sae: SAE, encoding: Encoding) -> None:
        """Measure the penalty at p and at the next p, on the same codes."""
        annealing = self._annealing
        if annealing is not None and self.p > annealing.end:
            following = max(self.p - (annealing.start - annealing.end) / annealing.n_updates, annealing.end)
            penalty = cast("Penalised", sae).penalty
            self._measured.append(torch.stack([penalty(encoding, self.p), penalty(encoding, following)]))

    def _change_p(self, p: float) -> None:
        if p == self.p:
            return
        if self._measured:
            measured = torch.stack([pair.cpu() for pair in self._measured])
            before, after = measured[measured.isfinite().all(dim=1)].mean(dim=0).unbind()  # but for skipped steps
            if before > 0 and after > 0:
                self.factor *= float(before / after)
        self.p = p
        self._measured.clear()

    def state_dict(self) -> State:
        """Numbers and tensors from which `load_state_dict` goes on."""
        return {"p": self.p, "factor": self.factor, "last_k": self._last_k, "measured": list(self._measured)}

    def load_state_dict(self, state: State) -> None:
        """Go on from a `state_dict` of the same config."""
        self.p, self.factor, self._last_k = state["p"], state["factor"], state["last_k"]
        self._measured.clear()
        self._measured.extend(pair.clone() for pair in state["measured"])


class Penalised(Protocol):
    """An SAE whose penalty has a p."""

    def penalty(self, encoding: Encoding, p: float) -> Tensor: ...
