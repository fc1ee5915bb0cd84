"""Which rows are these? A tree of JSON values that is saved with whatever is made from rows, and compared on use.

What changes with the machine but not the rows is left out of the comparison: versions, and the names of a tokenizer
whose content is the same.
"""

import hashlib
import importlib.metadata
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_kit import config as trees
from sae_kit._version import __version__
from sae_kit.data.documents import content, kind_of, normal
from sae_kit.errors import ConfigError

NOT_COMPARED = re.compile(r"(^|\.)(versions\..*|tokenizer\.(name|revision))$")
SAMPLES = 8  # documents of a sequence that its fingerprint is made from
SAELENS_KEYS = {
    "context_size": "context_size",
    "begin_batch_token": "row_start",
    "begin_sequence_token": "doc_start",
    "sequence_separator_token": "separator",
    "disable_concat_sequences": "pack",
}
"""keys of `sae_lens.json` and ours; the last is the opposite of the other"""
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets")

log = logging.getLogger(__name__)


def check_provenance(
    expected: Mapping[str, Any], found: Mapping[str, Any], what: str, *, only: Sequence[str] = ()
) -> None:
    """Compare what a config asks for with what something was made from; `what` names that thing.

    `only` limits the comparison to some branches of the trees, such as `("tokenizer", "packing")`.

    Raises:
        ConfigError: they differ; every differing key is named with both values.
    """
    wanted, there = dict(trees.leaves(expected)), dict(trees.leaves(found))
    keys = [key for key in dict.fromkeys((*wanted, *there)) if not NOT_COMPARED.search(key)]
    differing = [
        f"{key}: expected {wanted.get(key)!r}, found {there.get(key)!r}"
        for key in keys
        if wanted.get(key) != there.get(key) and (not only or _within(key, only))
    ]
    if differing:
        raise ConfigError(f"{what} was made with other settings: {'; '.join(differing)}")


def check_sidecar(sidecar: Mapping[str, Any], wanted: Mapping[str, Any], tokenizer: Any, name: str) -> None:
    """Compare how the rows of `name` were tokenised, by this library or by SAELens, with the provenance wanted of them.

    Raises:
        ConfigError: they differ; every differing key is named with both values.
    """
    what, only = f"the token rows of {name}", ("tokenizer", "packing")
    if "provenance" in sidecar:
        return check_provenance(wanted, sidecar["provenance"], what, only=only)
    asked = {"packing": {key: wanted["packing"][key] for key in SAELENS_KEYS.values()}}
    found: dict[str, Any] = {ours: sidecar.get(theirs) for theirs, ours in SAELENS_KEYS.items()}
    for mark in ("row_start", "separator", "doc_start"):
        if isinstance(found[mark], str):
            found[mark] = getattr(tokenizer, f"{found[mark]}_token_id", None)
    found["pack"] = not found["pack"]
    check_provenance(asked, {"packing": found}, what)
    _check_tokenizer(sidecar.get("tokenizer_name"), tokenizer, what)


def _check_tokenizer(name: str | None, tokenizer: Any, what: str) -> None:
    """Compare vocabularies, where the name is not the same and the other tokenizer can be had."""
    own = str(getattr(tokenizer, "name_or_path", ""))
    if name is None or name.rstrip("/").split("/")[-1] == own.rstrip("/").split("/")[-1]:
        return
    from transformers import AutoTokenizer

    try:
        other = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError):
        log.warning("%s were made by the tokenizer %s, which cannot be compared with %s", what, name, own or "this one")
        return
    if other.get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"{what} was made with other settings: tokenizer: expected {own!r}, found {name!r}")


def versions() -> dict[str, str | None]:
    """Versions of what reads and tokenises."""
    found: dict[str, str | None] = {"sae_kit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def fingerprint(items: Any) -> str | None:
    """16 hex digits of the length of a sequence and of some of its documents; None for what can only be iterated over.

    It is the same on every machine, unlike times and places of files.
    """
    if not isinstance(items, Sequence):
        return None
    number = len(items)
    places = sorted({i * (number - 1) // max(SAMPLES - 1, 1) for i in range(SAMPLES)}) if number else []
    return digest([str(number), *(_said(items[place]) for place in places)])


def fingerprint_of_files(files: Iterable[Path], root: Path) -> str:
    """16 hex digits of the names and sizes of files."""
    return digest([f"{file.relative_to(root).as_posix()} {file.stat().st_size}" for file in files])


def digest(parts: Iterable[str | bytes]) -> str:
    """16 hex digits that say whether two lists of texts are equal."""
    hashed = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.hexdigest()[:16]


def _said(item: Any) -> str | bytes:
    kind = kind_of(item)
    try:
        return content(normal(item, kind)) if kind else ""
    except ValueError:
        return ""  # it is refused with a better message when it is read


def _within(key: str, branches: Sequence[str]) -> bool:
    return any(key == branch or key.startswith((f"{branch}.", f"{branch}[")) for branch in branches)
