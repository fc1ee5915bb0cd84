"""An opened cache: what it says about itself, and its contexts in the order of the text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae_kit.data.batch import Harvested, TokenBatch
from sae_kit.data.cache.files import Shard
from sae_kit.data.cache.quantize import decode
from sae_kit.errors import DataError


@dataclass(frozen=True)
class Cache:
    """An opened cache: what it says about itself, and its rows, which are read from the disk as they are touched."""

    place: str
    """how errors name it"""
    shards: Sequence[Shard]
    widths: Mapping[str, int]
    dtypes: Mapping[str, torch.dtype]
    """site -> precision that reading gives unless another is asked for: the stored one, or the model's for int8"""
    context_size: int
    provenance: Mapping[str, Any]
    partial: bool = False
    """whether the provenance lacks what would be needed to compare it with a run's"""
    counters: Mapping[str, int | float] = field(default_factory=dict)
    digest: str | None = None
    """16 hex digits of what its files hold, wherever they are; None = not known"""

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def contexts(self, number: int = 64) -> Iterator[Harvested]:
        """The whole cache in the order of the text, up to `number` contexts at a time, as forwards gave it.

        Raises:
            DataError: the ids were not stored.
        """
        for shard in self.shards:
            if shard.tokens is None:
                raise DataError(f"{self.place} does not hold the ids of its text")
            size, places = self.context_size, shard.places(self.context_size)
            for first in range(0, len(shard.tokens), number):
                tokens = shard.tokens[first : first + number].long()
                lengths = None if shard.lengths is None else shard.lengths[first : first + number].long()
                edges = torch.tensor([first, first + number]) * size
                start, stop = torch.searchsorted(places, edges).tolist()
                yield Harvested(
                    rows={site: self._decoded(shard, site, slice(start, stop)) for site in self.widths},
                    tokens=TokenBatch(tokens, lengths),
                    kept=places[start:stop] - first * size,
                )

    def _decoded(self, shard: Shard, site: str, rows: slice) -> Float[Tensor, "rows _"]:
        values = shard.values[site][rows]
        scales = shard.scales[site][rows] if site in shard.scales else None
        return decode(values, scales, torch.empty(values.shape, dtype=self.dtypes[site]))
