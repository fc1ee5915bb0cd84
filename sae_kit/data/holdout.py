"""Which documents are held out: a rule on their content alone.

A document is held out iff ``blake2b(content) mod 10,000 < share * 10,000``. The rule needs no list and no
state, so it does not depend on order, process, epoch or resume; exact duplicates fall on one side; and a
larger share contains every smaller one.
"""

from __future__ import annotations

import hashlib

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
"""The shares that a run may choose by itself, smallest first."""

WANTED_DOCUMENTS = 2_000
"""A held-out set of this many documents is large enough: no share beyond it is needed."""


def default_share(documents: int | None, *, streaming: bool = False) -> float:
    """Smallest share in `SHARES` that holds out 2,000 of `documents`; the largest if none does.

    A stream of unknown length (`streaming=True`) is taken to be long: the smallest share.
    """
    if streaming and documents is None:
        return SHARES[0]
    if documents is None:
        return SHARES[-1]
    return next((share for share in SHARES if share * documents >= WANTED_DOCUMENTS), SHARES[-1])


def is_held_out(content: str | bytes, share: float) -> bool:
    """Whether the document of this content belongs to the held-out share (a fraction of all documents)."""
    if share == 0:
        return False
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return int.from_bytes(digest, "big") % 10_000 < share * 10_000
