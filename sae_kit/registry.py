"""Architectures by name: the one list that the command line, the docs, the tests and the loader read."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sae_kit.errors import UnknownArchitectureError, did_you_mean

if TYPE_CHECKING:
    from sae_kit.sae import SAE
    from sae_kit.sae_config import SAEConfig

S = TypeVar("S", bound="type[SAE]")


class Architecture(NamedTuple):
    """A name with the class that computes and the config that describes it."""

    name: str
    sae: type[SAE]
    config: type[SAEConfig]


_REGISTRY: dict[str, Architecture] = {}


def register(name: str, config: type[SAEConfig]) -> Callable[[S], S]:
    """Class decorator that pairs an SAE class with its config under `name` (what `cfg.json` calls it)."""

    def decorate(sae: S) -> S:
        if name in _REGISTRY:
            raise ValueError(f"architecture {name!r} is already registered by {_REGISTRY[name].sae.__name__}")
        config.architecture = name
        sae.config_class = config
        _REGISTRY[name] = Architecture(name, sae, config)
        return sae

    return decorate


def list_architectures() -> Mapping[str, Architecture]:
    """All registered architectures by name, in the order of their names."""
    importlib.import_module("sae_kit.architectures")  # importing the folder registers its files
    return MappingProxyType(dict(sorted(_REGISTRY.items())))


def get_architecture(name: str) -> Architecture:
    """The architecture called `name`.

    Raises:
        UnknownArchitectureError: no such name; the message lists those that there are.
    """
    known = list_architectures()
    if not isinstance(name, str) or name not in known:
        raise UnknownArchitectureError(
            f"unknown architecture {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}"
        )
    return known[name]
