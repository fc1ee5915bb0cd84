"""Reading a cache: batches of rows in a true global shuffle, or blocks of rows for the mixing buffer.

The order of the rows is a function (ordering.py), so a reader is where it stands: an epoch and a position. A batch is
gathered from the mapped files by one call for each site (memory.py).
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.data.cache.files import AGAIN, damage, open_shard, read_manifest
from sae_kit.data.cache.memory import Column, Places, Recycled
from sae_kit.data.cache.opened import Cache
from sae_kit.data.cache.ordering import NONE, Blocks, Order, Shuffled
from sae_kit.data.cache.quantize import DTYPES, decode
from sae_kit.data.cache.saelens import is_saelens_cache, open_saelens_cache
from sae_kit.data.cache.sharing import locate
from sae_kit.data.provenance import check_provenance, digest
from sae_kit.errors import ConfigError, CorruptFileError, DataError, HookNotFoundError, did_you_mean

log = logging.getLogger(__name__)


def open_cache(place: Path | str, *, revision: str | None = None, partial: bool = False, verify: bool = False) -> Cache:
    """Open a folder, or a data set of the hub, that holds a cache of ours or of SAELens.

    `partial` takes one that is still being written as it is. `verify` reads all files once and compares their hashes.

    Raises:
        FileNotFoundError: there is no cache.
        DataError: it is unfinished.
        CorruptFileError: files are missing, torn, or (with `verify`) not what was written; all are named.
    """
    folder = locate(place, revision=revision)
    if is_saelens_cache(folder):
        return open_saelens_cache(folder)
    manifest = read_manifest(folder)
    if not manifest.complete and not partial:
        raise DataError(
            f"the cache in {folder} is unfinished: {manifest.rows:,} of {manifest.tokens:,} activations. Write it "
            "again with the same settings, which goes on from there, or read what there is with partial=True"
        )
    if wrong := [found for entry in manifest.shards if (found := damage(entry, folder, verify=verify))]:
        # Writing looks at sizes alone, so a file of the right size has to go before it is written anew.
        hint = "delete it, and " if any("hash" in found for found in wrong) else ""
        raise CorruptFileError(f"{'; '.join(wrong)}. To repair it, {hint}{AGAIN}")
    return Cache(
        place=f"the cache in {folder}",
        shards=[open_shard(manifest, index, folder) for index in range(len(manifest.shards))],
        widths={site: entry.width for site, entry in manifest.sites.items()},
        dtypes={
            site: getattr(torch, entry.dtype) if manifest.dtype == "int8" else DTYPES[manifest.dtype]
            for site, entry in manifest.sites.items()
        },
        context_size=manifest.context_size,
        provenance=manifest.provenance,
        counters=manifest.counters,
        digest=digest(shard.sha256 for shard in manifest.shards),
    )


class CacheReader(Iterator[dict[str, Tensor]]):
    """Batches of a cache: site -> [batch_tokens, width]; row i of every site is the same token.

    Each epoch has an order of its own and gives every row exactly once; a batch that an epoch cannot fill goes on with
    the next. A batch is the caller's own memory.
    """

    def __init__(
        self,
        cache: Cache | Path | str,
        *,
        batch_tokens: int,
        sites: Sequence[str] | None = None,
        order: Literal["global", "blocks"] = "global",
        open_shards: int = 4,
        seed: int = 0,
        epochs: int | None = None,
        tokens: int | None = None,
        dtype: torch.dtype | None = None,
        excluded: Sequence[int] = (),
        expected: Mapping[str, Any] | None = None,
        drop_last: bool = True,
    ) -> None:
        """Open the cache and check what is asked of it; rows are read with the first batch.

        `sites=None` is all of them; `tokens` ends after so many activations, in whole batches; `dtype=None` gives the
        stored precision, or for int8 the model's. Rows whose id is among `excluded` are left out. `expected` is the
        provenance that a run would give its own activations.

        Raises:
            HookNotFoundError: a site that is not in the cache.
            ConfigError: more tokens than the epochs have, or fewer than a batch; a cache of other settings than
                `expected`.
            DataError, CorruptFileError: as `open_cache`.
        """
        self.cache = cache if isinstance(cache, Cache) else open_cache(cache)
        self.batch_tokens, self._drop_last = batch_tokens, drop_last
        self.sites = tuple(self.cache.widths) if sites is None else tuple(sites)
        for site in self.sites:
            if site not in self.cache.widths:
                raise HookNotFoundError(
                    f"{site!r} is not in {self.cache.place}.{did_you_mean(site, self.cache.widths)} "
                    f"It holds {', '.join(self.cache.widths)}"
                )
        if not self.sites:
            raise ConfigError(f"expected some of the sites {', '.join(self.cache.widths)}, found none")
        if epochs is not None and epochs < 1:
            raise ConfigError(f"cache.epochs: expected at least 1 or None, found {epochs}")
        if batch_tokens < 1 or open_shards < 1:
            raise ConfigError(f"expected batches and open shards of at least 1, found {batch_tokens} and {open_shards}")
        if expected is not None:
            self._compare(expected)
        sizes = [shard.rows for shard in self.cache.shards]
        self._kept = _kept(self.cache, excluded) if excluded else None
        if self._kept is not None:
            sizes = np.diff(np.searchsorted(self._kept, np.cumsum([0, *sizes]))).tolist()
        self._rows = sum(sizes)
        self._order: Order = Shuffled(self._rows, seed) if order == "global" else Blocks(sizes, open_shards, seed)
        self._total = self._limit(tokens, epochs)
        self._places = Places([shard.rows for shard in self.cache.shards])
        self._columns = {
            site: _Site(self.cache, site, dtype or self.cache.dtypes[site], batch_tokens) for site in self.sites
        }
        self._epoch = self._position = self._dropped_last = 0
        self._dropped_special = self.cache.rows - self._rows
        self._closed = False
        self._settings = {
            "cache": self.cache.digest,
            "order": order,
            "seed": seed,
            "rows": self._rows,
            "excluded": sorted(excluded),
            **({"open_shards": open_shards} if order == "blocks" else {}),
        }

    @property
    def widths(self) -> dict[str, int]:
        """Site -> width, of the sites that are read."""
        return {site: self.cache.widths[site] for site in self.sites}

    @property
    def rows(self) -> int:
        """Activations in an epoch."""
        return self._rows

    @property
    def counters(self) -> Mapping[str, int]:
        """Rows of an epoch that are left out by their id, rows of the last incomplete batch, and whole passes."""
        return {
            "dropped_special": self._dropped_special,
            "dropped_last": self._dropped_last,
            "epochs": self._epoch,
        }

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the cache says about where its rows come from."""
        return self.cache.provenance

    def __next__(self) -> dict[str, Float[Tensor, "batch _"]]:
        number = min(self.batch_tokens, self._total - self._given)
        if self._closed or number <= 0 or (number < self.batch_tokens and self._drop_last):
            self._dropped_last = self._dropped_last if self._closed else max(0, number)
            raise StopIteration
        batch = self._gather(self._next_numbers(number))
        self._epoch, self._position = divmod(self._given + number, self._rows)
        return batch

    def peek(self, number: int) -> dict[str, Float[Tensor, "rows _"]]:
        """The next `number` activations, or as many as are left; nothing is consumed."""
        return self._gather(self._next_numbers(max(0, min(number, self._total - self._given))))

    def state_dict(self) -> State:
        """Where the reader stands."""
        return {"epoch": self._epoch, "position": self._position, "settings": dict(self._settings)}

    def load_state_dict(self, state: State) -> None:
        """Go on where another reader of this cache stood.

        Raises:
            ConfigError: it read another cache, or in another order.
        """
        found = state["settings"]
        differing = [
            f"{name} was {found.get(name)} and is {self._settings.get(name)}"
            for name in self._settings | found
            if found.get(name) != self._settings.get(name)
        ]
        if differing:
            raise ConfigError(f"the state is of another way to read {self.cache.place}: {'; '.join(differing)}")
        self._epoch, self._position = state["epoch"], state["position"]

    def close(self) -> None:
        """Give back the files; the reader is then at its end."""
        self._closed, self._columns = True, {}
        self.cache = replace(self.cache, shards=())

    @property
    def _given(self) -> int:
        return self._epoch * self._rows + self._position

    def _limit(self, tokens: int | None, epochs: int | None) -> int:
        if not self._rows:
            raise DataError(f"{self.cache.place} has no activation whose id is not excluded")
        available = self._rows * (epochs or 1)
        if tokens is not None and tokens > available:
            raise ConfigError(
                f"{self.cache.place} has {self._rows:,} activations, {available:,} in {epochs or 1} epochs, and "
                f"{tokens:,} are asked for. Set cache.epochs to {-(-tokens // self._rows)}, or train on fewer tokens"
            )
        total = available if tokens is None else tokens
        if total < self.batch_tokens and self._drop_last:
            raise ConfigError(
                f"expected at least one batch of {self.batch_tokens:,} activations of {self.cache.place}, "
                f"found {total:,}"
            )
        return available if tokens is None else tokens // self.batch_tokens * self.batch_tokens

    def _compare(self, expected: Mapping[str, Any]) -> None:
        found = dict(self.cache.provenance)
        if self.cache.partial:
            log.warning("%s does not say which model and text it is from, so that cannot be checked", self.cache.place)
            expected = {key: value for key, value in expected.items() if key in found}
            found = {key: value for key, value in found.items() if key in expected}
        # Any of its sites may be read.
        check_provenance({**expected, "sites": None}, {**found, "sites": None}, self.cache.place)

    def _next_numbers(self, number: int) -> Int[np.ndarray, " rows"]:
        """Numbers, in the order of the text, of the next rows that are read."""
        parts, given = [NONE], self._given
        while number:
            epoch, start = divmod(given, self._rows)
            stop = min(start + number, self._rows)
            parts.append(self._order.numbers(epoch, start, stop))
            number, given = number - (stop - start), given + stop - start
        numbers = np.concatenate(parts)
        return numbers if self._kept is None else self._kept[numbers]

    def _gather(self, numbers: Int[np.ndarray, " rows"]) -> dict[str, Float[Tensor, "rows _"]]:
        shards, places = self._places(numbers)
        return {site: rows.read(shards, places) for site, rows in self._columns.items()}


class _Site:
    """One site over all shards, read in one precision."""

    def __init__(self, cache: Cache, site: str, dtype: torch.dtype, batch: int) -> None:
        self._values = Column([shard.values[site] for shard in cache.shards])
        scales = [shard.scales[site] for shard in cache.shards if site in shard.scales]
        self._scales = Column(scales) if scales else None
        self._shape, self._dtype = (batch, cache.widths[site]), dtype
        self._memory = Recycled(self._shape, dtype)

    def read(self, shards: Int[np.ndarray, " rows"], places: Int[np.ndarray, " rows"]) -> Float[Tensor, "rows _"]:
        shape = (len(places), self._shape[1])
        out = self._memory.tensor() if shape == self._shape else torch.empty(shape, dtype=self._dtype)
        if self._values.dtype == self._dtype:
            return self._values.gather(shards, places, out)
        scales = None if self._scales is None else self._scales.gather(shards, places)
        return decode(self._values.gather(shards, places), scales, out)


def _kept(cache: Cache, excluded: Sequence[int]) -> Int[np.ndarray, " rows"]:
    """Numbers of the rows whose id is not excluded: 8 bytes a row, where a cache is filtered only as it is read."""
    left_out = torch.tensor(sorted(excluded), dtype=torch.int32)
    found, first = [], 0
    for shard in cache.shards:
        if shard.tokens is None:
            raise DataError(f"{cache.place} does not hold the ids of its text, so none can be left out")
        ids = shard.tokens.flatten()[shard.places(cache.context_size)]
        found.append(torch.isin(ids, left_out, invert=True).nonzero().squeeze(1) + first)
        first += shard.rows
    return torch.cat(found).numpy()
