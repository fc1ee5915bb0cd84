"""What a family of metrics is: a few accumulators that take steps, merge, and are divided once at the end."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.errors import ConfigError, did_you_mean
from sae_kit.ops import SparseCodes

Metrics = dict[str, dict[str, float | None]]
"""Group -> key -> value; None where the value is undefined."""

Step = TypeVar("Step")
F = TypeVar("F", bound="type[Family[Any]]")


@dataclass(frozen=True)
class EvalStep:
    """Some eligible tokens of one SAE."""

    y: Float[Tensor, "tokens d_out"]
    """what was to be reproduced, in raw units"""
    y_hat: Float[Tensor, "tokens d_out"]
    codes: SparseCodes


class Family(ABC, Generic[Step]):
    """Metrics of one SAE that share accumulators; `update` makes no host sync."""

    reads: ClassVar[Literal["activations", "logits"]] = "activations"
    """whether steps are `EvalStep`s or, from whole forwards, `FidelityStep`s"""

    def __init__(self, d_out: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        self.d_out, self.d_sae, self.device = d_out, d_sae, torch.device(device)

    @abstractmethod
    def update(self, step: Step) -> None:
        """Take in one step."""

    @abstractmethod
    def merge(self, other: Any) -> None:
        """Take in all that `other`, of the same family, has seen."""

    @abstractmethod
    def compute(self) -> Metrics:
        """The values so far."""

    def features(self) -> dict[str, Tensor]:
        """Values per latent, each [d_sae]."""
        return {}


FAMILIES: dict[str, type[Family[Any]]] = {}
"""Families by the name under which `evaluate` knows them."""


def family(name: str) -> Callable[[F], F]:
    """Class decorator that registers a family under `name`."""

    def decorate(cls: F) -> F:
        if name in FAMILIES:
            raise ValueError(f"metric family {name!r} is already registered by {FAMILIES[name].__name__}")
        FAMILIES[name] = cls
        return cls

    return decorate


def check_families(names: Iterable[str]) -> None:
    """Refuse a name that no family has (ConfigError)."""
    for name in names:
        if name not in FAMILIES:
            raise ConfigError(
                f"metrics: expected some of {', '.join(FAMILIES)}, found {name!r}.{did_you_mean(name, FAMILIES)}"
            )


def ratio(numerator: float | int, denominator: float | int, least: float = 0.0) -> float | None:
    """The quotient, or None if the denominator is not above `least` or the quotient is not finite."""
    if not denominator > least:
        return None
    quotient = numerator / denominator
    return quotient if math.isfinite(quotient) else None
