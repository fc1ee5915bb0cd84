"""Text to token rows: documents -> one side of the held-out split -> tokenizer -> exact packing -> mixture.

Each link is a small object that hands out the next item and knows where it stands:

    Documents    the documents of one source, pass after pass
    SourceRows   their rows, cut by a `Packer`
    TokenStream  the rows of all sources, in exact shares

Nothing is thrown away but the last row of a stream that ends, and no row depends on how many documents are
tokenised at a time.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from sae_kit.data.batch import TokenBatch
from sae_kit.data.holdout import default_share, is_held_out
from sae_kit.data.packing import Packer
from sae_kit.data.sources import Source, as_documents, open_source
from sae_kit.errors import ConfigError, DataError
from sae_kit.seeding import generator

log = logging.getLogger(__name__)

TokenName = Literal["bos", "eos", "sep"]
STRUCTURAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
MOST_CHARACTERS = 1_000_000  # per call of the tokenizer: its encodings take about 100 bytes a token


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text that the language model reads, and how it is cut into rows."""

    sources: tuple[Source, ...] = ()
    """where the text comes from; several are mixed by weight"""
    context_size: int | None = None
    """ids per row; None = the model's maximum, at most 1,024"""
    row_start: TokenName | int | None = "bos"
    """id that begins each row"""
    separator: TokenName | int | None = "bos"
    """id between two documents of a row"""
    doc_start: TokenName | int | None = None
    """id that begins each document"""
    exclude: Literal["structural", "none"] | tuple[int, ...] = "structural"
    """ids that are read but not trained on; structural = BOS, EOS, PAD, SEP and decoder-start"""
    holdout: float | None = None
    """share of documents kept for evaluation; None = chosen by the number of documents"""
    shuffle: bool = True
    """read sources of known length in a new random order at each pass"""
    rows_per_forward: int | None = None
    """rows per forward of the language model; None = as many as make 16,384 tokens"""
    tokenize_batch: int = 1000
    """documents tokenised at a time"""

    def __post_init__(self) -> None:
        if self.context_size is not None and self.context_size < 2:
            raise ConfigError(f"context_size: expected at least 2, found {self.context_size}")
        if self.holdout is not None and not 0 <= self.holdout < 1:
            raise ConfigError(f"holdout: expected a share from 0 to below 1, found {self.holdout}")
        for name in ("rows_per_forward", "tokenize_batch"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}: expected at least 1, found {value}")


class Documents:
    """The non-empty documents of one source on one side of the held-out split, pass after pass.

    `items` are strings or None, and are read again at each pass; an iterator allows one pass only. A sequence is read
    in a new random order each time (`seed=None`: as it is).
    """

    def __init__(
        self,
        items: Iterable[Any],
        *,
        name: str = "the documents",
        held_out: bool = False,
        share: float = 0.0,
        epochs: int | None = None,
        seed: int | None = None,
    ) -> None:
        self.name, self.held_out, self.share = name, held_out, share
        self.epochs = 1 if isinstance(items, Iterator) else epochs
        self.passes = 0
        """passes that are complete"""
        self.skipped = 0
        """documents that were None or empty"""
        self._items, self._seed = items, seed
        self._current: Iterator[Any] | None = None
        self._read = self._given = 0  # in this pass

    def batch(self, size: int) -> list[str]:
        """The next documents: `size`, or fewer at the end of a pass or of a megabyte; none when the last pass is over.

        Raises:
            DataError: something that is not text, or a pass without a single document.
        """
        if self._current is None:
            if self.passes == self.epochs:
                return []
            if self.passes:
                log.info("%s: pass %d over its %d documents begins", self.name, self.passes + 1, self._given)
            self._current, self._read, self._given = self._in_order(), 0, 0
        texts: list[str] = []
        characters = 0
        for item in self._current:
            self._read += 1
            if item is not None and not isinstance(item, str):
                raise DataError(f"{self.name}: expected text, found {type(item).__name__} in document {self._read}")
            if not item:
                self.skipped += 1
            elif is_held_out(item, self.share) == self.held_out:
                texts.append(item)
                characters += len(item)
                if len(texts) == size or characters >= MOST_CHARACTERS:
                    break
        else:
            self._current = None
            self.passes += 1
            if self._given + len(texts) == 0:
                raise DataError(self._why_none())
        self._given += len(texts)
        return texts or self.batch(size)

    def _in_order(self) -> Iterator[Any]:
        if self._seed is None or not isinstance(self._items, Sequence):
            return iter(self._items)
        purpose = "eval" if self.held_out else "shards"
        order = torch.randperm(len(self._items), generator=generator(self._seed, purpose, self.name, self.passes))
        return (self._items[i] for i in order.tolist())

    def _why_none(self) -> str:
        found = f"{self._read} documents, {self.skipped} of them empty"
        if self.skipped == self._read:
            return f"{self.name}: expected text, found {found}"
        if not self.held_out:
            return (
                f"{self.name}: {found}, and none is left to train on at a share of {self.share}; give more documents, "
                "or hold none out: data.holdout=0 and eval.at_end=false"
            )
        if self._read - self.skipped == 1:
            advice = "; one document cannot be split: give more documents, or set eval.at_end=false"
        elif self.share:
            advice = (
                ": the corpus has too few documents for that; give more documents, set a larger data.holdout, "
                "or set eval.at_end=false"
            )
        else:
            advice = "; set a larger data.holdout, or eval.at_end=false"
        return f"{self.name}: {found}, and none is held out at a share of {self.share}{advice}"


class SourceRows(Iterator[list[int]]):
    """The token rows of one source."""

    def __init__(self, documents: Documents, tokenizer: Any, packer: Packer, tokenize_batch: int = 1000) -> None:
        self.documents, self.packer = documents, packer
        self._tokenizer, self._size = tokenizer, tokenize_batch
        self._ready: deque[list[int]] = deque()
        self._any = False

    def __next__(self) -> list[int]:
        while not self._ready:
            texts = self.documents.batch(self._size)
            for ids in self._tokenize(texts):
                self._ready.extend(self.packer.add(ids))
            self._any = self._any or bool(self._ready)
            if self.documents.passes and not self._any:
                held_out = self.documents.held_out
                raise DataError(
                    f"{self.documents.name}: all its {'held-out ' if held_out else ''}text fills "
                    f"{len(self.packer.row)} of the {self.packer.context_size} places of one row; give more text, "
                    f"{'a larger data.holdout ' if held_out else ''}or a smaller data.context_size"
                )
            if not texts:
                raise StopIteration
        return self._ready.popleft()

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:  # some tokenizers refuse an empty list
            return []
        return self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


class TokenStream(Iterator[list[int]]):
    """Rows of several sources, in shares of `weights` that are exact to one row at every moment.

    The next row comes from the source that is furthest behind its share. A source that ends leaves its share to the
    rest.
    """

    def __init__(self, sources: Sequence[SourceRows], weights: Sequence[float] | None = None) -> None:
        if not sources:
            raise ConfigError("data.sources: expected at least one source, found none")
        self.sources = tuple(sources)
        self.context_size = sources[0].packer.context_size
        self.rows = 0
        """rows handed out"""
        self._weights = dict(enumerate(weights or [1.0] * len(sources)))
        self._given = dict.fromkeys(self._weights, 0)

    @property
    def holdout(self) -> tuple[float, ...]:
        """Share of its documents that each source keeps for evaluation."""
        return tuple(source.documents.share for source in self.sources)

    @property
    def skipped_documents(self) -> int:
        """Documents met that were None or empty, in every pass anew."""
        return sum(source.documents.skipped for source in self.sources)

    @property
    def passes(self) -> int:
        """Passes that every source which has not ended is through with."""
        return min((self.sources[i].documents.passes for i in self._weights), default=0)

    @classmethod
    def from_config(
        cls,
        cfg: DataConfig,
        tokenizer: Any,
        *,
        context_size: int | None = None,
        documents: Iterable[Any] | None = None,
        held_out: bool = False,
        seed: int = 0,
    ) -> "TokenStream":
        """Open the sources of `cfg`, or `documents` in their place; `context_size` stands in where `cfg` has none.

        `documents` are strings, or one split of a `datasets` dataset with a column text or content.

        Raises:
            ConfigError: no source, no size of rows, or an id that is not in the vocabulary.
            DataError: a source that cannot be opened, is empty, or has no column of text.
        """
        size = cfg.context_size or context_size
        if size is None:
            raise ConfigError("data.context_size: expected a number of ids per row, found None")
        marks = {
            mark: special_id(getattr(cfg, mark), tokenizer, mark) for mark in ("row_start", "separator", "doc_start")
        }
        if documents is None:
            opened = [(source, open_source(source)) for source in cfg.sources]
        elif cfg.sources:
            raise ConfigError("expected either data.sources or documents, found both")
        else:
            opened = [(Source(path="the documents"), as_documents(documents))]
        sources = []
        for source, items in opened:
            share = cfg.holdout
            if share is None:
                known = len(items) if isinstance(items, Sized) else None
                share = default_share(known, streaming=source.streaming and documents is None)
            texts = Documents(
                items,
                name=source.path,
                held_out=held_out,
                share=share,
                epochs=1 if held_out else source.epochs,
                seed=seed if cfg.shuffle else None,
            )
            sources.append(SourceRows(texts, tokenizer, Packer(size, **marks), cfg.tokenize_batch))
        return cls(sources, [source.weight for source, _ in opened])

    def __next__(self) -> list[int]:
        while self._weights:
            total, drawn = sum(self._weights.values()), sum(self._given.values()) + 1
            behind = {i: weight / total * drawn - self._given[i] for i, weight in self._weights.items()}
            index = max(behind, key=behind.__getitem__)
            try:
                row = next(self.sources[index])
            except StopIteration:
                del self._weights[index]
                self._given = dict.fromkeys(self._weights, 0)
                continue
            self._given[index] += 1
            self.rows += 1
            return row
        raise StopIteration

    def take(self, number: int) -> TokenBatch:
        """The next `number` rows; fewer at the end of the stream, and then none."""
        rows = [row for _, row in zip(range(number), self, strict=False)]
        return TokenBatch(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.context_size))


def held_out_rows(
    cfg: DataConfig,
    tokenizer: Any,
    number: int,
    *,
    context_size: int | None = None,
    documents: Iterable[Any] | None = None,
    seed: int = 0,
) -> Int[Tensor, "rows context"]:
    """`number` rows of the documents that training never sees; fewer, with a warning, if there is not enough text."""
    stream = TokenStream.from_config(
        cfg, tokenizer, context_size=context_size, documents=documents, held_out=True, seed=seed
    )
    rows = stream.take(number).ids
    if len(rows) < number:
        log.warning("the held-out text gives %d of %d rows asked for; raise data.holdout for more", len(rows), number)
    return rows


def excluded_ids(exclude: str | Iterable[int], tokenizer: Any) -> tuple[int, ...]:
    """Ids that are not trained on, sorted: those given, none, or the structural ones of the tokenizer."""
    if exclude == "none":
        return ()
    if exclude == "structural":
        ids = (getattr(tokenizer, name, None) for name in STRUCTURAL)
        return tuple(sorted({i for i in ids if i is not None}))
    return tuple(sorted({int(i) for i in exclude}))


def special_id(option: str | int | None, tokenizer: Any, name: str) -> int | None:
    """The id that an option such as `row_start` stands for; None, with a warning, if the tokenizer has no such one.

    Raises:
        ConfigError: an id that is not in the vocabulary.
    """
    if option is None:
        return None
    if isinstance(option, int):
        if not 0 <= option < len(tokenizer):
            raise ConfigError(f"data.{name}: expected an id from 0 to {len(tokenizer) - 1}, found {option}")
        return option
    found = getattr(tokenizer, f"{option}_token_id", None)
    if found is None:
        log.warning("the tokenizer has no %s token: data.%s is off", option.upper(), name)
    return found
