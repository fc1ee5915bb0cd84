"""Where documents come from: files, folders, hub datasets, saved datasets, and objects, as items to be walked over."""

import glob
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_kit.config import structure_fields
from sae_kit.data.batch import State
from sae_kit.data.documents import MEANING, Kind, Sharded, Walk, describe, is_empty, kind_of
from sae_kit.data.holdout import default_share
from sae_kit.data.provenance import digest, fingerprint, fingerprint_of_files
from sae_kit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

COLUMNS: Mapping[str, Kind] = {
    "text": "text",
    "content": "text",
    "tokens": "tokens",
    "input_ids": "tokens",
    "messages": "chat",
    "conversations": "chat",
}
"""Names that `column="auto"` looks for, and what they hold."""
TEXT_FILES = (".txt", ".md", ".py")
"""One document a file; `TABLES` hold one a line or row."""
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SIDECARS = ("sae_kit.json", "sae_lens.json")
"""What lies beside rows that were tokenised before, and says how; the first that is there counts."""
COUNTED_BYTES = 2**30
"""Local tables up to this size are counted, in seconds; a larger one has documents enough for any share."""
LOOKED_AT = 100  # documents among which one that is not empty shows what kind they are


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from; a bare string stands for its `path`."""

    path: str
    """hub dataset, saved dataset, file or folder (.txt, .md, .py, .json, .jsonl, .parquet); demo = the Python standard
    library"""
    name: str | None = None
    """subset of a hub dataset"""
    split: str = "train"
    """split of a hub dataset or of saved splits"""
    revision: str | None = None
    """branch, tag or commit of a hub dataset"""
    data_files: str | None = None
    """pattern of the files to read within `path`"""
    data_dir: str | None = None
    """folder to read within `path`"""
    kind: Literal["auto", "text", "chat", "tokens"] = "auto"
    """text: strings; chat: lists of messages; tokens: lists of ids; auto = as the first document is"""
    column: str = "auto"
    """column to read; auto = the only one named text, content, tokens, input_ids, messages or conversations"""
    weight: float = 1.0
    """share of the rows, relative to the other sources"""
    epochs: int | None = None
    """passes over the source; None = without end"""
    streaming: bool = True
    """read while training; otherwise download everything first, and shuffle it"""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path: expected a data set, file or folder, found an empty name")
        if not 0 < self.weight < math.inf:
            raise ConfigError(f"weight: expected a positive number, found {self.weight}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs: expected at least 1, or None for no end, found {self.epochs}")

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> "Source":
        """Build from plain data: a bare string is a path."""
        return cls(path=data) if isinstance(data, str) else structure_fields(cls, data, where)


class Opened(NamedTuple):
    """A source that is ready to be read."""

    items: Any
    """a sequence, files (`Sharded`), an object with a state, or an iterable"""
    kind: Kind | None = None
    """None: as the first document will be"""
    column: str | None = None
    number: int | None = None
    """documents, where that is known"""
    fingerprint: str | None = None
    sidecar: Mapping[str, Any] | None = None
    """how its rows were tokenised"""


def open_source(source: Source) -> Opened:
    """Open a source; its documents are a sequence where their number is known.

    Raises:
        DataError: nothing there, nothing readable, or no column of text, messages or ids (the columns are listed).
    """
    if source.path == "demo":
        from sae_kit.demo.corpus import corpus

        return _sequence((*corpus().train, *corpus().held_out), "text")
    path = Path(source.path).expanduser()
    if not path.exists():
        if path.is_absolute() or source.path.startswith(".") or path.suffix in (*TEXT_FILES, *TABLES):
            raise DataError(f"{source.path}: there is no such file or folder")
        return _open_dataset(source, source.path, source.data_files)
    path /= source.data_dir or ""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(source, path)
    pattern = source.data_files or "**/*"
    files = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
    files = [file for file in files if file.name not in SIDECARS]
    kinds = {file.suffix for file in files if file.suffix in TEXT_FILES or file.suffix in TABLES}
    if not kinds:
        raise DataError(f"{source.path}: expected {', '.join((*TEXT_FILES, *TABLES))} files, found none")
    if not kinds.isdisjoint(TABLES):
        kinds.discard(".md")  # the README that lies beside data
    builders = {TABLES.get(kind, "text") for kind in kinds}
    if len(builders) > 1:
        found = ", ".join(sorted(kinds))
        raise DataError(f"{source.path}: expected one kind of files, found {found}; choose by data_files")
    files = [file for file in files if file.suffix in kinds]
    builder = builders.pop()
    if builder != "text":
        return _open_tables(source, builder, files, path)
    root = path.parent if path.is_file() else path
    return Opened(_Files(files), "text", number=len(files), fingerprint=fingerprint_of_files(files, root))


def as_documents(documents: Iterable[Any]) -> Opened:
    """Documents that were given as an object: an iterable as it is, a dataset's column.

    Raises:
        ConfigError: one string, or a dict (of splits).
        DataError: a dataset that is empty or has no column to read.
    """
    if isinstance(documents, str | bytes | Mapping):
        raise ConfigError(
            f"documents: expected an iterable of strings or one split of a dataset, found {type(documents).__name__}"
        )
    # Both kinds of Dataset: objects of that library are recognised without loading it.
    if hasattr(documents, "column_names") and hasattr(documents, "select_columns"):
        return _column(documents, Source(path="the documents"))
    if isinstance(documents, Sequence):
        return _sequence(documents, None)
    return Opened(documents)


def share_of(source: Source, opened: Opened, asked: float | None) -> float:
    """Share of a source's documents that is held out."""
    if asked is not None:
        return asked
    return default_share(opened.number, streaming=source.streaming)


def portable(path: str) -> str:
    """The name of a source without the folders that it lies in on this machine."""
    return Path(path).expanduser().resolve().name if Path(path).expanduser().exists() else path


def describe_source(source: Source, opened: Opened, share: float) -> dict[str, Any]:
    """Which documents a source gives, as JSON values."""
    return {
        "path": portable(source.path),
        "name": source.name,
        "split": source.split,
        "revision": source.revision,
        "data_files": source.data_files,
        "data_dir": source.data_dir,
        "kind": opened.kind if source.kind == "auto" else source.kind,
        "column": opened.column,
        "weight": source.weight,
        "epochs": source.epochs,
        "streaming": source.streaming,
        "fingerprint": opened.fingerprint,
        "holdout": share,
    }


class _Files(Sequence[str | None]):
    """Text files, read when asked for; one that is not UTF-8 counts as empty."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._files[index].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            log.warning("%s is not UTF-8 text: skipped", self._files[index])
            return None


class _Table(Sequence[Any]):
    """One column of a dataset whose rows can be fetched in any order."""

    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index][self._column]

    def fetch(self, places: list[int]) -> list[Any]:
        """Several rows at once, at a tenth of the price."""
        return list(self._dataset[places][self._column])


class _Stream(Sharded):
    """One column of a dataset that is read from files in order."""

    def __init__(self, dataset: Any, column: str, source: Source) -> None:
        self.shards = max(dataset.num_shards, 1)
        self._dataset, self._column, self._source = dataset, column, source

    def open(self, shard: int) -> Walk:
        return _Shard(self._dataset.shard(self.shards, shard), self._column, self._source)

    def __iter__(self) -> Iterator[Any]:
        return (item for shard in range(self.shards) for item in self.open(shard))

    def count(self) -> int:
        """Read everything once and count it."""
        batches = self._dataset.with_format("arrow").iter(batch_size=1_000)
        return sum(batch.num_rows for batch in batches)


class _Shard(Walk):
    """A walk over one file; the dataset knows where it stands."""

    def __init__(self, dataset: Any, column: str, source: Source) -> None:
        self._dataset, self._column, self._source = dataset, column, source
        self._examples: Iterator[Any] | None = None

    def __next__(self) -> Any:
        from datasets.exceptions import DatasetsError

        self._examples = self._examples or iter(self._dataset)
        try:
            return next(self._examples)[self._column]
        except (OSError, ValueError, DatasetsError) as error:
            raise DataError(f"{self._source.path}: cannot read on: {_reason(error)}") from error

    def state_dict(self) -> State:
        return self._dataset.state_dict()

    def load_state_dict(self, state: State) -> None:
        self._dataset.load_state_dict(state)
        self._examples = None


def _sequence(items: Sequence[Any], kind: Kind | None) -> Opened:
    return Opened(items, kind, number=len(items), fingerprint=fingerprint(items))


def _open_saved(source: Source, path: Path) -> Opened:
    import datasets

    try:
        dataset: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot open the saved dataset {source.path!r}: {_reason(error)}") from error
    if isinstance(dataset, Mapping):
        if source.split not in dataset:
            raise DataError(f"{source.path}: expected a split {source.split!r}, found {', '.join(dataset)}; set split")
        dataset = dataset[source.split]
    return _described(_column(dataset, source), path)


def _open_tables(source: Source, builder: str, files: Sequence[Path], root: Path) -> Opened:
    sizes = {file: file.stat().st_size for file in files}
    filled = [glob.escape(str(file)) for file, size in sizes.items() if size]  # `datasets` takes names for patterns
    if not filled:
        raise DataError(f"{source.path}: expected text, found {len(files)} empty file{'s' if len(files) > 1 else ''}")
    for file in (file for file, size in sizes.items() if not size):
        log.warning("%s is empty: skipped", file)
    folder = root.parent if root.is_file() else root
    opened = _described(_open_dataset(source, builder, filled), folder)
    if isinstance(opened.items, _Stream):
        counted = sum(sizes.values()) <= COUNTED_BYTES
        return opened._replace(
            number=opened.items.count() if counted else None, fingerprint=fingerprint_of_files(files, folder)
        )
    return opened


def _open_dataset(source: Source, path: str, files: str | list[str] | None) -> Opened:
    import datasets
    from datasets.exceptions import DatasetsError

    local = isinstance(files, list)
    try:
        dataset = datasets.load_dataset(
            path,
            source.name,
            split=source.split,
            revision=source.revision,
            data_files=files,
            data_dir=None if local else source.data_dir,
            streaming=source.streaming,
        )
        opened = _column(dataset, source)
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"cannot open dataset {source.path!r}, split {source.split!r}: {_reason(error)}") from error
    if opened.kind == "tokens" and not local:
        return opened._replace(sidecar=_sidecar_on_the_hub(source))
    return opened


def _column(dataset: Any, source: Source) -> Opened:
    examples = iter(dataset)
    first = next(examples, None)
    if first is None:
        raise DataError(f"{source.path}: expected text, found no documents")
    column = _column_name(list(first), source)
    seen = [first[column]]
    while is_empty(seen[-1]) and len(seen) < LOOKED_AT and (example := next(examples, None)) is not None:
        seen.append(example[column])
    asked = source.kind if source.kind != "auto" else COLUMNS[column] if source.column == "auto" else None
    kind = asked or "text" if is_empty(seen[-1]) else kind_of(seen[-1])
    if kind is None or kind != (asked or kind):
        raise DataError(
            f"{source.path}: expected {MEANING[asked or 'text']} in column {column!r}, found {describe(seen[-1])}; "
            "set column or kind"
        )
    dataset = dataset.select_columns([column])
    if kind == "tokens":
        dataset = dataset.with_format("numpy")  # ids without a Python object for each
    if hasattr(dataset, "__len__"):
        table = _Table(dataset, column)
        return Opened(table, kind, column, len(table), fingerprint(table))
    first_said = fingerprint([seen[0]])
    stream = _Stream(dataset, column, source)
    return Opened(stream, kind, column, None, digest([str(stream.shards), first_said or ""]))


def _column_name(columns: list[str], source: Source) -> str:
    names = [source.column]
    if source.column == "auto":
        names = [name for name, kind in COLUMNS.items() if source.kind in ("auto", kind)]
    wanted = [column for column in columns if column in names]
    if len(wanted) != 1:
        asked = " or ".join(filter(None, (", ".join(map(repr, names[:-1])), repr(names[-1]))))
        found = ", ".join(map(repr, columns))
        raise DataError(f"{source.path}: expected one column {asked}, found columns {found}; set column")
    return wanted[0]


def _described(opened: Opened, folder: Path) -> Opened:
    """With what lies in `folder` and says how the rows were tokenised, if they are rows."""
    return opened._replace(sidecar=_sidecar_in(folder)) if opened.kind == "tokens" else opened


def _sidecar_in(folder: Path) -> Mapping[str, Any] | None:
    for name in SIDECARS:
        if (folder / name).is_file():
            try:
                found = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise DataError(f"cannot read {folder / name}: {_reason(error)}") from error
            if not isinstance(found, Mapping):
                raise DataError(f"{folder / name} does not say how rows were tokenised: remove it, or write them anew")
            return found
    return None


def _sidecar_on_the_hub(source: Source) -> Mapping[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    for name in SIDECARS:
        try:
            file = hf_hub_download(source.path, name, repo_type="dataset", revision=source.revision)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            continue
        return _sidecar_in(Path(file).parent)
    return None


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
