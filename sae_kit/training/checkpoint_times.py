"""When checkpoints are due: in rows trained on, by the clock, or at the end; and what else a run says about them."""

import bisect
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sae_kit.config import Tokens, resolve_tokens
from sae_kit.errors import ConfigError
from sae_kit.training.callbacks.early_stop import better

RANGE = 1000
"""log spacing begins where so many times fewer rows than at the end would have one before it"""
UNCATCHABLE = ("SIGKILL", "SIGSTOP")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the whole state of training is saved, how much of it stays, and where a run goes on from."""

    every_tokens: Tokens | None = "10%"
    """rows between two checkpoints of linear spacing; None = only by minutes, milestones and signals"""
    every_minutes: float | None = 30.0
    """... and at the latest so many minutes after the last one; None = never by the clock"""
    spacing: Literal["linear", "log"] = "linear"
    """log = at train.tokens · 1000^(i/count − 1) rows, i = 1 ... count, instead of every_tokens"""
    count: int = 10
    """checkpoints of log spacing"""
    keep: int = 2
    """newest checkpoints that stay"""
    milestones: tuple[int, ...] = ()
    """rows at which a checkpoint is written that stays for good, without the shuffle buffer"""
    buffer: Literal["save", "drop"] = "save"
    """save = going on is exact; drop = smaller checkpoints, and going on fills the buffer with what comes next"""
    signals: tuple[str, ...] = ("SIGINT", "SIGTERM")
    """signals that save and stop"""
    resume: str = "auto"
    """auto = go on from the newest checkpoint if there is one, must = or fail, never = start anew, or a checkpoint"""
    final: bool = False
    """one at the very end too; without it a longer run goes on from the last one before"""
    best: str | None = None
    """logged metric whose best checkpoint stays, too, such as metrics/explained_variance; of several SAEs their mean"""

    def __post_init__(self) -> None:
        for name in ("count", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ConfigError(f"every_minutes must be greater than 0 or None, found {self.every_minutes}")
        if self.spacing == "linear" and self.count != 10:
            raise ConfigError("count has no meaning in linear spacing: set every_tokens, or choose spacing log")
        if self.spacing == "log" and self.every_tokens not in ("10%", None):
            raise ConfigError("every_tokens has no meaning in log spacing: set count, or choose spacing linear")
        if wrong := [tokens for tokens in self.milestones if tokens < 1]:
            raise ConfigError(f"milestones: expected numbers of rows of at least 1, found {wrong[0]}")
        if self.best is not None and better(self.best) is None:
            raise ConfigError(
                f"best: whether a lower or a higher {self.best} is better is not known; choose a loss or score"
            )
        for name in self.signals:
            if name not in signal.Signals.__members__ or name in UNCATCHABLE:
                raise ConfigError(
                    f"signals: expected names of signals that can be caught, like SIGTERM, found {name!r}"
                )

    def build(self, total: int, batch: int) -> "CheckpointTimes":
        """The times of a run of `total` rows in steps of `batch`.

        Raises:
            ConfigError: an interval of no rows, or a milestone beyond the end.
        """
        last = total // batch * batch
        every = None
        points = list(self.milestones)
        if beyond := [tokens for tokens in points if tokens > total]:
            raise ConfigError(f"checkpoint.milestones: {beyond[0]:,} is beyond the end, train.tokens = {total:,}")
        if self.spacing == "log":
            points += [round(total * RANGE ** (i / self.count - 1)) for i in range(1, self.count + 1)]
        elif self.every_tokens is not None:
            every = resolve_tokens(self.every_tokens, total, "checkpoint.every_tokens")
            if every < 1:
                raise ConfigError(f"checkpoint.every_tokens: {self.every_tokens!r} of {total:,} rows is less than one")
        return CheckpointTimes(
            every=every,
            points=tuple(sorted({min(max(point, 1), last) for point in points})),
            milestones=tuple(sorted({min(point, last) for point in self.milestones})),
            last=last,
            minutes=self.every_minutes,
            final=self.final,
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointTimes:
    """When checkpoints are due; in rows, so that a run that goes on has them where one in one go has them."""

    every: int | None
    points: tuple[int, ...]
    """rows beside the multiples of `every`, ascending"""
    milestones: tuple[int, ...]
    """those of them that stay for good"""
    last: int
    """rows at the end of the run"""
    minutes: float | None
    final: bool

    def due(self, before: int, tokens: int, minutes: float = 0.0) -> bool:
        """Whether a checkpoint follows the step from `before` to `tokens` rows, `minutes` after the last checkpoint."""
        if _crossed(self.points, before, tokens):
            return True
        if tokens >= self.last:
            return self.final
        by_rows = self.every is not None and tokens // self.every > before // self.every
        return by_rows or (self.minutes is not None and minutes >= self.minutes)

    def stays(self, before: int, tokens: int) -> bool:
        """Whether the checkpoint after this step is one that stays for good."""
        return _crossed(self.milestones, before, tokens)


def _crossed(points: Sequence[int], before: int, tokens: int) -> bool:
    return bisect.bisect_right(points, before) < bisect.bisect_right(points, tokens)
