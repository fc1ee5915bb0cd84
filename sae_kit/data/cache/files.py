"""The files of a cache: `manifest.json`, and shards of rows as safetensors.

    r00-000000.safetensors   {site} [rows, width], with {site}.scale [rows, groups] where it is int8
                             row int64 [rows], pos int32 [rows]: where each activation stands in the text
                             tokens int32 [contexts, n], lengths int32 [contexts]: the text itself, every position
                             state.PATH: tensors of the data state just after this shard

The data state's JSON stands in the header of the shard, so that a shard says by itself how writing goes on after it. A
file gets its name when all of it is on the disk, and is a part of the cache when the manifest names it.
"""

import hashlib
import json
import os
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64, Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_kit import config as trees
from sae_kit.atomic import write_text
from sae_kit.data.batch import State
from sae_kit.data.cache.quantize import DTYPES, StoredDtype, scales_per_row
from sae_kit.errors import ConfigError, CorruptFileError, FormatTooNewError, OutputExistsError
from sae_kit.states import join_state, split_state, write_tensors

FORMAT = 1
MANIFEST = "manifest.json"
LARGEST_MANIFEST = 64 * 2**20  # bytes
SHARD = re.compile(r"r\d\d-\d{6}\.safetensors")
NAMES = re.compile(rf"{SHARD.pattern}|{re.escape(MANIFEST)}")
RESERVED = ("row", "pos", "tokens", "lengths")
SCALE, STATE = ".scale", "state."
AGAIN = "write the cache once more with the same settings: what is whole stays, and only this is harvested anew"


# ---- manifest --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SiteEntry:
    """One site of a cache."""

    width: int
    dtype: str
    """precision in which the model computed it"""


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """One file of a cache."""

    file: str
    rows: int
    contexts: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a cache holds, and where it comes from."""

    format: int
    version: str
    """of the sae_kit that began it"""
    created: str
    provenance: dict[str, Any]
    """model, sites, text, tokenizer, filters: everything that decides which rows these are"""
    dtype: StoredDtype
    sites: dict[str, SiteEntry]
    context_size: int
    tokens: int
    """activations asked for"""
    rows_per_shard: int
    """a shard ends with the first forward that reaches it"""
    shards: tuple[ShardEntry, ...] = ()
    counters: dict[str, int | float] = field(default_factory=dict)
    """of the harvest: tokens that the model read, rows left out by reason"""
    complete: bool = False

    @property
    def rows(self) -> int:
        """Activations stored."""
        return sum(shard.rows for shard in self.shards)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises:
        FileNotFoundError: there is none.
        FormatTooNewError, CorruptFileError: it is not understood.
    """
    path = folder / MANIFEST
    if not path.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) if folder.is_dir() else "no such folder"
        raise FileNotFoundError(f"no cache of activations in {folder}: expected {MANIFEST}, found {found or 'nothing'}")
    if path.stat().st_size > LARGEST_MANIFEST:
        raise CorruptFileError(f"{path} is larger than {LARGEST_MANIFEST // 2**20} MiB: that is no manifest")
    try:
        data = trees.parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON: {error}") from error
    found = data.get("format") if isinstance(data, dict) else None
    if not isinstance(found, int):
        raise CorruptFileError(f"{path}: expected the manifest of a cache, with a format number, found {found!r}")
    if found > FORMAT:
        raise FormatTooNewError(f"{path} has format {found}; this sae_kit reads up to {FORMAT}: upgrade it")
    try:
        manifest = trees.structure(Manifest, data)
    except ConfigError as error:
        raise CorruptFileError(f"{path}: {error}") from error
    for shard in manifest.shards:
        name = PurePosixPath(shard.file)
        if len(name.parts) != 1 or name.suffix != ".safetensors" or "\\" in shard.file or shard.file.startswith("."):
            raise CorruptFileError(f"{path}: expected the names of safetensors beside it, found {shard.file!r}")
    return manifest


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Replace the manifest, whole or not at all."""
    write_text(folder / MANIFEST, json.dumps(trees.unstructure(manifest), indent=1, ensure_ascii=False) + "\n")


# ---- shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of a cache; tensors that are read from the disk as they are touched."""

    name: str
    rows: int
    values: Mapping[str, Shaped[Tensor, "rows _"]]
    """site -> activations as they are stored"""
    scales: Mapping[str, Float[Tensor, "rows _"]]
    """site -> scales, where the activations are int8"""
    tokens: Int32[Tensor, "contexts n"] | None
    """ids of the contexts, also where no activation was kept; None = not stored"""
    lengths: Int32[Tensor, " contexts"] | None = None
    """ids of each context before its padding; None = all are full"""
    row: Int64[Tensor, " rows"] | None = None
    """context of each activation, counted from the first of the cache; None = each position of each in turn"""
    pos: Int32[Tensor, " rows"] | None = None
    """its position there"""
    first_context: int = 0

    def places(self, context_size: int) -> Int64[Tensor, " rows"]:
        """Where each activation stands in `tokens.flatten()`, ascending."""
        if self.row is None or self.pos is None:
            return torch.arange(self.rows)
        return (self.row - self.first_context) * context_size + self.pos


def write_shard(path: Path, columns: Mapping[str, Sequence[Tensor]], state: State) -> tuple[int, str]:
    """Write columns, each the concatenation of its tensors, and the data state after them; bytes and SHA-256."""
    plain, tensors = split_state(state)
    of_state = {STATE + name: [tensor] for name, tensor in tensors.items()}
    return write_tensors(path, {**columns, **of_state}, {"data_state": json.dumps(plain)})


def read_state(path: Path) -> State:
    """The data state just after a shard."""
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(STATE)]  # noqa: SIM118
        tensors = {name.removeprefix(STATE): file.get_tensor(name).clone() for name in names}
        plain = json.loads((file.metadata() or {})["data_state"])
    return join_state(plain, tensors)


def damage(entry: ShardEntry, folder: Path, *, verify: bool = False) -> str | None:
    """What is wrong with the file of a shard; `verify` reads and hashes all of it."""
    path = folder / entry.file
    if not path.is_file():
        return f"{path} is missing"
    if (size := path.stat().st_size) != entry.bytes:
        return f"{path} is torn: expected {entry.bytes:,} bytes, found {size:,}"
    if verify:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:
                return f"{path} does not hold what was written: its hash differs from the manifest's"
    return None


def open_shard(manifest: Manifest, index: int, folder: Path) -> Shard:
    """A shard whose file is as long as it should be, checked against the manifest.

    Raises:
        CorruptFileError: it holds other tensors than the manifest says.
    """
    entry = manifest.shards[index]
    path, rows = folder / entry.file, entry.rows
    expected = {"row": (rows,), "pos": (rows,), "lengths": (entry.contexts,)}
    expected |= {"tokens": (entry.contexts, manifest.context_size)}
    expected |= {site: (rows, found.width) for site, found in manifest.sites.items()}
    if manifest.dtype == "int8":
        expected |= {site + SCALE: (rows, scales_per_row(found.width)) for site, found in manifest.sites.items()}
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(STATE)}  # noqa: SIM118
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    wrong += [site for site in manifest.sites if site in found and tensors[site].dtype != DTYPES[manifest.dtype]]
    if wrong:
        raise CorruptFileError(f"{path}: {', '.join(dict.fromkeys(wrong))} is not what {MANIFEST} says; {AGAIN}")
    lengths = tensors["lengths"]
    return Shard(
        name=entry.file,
        rows=rows,
        values={site: tensors[site] for site in manifest.sites},
        scales={site: tensors[site + SCALE] for site in manifest.sites if site + SCALE in expected},
        row=tensors["row"],
        pos=tensors["pos"],
        tokens=tensors["tokens"],
        lengths=None if bool((lengths == manifest.context_size).all()) else lengths,
        first_context=sum(before.contexts for before in manifest.shards[:index]),
    )


@contextmanager
def alone_in(folder: Path) -> Generator[None, None, None]:
    """No two processes write into a folder at a time; the lock ends with the process, however it ends.

    Raises:
        OutputExistsError: another process does.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise OutputExistsError(f"another process is writing into {folder}: wait for it, or end it") from error
    except OSError:
        pass  # a network disk that has no locks
    try:
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Generator[Any, None, None]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise CorruptFileError(f"{path} cannot be read as safetensors ({error}); {AGAIN}") from error
