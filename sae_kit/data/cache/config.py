"""The section of a run's configuration about caches of activations."""

from dataclasses import dataclass
from typing import Literal

from sae_kit.data.cache.quantize import StoredDtype
from sae_kit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Where a finished cache goes on the hub."""

    repo: str
    """data set repository, owner/name; it is made if there is none"""
    revision: str | None = None
    """branch; None = the main one"""
    private: bool = False
    """whether a repository that is made is private"""


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Activations on disk: written once, trained on many times."""

    read: str | None = None
    """folder or hub data set of activations that takes the place of model and text"""
    write: str | None = None
    """folder that a cache is written to"""
    sites: str | tuple[str, ...] | None = None
    """sites to write; None = those that the SAEs of the run read and write"""
    tokens: int | None = None
    """activations to write; None = train.tokens"""
    dtype: StoredDtype = "bf16"
    """how they are stored; int8 has a scale for each row and 128 columns"""
    rows_per_shard: int | None = None
    """activations in a file; None = about 1 GB"""
    order: Literal["global", "blocks"] = "global"
    """global: all rows shuffled; blocks: runs of rows, mixed by the buffer, for network disks"""
    epochs: int | None = None
    """times that a cache may be read; None = once"""
    push: PushConfig | None = None
    """hub repository that a finished cache is pushed to"""

    def __post_init__(self) -> None:
        for name in ("tokens", "rows_per_shard", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1 or None, found {value}")
        if self.read is not None and self.write is not None:
            raise ConfigError(
                f"read: expected either a cache to read or one to write, found {self.read!r} and {self.write!r}"
            )
        if self.push is not None and self.write is None:
            raise ConfigError("push: expected a folder to write as well, found none")
