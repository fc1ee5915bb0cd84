"""Files and folders that are there whole or not at all.

What is written has a temporary name beside its own until the disk has all of it. A crash at any moment leaves what was
there before and perhaps something of a temporary name, which `remove_leftovers` deletes.
"""

import json
import os
import re
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = re.compile(r"\.(.+)\.tmp-\d+-[0-9a-f]{8}")


def temporary(path: Path) -> Path:
    """A name beside `path` that nothing else has."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


@contextmanager
def new_file(path: Path) -> Generator[BinaryIO, None, None]:
    """A file that gets its name when the block ends well and the disk has all of it, and vanishes otherwise."""
    new = temporary(path)
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync(path.parent)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Generator[Path, None, None]:
    """A folder that gets its name when the block ends well and the disk has all of it, and vanishes otherwise.

    A folder that has the name already makes room just before, and is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new, old = temporary(path), temporary(path)
    new.mkdir()
    try:
        yield new
        for inner in new.rglob("*"):
            sync(inner)
        sync(new)
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
        sync(path.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8."""
    with new_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, tree: object) -> None:
    """Write JSON; numbers that are not finite are refused."""
    write_text(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")


def remove_folder(path: Path) -> None:
    """Delete a folder that is never seen in part: it loses its name first."""
    doomed = temporary(path)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def is_leftover(path: Path, of: re.Pattern[str]) -> bool:
    """Whether `path` has the temporary name of something whose name is one of these."""
    found = TEMPORARY.fullmatch(path.name)
    return found is not None and of.fullmatch(found[1]) is not None


def remove_leftovers(folder: Path, of: re.Pattern[str]) -> None:
    """Delete what writers and deleters of these names left in `folder` when they were killed.

    For the one who writes there: what another is writing would go as well.
    """
    for path in folder.iterdir():
        if is_leftover(path, of):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)  # the next one tries again
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
