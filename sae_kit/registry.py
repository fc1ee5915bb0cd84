"""Architectures by name: the one list that the command line, the docs, the tests and the loader read."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from sae_kit.errors import ConfigError, UnknownArchitectureError, did_you_mean

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
            raise ConfigError(
                f"architecture {name!r} is already registered by {_REGISTRY[name].sae.__name__}: choose another name, "
                "or start the interpreter anew to define it again"
            )
        if "architecture" in vars(config):
            raise ConfigError(
                f"{config.__name__} is the config of {config.architecture!r}: give {sae.__name__} a subclass of its own"
            )
        config.architecture = name
        sae.config_class = config
        _REGISTRY[name] = Architecture(name, sae, config)
        return sae

    return decorate


def list_architectures() -> Mapping[str, Architecture]:
    """All registered architectures by name, in the order of their names.

    Installed packages add theirs by an entry point of the group `sae_kit.architectures` that names the module.
    """
    importlib.import_module("sae_kit.architectures")  # importing the folder registers its files
    _import_installed()
    return MappingProxyType(dict(sorted(_REGISTRY.items())))


@functools.cache
def _import_installed() -> None:
    for entry in metadata.entry_points(group="sae_kit.architectures"):
        try:
            entry.load()
        except Exception as error:  # a broken package must not take the others down
            warnings.warn(f"{entry.value}, which should add an architecture, cannot be imported: {error}", stacklevel=2)


def import_architectures(source: str) -> None:
    """Import a Python file, or a module by its dotted name, that registers architectures.

    Raises:
        ConfigError: there is no such file or module. What the file itself raises is not caught.
    """
    path = Path(source)
    if path.suffix != ".py":
        if not _has_module(source):
            raise ConfigError(f"--import: there is no module {source!r}; a file needs its ending .py")
        importlib.import_module(source)
        return
    if not path.is_file():
        raise ConfigError(f"--import: there is no file {source}")
    if path.stem in sys.modules:
        raise ConfigError(f"--import: a module is called {path.stem!r} already: give {path.name} another name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _has_module(name: str) -> bool:
    if not all(part.isidentifier() for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:  # of a package above it, or of something that such a package needs
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        return False


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
