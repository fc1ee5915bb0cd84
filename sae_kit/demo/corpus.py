"""The demo's text: the source of the Python standard library, which every interpreter carries.

Nothing is downloaded. Near-copies (the `encodings` tables, vendored test data) would put the same lines on
both sides of the held-out split and make any loss look better than it is, so a document most of whose
lines were already seen is left out.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sae_kit.data.holdout import default_share, is_held_out

SHORTEST_DOCUMENT = 200  # characters; shorter files are empty packages
SHORTEST_LINE = 12  # characters; shorter lines (`else:`, `return x`) say nothing about copying
MOST_SEEN = 0.5  # a document is a near-copy when more than this share of its lines was seen before
LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})


class Corpus(NamedTuple):
    """Source files as strings; `held_out` is chosen by content (`sae_kit.data.holdout`)."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@functools.cache
def corpus() -> Corpus:
    """The standard library of this interpreter: about 1,500 documents, 20-30 MB where its tests are installed."""
    documents = tuple(without_near_copies(_read_sources(Path(sysconfig.get_path("stdlib")))))
    share = default_share(len(documents))
    held_out = tuple(text for text in documents if is_held_out(text, share))
    train = tuple(text for text in documents if not is_held_out(text, share))
    return Corpus(train, held_out)


def without_near_copies(documents: Iterable[str]) -> Iterator[str]:
    """Yield the documents in order, without those that mostly repeat lines of earlier ones."""
    seen: set[str] = set()
    for text in documents:
        lines = [line for raw in text.splitlines() if len(line := raw.strip()) >= SHORTEST_LINE]
        repeated = sum(line in seen for line in lines)
        seen.update(lines)
        if repeated <= MOST_SEEN * len(lines):
            yield text


def _read_sources(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(folder).parts):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):  # the tests of codecs hold files that are wrong on purpose
                continue
            if len(text) >= SHORTEST_DOCUMENT:
                yield text
