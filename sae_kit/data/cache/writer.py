"""Writing a cache: forwards are gathered into shards, and each shard is a place to go on from.

Where rows come from decides what they are, so a cache can only be continued with the settings that it was begun with.
The same harvest gives the same files, byte for byte, however often writing was cut short; nothing but the shard that
was being gathered is lost. A shard that is missing or torn is harvested anew, alone.
"""

import errno
import logging
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sae_kit._version import __version__
from sae_kit.atomic import is_leftover, remove_leftovers
from sae_kit.data.batch import Harvested, Resumable
from sae_kit.data.cache.files import (
    FORMAT,
    MANIFEST,
    NAMES,
    RESERVED,
    SCALE,
    SHARD,
    STATE,
    Manifest,
    ShardEntry,
    SiteEntry,
    alone_in,
    damage,
    read_manifest,
    read_state,
    write_manifest,
    write_shard,
)
from sae_kit.data.cache.quantize import StoredDtype, bytes_per_row, encode
from sae_kit.data.provenance import check_provenance
from sae_kit.errors import ConfigError, DataError, OutputExistsError

log = logging.getLogger(__name__)

SHARD_BYTES = 2**30
BYTES_OF_PLACE = 12  # row and position of an activation
BYTES_OF_ID = 4


class Harvesting(Resumable, Protocol):
    """Where activations come from: one forward after another, in the order of the text."""

    def __next__(self) -> Harvested: ...

    @property
    def counters(self) -> Mapping[str, int | float]:
        """Tokens that the model read, and rows that were left out, by reason."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Everything that says which rows these are, as JSON values."""
        ...


def write_cache(
    harvest: Harvesting,
    folder: Path | str,
    *,
    tokens: int,
    dtype: StoredDtype = "bf16",
    rows_per_shard: int | None = None,
) -> Manifest:
    """Store exactly `tokens` activations of `harvest` in `folder`, or go on with a cache that was begun there.

    The harvest stands at its beginning; closing it is the caller's. Text that ends earlier gives a complete cache of
    fewer rows, and a warning. `rows_per_shard=None` is about 1 GB.

    Raises:
        ConfigError: a cache with other settings is in the folder; all of them are named.
        OutputExistsError: something else is there, or another process writes there.
        DataError: the text gives no activation, or values do not fit `dtype`.
        OSError: the disk is, or would become, full. What is written stays; the same call goes on from there.
    """
    for name, value in (("tokens", tokens), ("rows_per_shard", rows_per_shard)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}")
    return _Writer(harvest, Path(folder), tokens, dtype, rows_per_shard).run()


class _Writer:
    def __init__(
        self, harvest: Harvesting, folder: Path, tokens: int, dtype: StoredDtype, rows_per_shard: int | None
    ) -> None:
        self._harvest, self._folder, self._tokens = harvest, folder, tokens
        self._dtype: StoredDtype = dtype
        self._asked_per_shard = rows_per_shard
        self._manifest: Manifest | None = None
        self._at = 0
        """shard that the harvest stands before"""

    def run(self) -> Manifest:
        if self._folder.exists() and not self._folder.is_dir():
            raise OutputExistsError(f"{self._folder} is a file: choose another folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        with alone_in(self._folder):
            self._manifest = self._begun()
            remove_leftovers(self._folder, NAMES)
            return self._go_on()

    def _go_on(self) -> Manifest:
        """Write what is missing."""
        beginning = self._harvest.state_dict()
        while (index := self._next_shard()) is not None:
            if index != self._at:
                before = self._entry(index - 1)
                self._harvest.load_state_dict(read_state(self._folder / before.file) if before else beginning)
            self._write(index)
            self._at = index + 1
        assert self._manifest is not None
        if self._manifest.rows < self._tokens:
            log.warning(
                "the text ended after %s of the %s activations asked for; the cache in %s is complete with these",
                f"{self._manifest.rows:,}", f"{self._tokens:,}", self._folder,
            )  # fmt: skip
        return self._manifest

    def _begun(self) -> Manifest | None:
        """The cache that is in the folder already, if it is the one that is asked for."""
        if not (self._folder / MANIFEST).is_file():
            if any(not _ours(path) for path in self._folder.iterdir()):
                raise OutputExistsError(f"{self._folder} holds files that are no cache: choose another folder")
            return None
        found = read_manifest(self._folder)
        asked = {"tokens": self._tokens, "dtype": self._dtype, "rows_per_shard": self._asked_per_shard}
        differing = [
            f"{name} is {getattr(found, name)} there and {value} here"
            for name, value in asked.items()
            if value is not None and value != getattr(found, name)
        ]
        if differing:
            raise ConfigError(
                f"{self._folder} holds a cache that was begun with other settings: {'; '.join(differing)}. "
                "Repeat them, or choose another folder"
            )
        check_provenance(self._harvest.provenance, found.provenance, f"the cache in {self._folder}")
        if not found.complete:
            log.info("going on after %s of %s activations in %s", f"{found.rows:,}", f"{found.tokens:,}", self._folder)
            self._check_space(found.tokens - found.rows, sum(shard.bytes for shard in found.shards) / found.rows)
        return found

    def _entry(self, index: int) -> ShardEntry | None:
        return None if self._manifest is None or index < 0 else self._manifest.shards[index]

    def _next_shard(self) -> int | None:
        """The first shard that is not on the disk as it should be, or else the next one, or None."""
        if self._manifest is None:
            return 0
        for index, entry in enumerate(self._manifest.shards):
            if wrong := damage(entry, self._folder):
                log.warning("%s; its %s activations are harvested anew", wrong, f"{entry.rows:,}")
                return index
        return None if self._manifest.complete else len(self._manifest.shards)

    def _write(self, index: int) -> None:
        """Harvest a shard, write it, and then say so in the manifest."""
        columns, ended = self._gather(index)
        manifest = self._manifest
        if manifest is None or not (columns or manifest.shards):
            raise DataError(f"the text gives no activation for the cache in {self._folder}")
        shards, counters = list(manifest.shards), dict(self._harvest.counters)
        rows, contexts = (sum(map(len, columns.get(name, ()))) for name in ("row", "tokens"))
        name = f"r00-{index:06d}.safetensors"
        if index < len(shards) and (rows, contexts) != (shards[index].rows, shards[index].contexts):
            raise DataError(
                f"harvested anew, {name} has {rows:,} rows instead of {shards[index].rows:,}: model or text are no "
                "longer what they were. Write the cache into another folder"
            )
        if not rows:
            self._publish(replace(manifest, complete=True, counters=counters))
            return
        with self._disk():
            size, digest = write_shard(self._folder / name, columns, self._harvest.state_dict())
        shards[index : index + 1] = [ShardEntry(file=name, rows=rows, contexts=contexts, bytes=size, sha256=digest)]
        done = replace(manifest, shards=tuple(shards))
        if len(shards) > len(manifest.shards):
            done = replace(done, counters=counters, complete=ended or done.rows == self._tokens)
            log.info("%s of %s activations are in %s", f"{done.rows:,}", f"{self._tokens:,}", self._folder)
        self._publish(done)

    def _gather(self, index: int) -> tuple[dict[str, list[Tensor]], bool]:
        """Columns of the next shard, and whether the text ended in it."""
        earlier = self._manifest.shards[:index] if self._manifest else ()
        wanted = self._tokens - sum(shard.rows for shard in earlier)
        contexts = sum(shard.contexts for shard in earlier)
        columns: dict[str, list[Tensor]] = {}
        rows = 0
        while (forward := next(self._harvest, None)) is not None:
            manifest = self._manifest = self._manifest or self._begin(forward)
            number = min(len(forward.kept), wanted - rows)
            for name, column in self._columns(forward, number, contexts).items():
                columns.setdefault(name, []).append(column)
            rows += number
            contexts += len(columns["tokens"][-1])
            if rows >= min(wanted, manifest.rows_per_shard):
                return columns, False
        return columns if rows else {}, True

    def _columns(self, forward: Harvested, number: int, first_context: int) -> dict[str, Tensor]:
        """The first `number` rows of a forward as they are stored, with the contexts up to theirs."""
        assert self._manifest is not None
        ids, kept = forward.tokens.ids.cpu(), forward.kept[:number]
        row, pos = kept // ids.shape[1], kept % ids.shape[1]
        contexts = len(ids) if number == len(forward.kept) else int(row[-1]) + 1
        lengths = forward.tokens.lengths
        if lengths is None:
            lengths = torch.full((len(ids),), ids.shape[1])
        self._check(forward)
        columns = {
            "row": (row + first_context).long(),
            "pos": pos.int(),
            "tokens": ids[:contexts].to(torch.int32, copy=True),
            "lengths": lengths[:contexts].to("cpu", torch.int32, copy=True),
        }
        for site, values in forward.rows.items():
            stored, scales = encode(values[:number], self._dtype, site)
            columns[site] = stored.cpu().contiguous()
            if scales is not None:
                columns[site + SCALE] = scales.cpu()
        return columns

    def _begin(self, forward: Harvested) -> Manifest:
        """The manifest of a new cache, once the first forward has shown what rows are like, and that they will fit."""
        for site in forward.rows:
            if site in RESERVED or site.startswith(STATE) or site.removesuffix(SCALE) in forward.rows.keys() - {site}:
                raise ConfigError(
                    f"a site named {site!r} cannot be cached: that name means something else in the files"
                )
        widths = {site: values.shape[1] for site, values in forward.rows.items()}
        row = sum(bytes_per_row(width, self._dtype) for width in widths.values())
        ids = forward.tokens.ids.numel() / max(1, len(forward.kept))
        self._check_space(self._tokens, row + BYTES_OF_PLACE + BYTES_OF_ID * ids)
        names = {site: str(values.dtype).removeprefix("torch.") for site, values in forward.rows.items()}
        return Manifest(
            format=FORMAT,
            version=__version__,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            provenance=dict(self._harvest.provenance),
            dtype=self._dtype,
            sites={site: SiteEntry(width=width, dtype=names[site]) for site, width in widths.items()},
            context_size=forward.tokens.ids.shape[1],
            tokens=self._tokens,
            rows_per_shard=self._asked_per_shard or max(1, SHARD_BYTES // row),
        )

    def _check_space(self, rows: int, bytes_per_row: float) -> None:
        """That so many more activations will fit on the disk."""
        needed, free = rows * bytes_per_row, shutil.disk_usage(self._folder).free
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{rows:,} activations of {bytes_per_row:,.0f} bytes take {needed / 1e6:,.1f} MB, and "
                f"{free / 1e6:,.1f} MB are free. Write fewer, store int8, or choose another disk",
                str(self._folder),
            )

    def _check(self, forward: Harvested) -> None:
        """That a forward is like those before it."""
        assert self._manifest is not None
        expected = {site: entry.width for site, entry in self._manifest.sites.items()}
        found = {site: values.shape[1] for site, values in forward.rows.items()}
        sizes = (self._manifest.context_size, forward.tokens.ids.shape[1])
        if found != expected or sizes[0] != sizes[1]:
            raise DataError(
                f"expected {expected} from contexts of {sizes[0]} ids, as the cache in {self._folder} has them, "
                f"found {found} from contexts of {sizes[1]}"
            )

    def _publish(self, manifest: Manifest) -> None:
        with self._disk():
            write_manifest(manifest, self._folder)
        self._manifest = manifest

    @contextmanager
    def _disk(self) -> Generator[None, None, None]:
        """Errors of the disk say what is safe and how to go on."""
        try:
            yield
        except OSError as error:
            rows = self._manifest.rows if self._manifest else 0
            raise OSError(
                error.errno,
                f"{error.strerror}: writing the cache stopped. {rows:,} of {self._tokens:,} activations are in whole "
                "shards. Make room and write again with the same settings: it goes on from there",
                str(self._folder),
            ) from error


def _ours(path: Path) -> bool:
    """Whether writing may have left this before there was a manifest."""
    return bool(SHARD.fullmatch(path.name) or is_leftover(path, NAMES))
