"""The folders of checkpoints: what is in them, how they are written and read, and which of them stay.

    run folder/
      latest.json                     the checkpoint written last; for people and scripts, the reader looks for itself
      checkpoints/000104857600/       rows trained on, 12 digits
        saes/NAME/                    an SAE as it is trained; `SAE.load_from_disk` opens it, and it is right
        state.json + .safetensors     everything else that training goes on from
        buffer.json + .safetensors    rows of the shuffle buffer, in the newest checkpoints only
        run.json                      config tree, software and hardware
        MANIFEST.json                 size and SHA-256 of every file

The folder is written under a temporary name, brought to the disk and renamed. Without a manifest that fits its files
it does not exist for the reader. Only the trainer writes here, one at a time; anyone may read.
"""

import contextlib
import errno
import hashlib
import logging
import platform
import re
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError

from sae_kit import config as trees
from sae_kit._version import __version__
from sae_kit.atomic import new_folder, remove_folder, remove_leftovers, write_json
from sae_kit.data.batch import State
from sae_kit.errors import CorruptFileError, DiskFullError, FormatTooNewError
from sae_kit.sae import SAE
from sae_kit.states import join_state, read_state, split_state, write_state

log = logging.getLogger(__name__)

FORMAT = 1
CHECKPOINTS, LATEST, MANIFEST, RUN, SAES = "checkpoints", "latest.json", "MANIFEST.json", "run.json", "saes"
NAME = re.compile(r"\d{12,}")
BUFFER = ("buffer.json", "buffer.safetensors")
OVERHEAD = 1 << 20
"""bytes that a checkpoint may take beside its tensors: configs, headers, ends of blocks"""


# ---- what is in a folder ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of a checkpoint."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files of a checkpoint, and its place among the others."""

    format: int
    number: int
    """checkpoints are counted as they are written: a run that was set back writes fewer rows after more"""
    milestone: bool
    """it stays for good"""
    files: dict[str, FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds; tensors and SAEs are on the CPU."""

    path: Path
    tokens: int
    saes: dict[str, SAE]
    """in the order in which they were trained"""
    state: State
    buffer: State | None
    """None = it was not saved, or is no longer kept"""
    run: dict[str, Any]


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_checkpoint(
    root: Path,
    *,
    saes: Mapping[str, SAE],
    state: State,
    run: Mapping[str, Any],
    tokens: int,
    buffer: State | None = None,
    milestone: bool = False,
    keep: int = 2,
    best: int | None = None,
    label: str = "",
) -> Path:
    """Write the checkpoint of a run after `tokens` rows, then delete those that need not stay.

    `root` is the folder of the run. `run` is what to say about it beside `environment()`: the config tree and the step.
    `buffer` is the part of the state that only the `keep` newest checkpoints hold. Those at `milestone`s and the one
    at `best` rows stay, too. One with a `label` has it before its name: it is no part of the rolling set, and nothing
    goes on from it by itself. A checkpoint of as many rows is replaced.

    Raises:
        DiskFullError: no room. SAEKitError: an SAE holds values that are not finite. ValueError: a state or a name
        that cannot be written. OSError: the folder cannot be written. The checkpoints of before are as they were.
    """
    about, tensors = split_state({**run, "tokens": tokens, "saes": list(saes), "environment": environment()})
    if tensors:
        raise ValueError(f"run: expected JSON values, found tensors at {', '.join(tensors)}; they belong to the state")
    if wrong := [name for name in saes if name != PurePosixPath(name).name or name in ("", "..") or "\\" in name]:
        raise ValueError(f"the SAE {wrong[0]!r}: expected the name of one folder")
    folder = root / CHECKPOINTS
    path = folder / (f"{label}-{tokens:012d}" if label else f"{tokens:012d}")
    parts = {"state": state} | ({} if buffer is None else {"buffer": buffer})
    needed = OVERHEAD + sum(map(_bytes, (*parts.values(), *(sae.state_dict() for sae in saes.values()))))
    with _room(folder, needed, tokens):
        folder.mkdir(parents=True, exist_ok=True)
        _clean(root)
        number = max((before for before, _ in _in_order(folder)), default=0) + 1
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(errno.ENOSPC, f"{free:,} bytes are free")
        with new_folder(path) as new:
            files = _write_parts(new, saes, parts, about)
            manifest = Manifest(format=FORMAT, number=number, milestone=milestone, files=files)
            write_json(new / MANIFEST, trees.unstructure(manifest))
    if not label:
        try:  # the checkpoint is there, whatever becomes of this
            write_json(root / LATEST, {"checkpoint": f"{CHECKPOINTS}/{path.name}", "tokens": tokens})
            _retain(folder, keep, best)
        except OSError as error:
            log.warning("%s is written, but older checkpoints could not be cleared away: %s", path, error)
    return path


def _write_parts(
    folder: Path, saes: Mapping[str, SAE], parts: Mapping[str, State], about: object
) -> dict[str, FileEntry]:
    """Everything but the manifest, and what it says; states are hashed as they are written."""
    for name, sae in saes.items():
        sae.save_model(folder / SAES / name)
    hashed = [write_state(folder, name, part) for name, part in parts.items()]
    write_json(folder / RUN, about)
    known = {name: FileEntry(bytes=size, sha256=sha) for part in hashed for name, (size, sha) in part.items()}
    written = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
    return {name: known.get(name) or _entry(file) for name, file in written.items()}


@contextmanager
def _room(folder: Path, needed: int, tokens: int) -> Generator[None, None, None]:
    """Say what was needed where the disk is full; safetensors gives the number of the error in words."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if number not in (errno.ENOSPC, errno.EDQUOT):
            raise
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        raise DiskFullError(f"the checkpoint at {tokens:,} rows", there, needed=needed, free=free) from error


def _bytes(state: object) -> int:
    return sum(tensor.nbytes for tensor in split_state(state)[1].values())


def _entry(file: Path) -> FileEntry:
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
    return FileEntry(bytes=file.stat().st_size, sha256=digest.hexdigest())


def _retain(folder: Path, keep: int, best: int | None) -> None:
    """Delete what is neither new, nor a milestone, nor the best; older ones that stay lose their buffer."""
    for _, path in _in_order(folder)[:-keep]:
        manifest = _manifest(path)
        if not manifest.milestone and (best is None or path.name != f"{best:012d}"):
            remove_folder(path)
            continue
        files = {name: entry for name, entry in manifest.files.items() if name not in BUFFER}
        if len(files) < len(manifest.files):
            write_json(path / MANIFEST, trees.unstructure(replace(manifest, files=files)))
        for name in BUFFER:
            (path / name).unlink(missing_ok=True)


def _clean(root: Path) -> None:
    """Delete what a writer left when it was killed."""
    remove_leftovers(root, re.compile(re.escape(LATEST)))
    remove_leftovers(root / CHECKPOINTS, re.compile(rf"(.+-)?{NAME.pattern}"))
    for path in _named(root / CHECKPOINTS):
        remove_leftovers(path, re.compile(re.escape(MANIFEST)))


# ---- reading ---------------------------------------------------------------------------------------------------------


def find_checkpoints(root: Path) -> list[Path]:
    """The checkpoints of the run in `root`, in the order of writing; files have the sizes that they should have."""
    return [path for _, path in _in_order(root / CHECKPOINTS)]


def newest_checkpoint(root: Path, *, verify: bool = True) -> Path | None:
    """The checkpoint of `root` that was written last; damaged ones are passed over with a warning.

    Raises:
        FormatTooNewError: a later version wrote it.
    """
    for path in _named(root / CHECKPOINTS):
        if (problem := damage(path)) is not None:
            log.warning("%s is passed over: %s", path, problem)
    for path in reversed(find_checkpoints(root)):
        if not verify or (problem := damage(path, verify=True)) is None:
            return path
        log.warning("%s is passed over: %s", path, problem)
    return None


def read_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Everything in the checkpoint `path`; `verify=False` trusts files that have the right sizes.

    `newest_checkpoint` has verified the one that it gives.

    Raises:
        FileNotFoundError: there is no checkpoint. CorruptFileError: it is damaged. FormatTooNewError: a later version
        wrote it.
    """
    if not (path / MANIFEST).is_file():
        raise FileNotFoundError(f"no checkpoint in {path}: expected {MANIFEST} and the files that it names")
    if (problem := damage(path, verify=verify)) is not None:
        raise CorruptFileError(f"{path}: {problem}")
    run = join_state(trees.parse_json((path / RUN).read_text(encoding="utf-8")), {})
    return Checkpoint(
        path=path,
        tokens=run["tokens"],
        saes={name: SAE.load_from_disk(path / SAES / name) for name in run["saes"]},
        state=read_state(path, "state"),
        buffer=read_state(path, "buffer") if BUFFER[0] in _manifest(path).files else None,
        run=run,
    )


def damage(path: Path, *, verify: bool = False) -> str | None:
    """What is wrong with the folder of a checkpoint; `verify` reads and hashes every file.

    Raises:
        FormatTooNewError: a later version wrote it.
    """
    try:
        files = _manifest(path).files
    except FileNotFoundError:
        return f"there is no {MANIFEST}: it was not written to the end, or not copied to the end"
    except CorruptFileError as error:
        return str(error)
    for name, entry in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            changed = verify and size == entry.bytes and _entry(file) != entry
        except FileNotFoundError:
            return f"{name} is missing"
        if size != entry.bytes:
            return f"{name} is torn: expected {entry.bytes:,} bytes, found {size:,}"
        if changed:
            return f"{name} does not hold what was written: its hash differs from that in {MANIFEST}"
    return None


def _named(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name) and path.is_dir())


def _in_order(folder: Path) -> list[tuple[int, Path]]:
    """Undamaged checkpoints in the order of writing; a run that was set back may write fewer rows after more."""
    found: list[tuple[int, Path]] = []
    for path in _named(folder):
        if damage(path) is None:
            with contextlib.suppress(FileNotFoundError):  # its time has come while we were looking
                found.append((_manifest(path).number, path))
    return sorted(found)


def _manifest(path: Path) -> Manifest:
    text = (path / MANIFEST).read_text(encoding="utf-8")
    try:
        data = trees.parse_json(text)
        if isinstance(data, dict) and isinstance(found := data.get("format"), int) and found > FORMAT:
            raise FormatTooNewError(f"{path} has format {found}; this sae_kit reads up to {FORMAT}: upgrade it")
        manifest = trees.structure(Manifest, data)
    except FormatTooNewError:
        raise
    except ValueError as error:  # of JSON, or a ConfigError
        raise CorruptFileError(f"{MANIFEST} is not that of a checkpoint: {error}") from error
    if outside := [name for name in manifest.files if PurePosixPath(name).is_absolute() or ".." in name.split("/")]:
        raise CorruptFileError(f"{MANIFEST} names {outside[0]!r}, which is not a file below it")
    return manifest


# ---- what exactness depends on ---------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Software, hardware and settings on which the bits of a run depend."""
    cuda = torch.cuda.is_available()
    return {
        "sae_kit": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "world_size": 1,
    }


def environment_changes(saved: Mapping[str, Any]) -> list[str]:
    """What differs now from the environment in which a checkpoint was written: reasons for other bits."""
    return [
        f"{name}: {saved.get(name)!r} → {value!r}" for name, value in environment().items() if saved.get(name) != value
    ]
