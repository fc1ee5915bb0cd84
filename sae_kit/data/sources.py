"""Where documents come from: files, folders, hub datasets, and dataset objects, as strings to iterate over."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_kit.config import structure_fields
from sae_kit.errors import ConfigError, DataError

log = logging.getLogger(__name__)

COLUMNS = ("text", "content")
"""Names that `column="auto"` looks for."""
TEXT_FILES = (".txt", ".md", ".py")
"""One document a file; `TABLES` hold one a line or row."""
TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
COUNTED_BYTES = 2**30
"""Local tables up to this size are counted, in seconds; a larger one has documents enough for any share."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where text comes from; a bare string stands for its `path`."""

    path: str
    """hub dataset, file or folder (.txt, .md, .py, .json, .jsonl, .parquet); demo = the Python standard library"""
    name: str | None = None
    """subset of a hub dataset"""
    split: str = "train"
    """split of a hub dataset"""
    revision: str | None = None
    """branch, tag or commit of a hub dataset"""
    data_files: str | None = None
    """pattern of the files to read within `path`"""
    column: str = "auto"
    """column that holds the text; auto = the one named text or content"""
    weight: float = 1.0
    """share of the rows, relative to the other sources"""
    epochs: int | None = None
    """passes over the source; None = without end"""
    streaming: bool = True
    """read while training; otherwise download everything first, and shuffle it"""

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ConfigError(f"weight: expected a positive number, found {self.weight}")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"epochs: expected at least 1, or None for no end, found {self.epochs}")

    @classmethod
    def from_dict(cls, data: object, where: str = "") -> "Source":
        """Build from plain data: a bare string is a path."""
        return cls(path=data) if isinstance(data, str) else structure_fields(cls, data, where)


def open_source(source: Source) -> Iterable[Any]:
    """The documents of a source, as a sequence where their number is known.

    Raises:
        DataError: nothing there, nothing readable, or no column of text (the columns are listed).
    """
    if source.path == "demo":
        from sae_kit.demo.corpus import corpus

        return (*corpus().train, *corpus().held_out)
    path = Path(source.path).expanduser()
    if not path.exists():
        return _open_dataset(source, source.path, source.data_files)
    pattern = source.data_files or "**/*"
    files = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
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
    return _Files(files) if builder == "text" else _open_tables(source, builder, files)


def as_documents(documents: Iterable[Any]) -> Iterable[Any]:
    """Documents that were given as an object: strings as they are, a dataset's column of text.

    Raises:
        ConfigError: one string, or a dict (of splits).
        DataError: a dataset that is empty or has no column of text.
    """
    if isinstance(documents, str | bytes | Mapping):
        raise ConfigError(
            f"documents: expected an iterable of strings or one split of a dataset, found {type(documents).__name__}"
        )
    # Both kinds of Dataset: objects of that library are recognised without loading it.
    if hasattr(documents, "column_names") and hasattr(documents, "select_columns"):
        return _text_column(documents, Source(path="the documents"))
    return documents


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


class _Column(Iterable[Any]):
    def __init__(self, dataset: Any, column: str) -> None:
        self._dataset, self._column = dataset, column

    def __iter__(self) -> Iterator[Any]:
        return (example[self._column] for example in self._dataset)


class _CountedColumn(_Column):
    """Of known length, but read in order only."""

    def __init__(self, stream: _Column) -> None:
        super().__init__(stream._dataset, stream._column)
        batches = self._dataset.with_format("arrow").iter(batch_size=1_000)
        self._number = sum(batch.num_rows for batch in batches)

    def __len__(self) -> int:
        return self._number


class _SizedColumn(_Column, Sequence[Any]):
    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index][self._column]


def _open_tables(source: Source, builder: str, files: Sequence[Path]) -> Iterable[Any]:
    sizes = {file: file.stat().st_size for file in files}
    filled = [str(file) for file, size in sizes.items() if size]
    if not filled:
        raise DataError(f"{source.path}: expected text, found {len(files)} empty file{'s' if len(files) > 1 else ''}")
    for file in (file for file, size in sizes.items() if not size):
        log.warning("%s is empty: skipped", file)
    return _open_dataset(source, builder, filled, counted=sum(sizes.values()) <= COUNTED_BYTES)


def _open_dataset(source: Source, path: str, files: str | list[str] | None, counted: bool = False) -> Iterable[Any]:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        dataset = datasets.load_dataset(
            path,
            source.name,
            split=source.split,
            revision=source.revision,
            data_files=files,
            streaming=source.streaming,
        )
        column = _text_column(dataset, source)
        if counted and not isinstance(column, Sequence):
            return _CountedColumn(column)
        return column
    except DataError:
        raise
    except (OSError, ValueError, DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"cannot open dataset {source.path!r}, split {source.split!r}: {reason}") from error


def _text_column(dataset: Any, source: Source) -> _Column:
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"{source.path}: expected text, found no documents")
    columns = list(first)
    names = COLUMNS if source.column == "auto" else (source.column,)
    wanted = [column for column in columns if column in names]
    if len(wanted) != 1:
        asked, found = " or ".join(map(repr, names)), ", ".join(map(repr, columns))
        raise DataError(f"{source.path}: expected one column {asked}, found columns {found}; set column")
    column = wanted[0]
    if not isinstance(first[column], str | None):
        raise DataError(f"{source.path}: expected text in column {column!r}, found {type(first[column]).__name__}")
    dataset = dataset.select_columns(wanted)
    return (_SizedColumn if hasattr(dataset, "__len__") else _Column)(dataset, column)
