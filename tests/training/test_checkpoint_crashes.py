"""A full disk and kill -9 while a checkpoint is written: those before stay, and nothing is left that is not whole."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, names, small, write

from sae_kit import atomic
from sae_kit.errors import DiskFullError
from sae_kit.training.checkpoint import find_checkpoints, newest_checkpoint, read_checkpoint

TESTS = Path(__file__).resolve().parents[1]


def child(script: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 10)
    before = contents(tmp_path)
    usage = type(shutil.disk_usage(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 10**12 - 5_000, 5_000))
    with pytest.raises(DiskFullError) as caught:
        write(tmp_path, 20, buffer={"rows": torch.zeros(10**6)})
    error = caught.value
    assert isinstance(error, OSError)
    assert (error.errno, error.free) == (errno.ENOSPC, 5_000)
    assert 4 * 10**6 < error.needed < 8 * 10**6
    assert str(error) == (
        f"no room for the checkpoint at 20 rows in {tmp_path / 'checkpoints'}: it needs {error.needed:,} bytes, and "
        "5,000 are free"
    )
    assert contents(tmp_path) == before
    monkeypatch.undo()
    write(tmp_path, 20)
    assert names(tmp_path) == [10, 20]


def test_what_is_needed_is_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"saes": {"a": small(), "b": small(1)}, "state": {"moments": torch.zeros(300, 1000)}}
    written = sum(map(len, contents(write(tmp_path, 10, **given)).values()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(DiskFullError) as caught:
        write(tmp_path, 20, **given)
    assert written <= caught.value.needed <= written + 2**20


class Full:
    """Something of the system that finds the disk full from its n-th call on."""

    def __init__(self, real: Callable[..., Any], at: int) -> None:
        self.real, self.left = real, at

    def __call__(self, *arguments: Any) -> Any:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.left -= 1
        return self.real(*arguments)


@pytest.mark.parametrize(("call", "moments"), [("fsync", 15), ("replace", 5)])
def test_a_disk_that_is_full_at_any_moment_costs_nothing_but_the_checkpoint(
    call: str, moments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 10)
    write(tmp_path, 20)
    real, lost, afterwards, tokens = getattr(os, call), 0, 0, 29
    while True:
        tokens += 1
        before = contents(tmp_path)
        caplog.clear()
        monkeypatch.setattr(os, call, Full(real, tokens - 30))
        error = failure(lambda tokens=tokens: write(tmp_path, tokens))
        monkeypatch.undo()
        if tokens not in names(tmp_path):
            assert isinstance(error, DiskFullError)
            assert contents(tmp_path) == before
            lost += 1
        elif error is not None or "is written, but" in caplog.text:
            assert read_checkpoint(tmp_path / "checkpoints" / f"{tokens:012d}").state == {"tokens": tokens}
            afterwards += 1
        else:
            break
    assert lost >= moments
    assert afterwards >= 2, "what fails after the checkpoint does not take it back"
    assert names(tmp_path) == [tokens - 1, tokens]
    assert not [path for path in tmp_path.rglob("*") if atomic.TEMPORARY.fullmatch(path.name)]


def failure(action: Callable[[], object]) -> Exception | None:
    try:
        action()
    except Exception as error:
        return error
    return None


FULL = """
import pathlib, shutil, subprocess, sys
import torch
from checkpoints import contents, names, small, write
from sae_kit import TopKSAEConfig
from sae_kit.errors import DiskFullError

root = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", root], check=True)
write(root, 10)
before = contents(root)
usage = shutil.disk_usage
shutil.disk_usage = lambda path: usage(path)._replace(free=10**12)
for given in ({"state": {"x": torch.zeros(10**6)}}, {"saes": {"wide": TopKSAEConfig(d_in=64, d_sae=8192).build()}}):
    try:
        write(root, 20, **given)
    except DiskFullError as error:
        print(error.needed, type(error.__cause__).__name__)
    assert contents(root) == before
write(root, 20)
print(names(root))
"""


def mounts() -> bool:
    """Whether this machine lets a process have a file system of its own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not mounts(), reason="needs a small file system of its own, which this machine does not allow")
def test_a_file_system_that_is_really_full(tmp_path: Path) -> None:
    done = child(FULL, tmp_path, before=("unshare", "-Urm"))
    assert done.returncode == 0, done.stderr
    first, second, last = done.stdout.splitlines()
    assert int(first.split()[0]) >= 4 * 10**6
    assert first.split()[1] == "OSError"
    assert int(second.split()[0]) >= 2 * 64 * 8192 * 4
    assert second.split()[1] in ("OSError", "SafetensorError")
    assert last == "[10, 20]"


def test_other_errors_of_the_system_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(FileExistsError):
        write(tmp_path, 10)


def test_what_a_kill_while_clearing_away_left_goes_with_the_next_checkpoint(tmp_path: Path) -> None:
    milestone = write(tmp_path, 10, milestone=True, buffer={"rows": torch.ones(3)})
    for name in ("buffer.json", "buffer.safetensors"):
        shutil.copy(milestone / name, tmp_path / name)
    for tokens in (20, 30):
        write(tmp_path, tokens)
    before = contents(tmp_path / "checkpoints")
    for name in ("buffer.json", "buffer.safetensors"):
        shutil.move(tmp_path / name, milestone / name)
    (milestone / ".MANIFEST.json.tmp-1-00000000").write_text("{")
    (tmp_path / ".latest.json.tmp-1-00000000").write_text("{")
    (tmp_path / "checkpoints" / ".000000000005.tmp-1-00000000").mkdir()
    (tmp_path / "checkpoints" / ".nonfinite-000000000005.tmp-1-00000000").mkdir()
    (tmp_path / ".gitignore").write_text("")
    write(tmp_path, 30)
    assert contents(tmp_path / "checkpoints").keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".gitignore", "checkpoints", "latest.json"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


# ---- kill -9 ---------------------------------------------------------------------------------------------------------

KILLS = """
import mmap, os, pathlib, random, signal, sys, time
import torch
from checkpoints import names, small, write
from helpers import inputs
from sae_kit import SAE
from sae_kit.atomic import TEMPORARY
from sae_kit.training.checkpoint import newest_checkpoint, read_checkpoint

root, wanted = pathlib.Path(sys.argv[1]), int(sys.argv[2])
EVERY = 10
done = mmap.mmap(-1, 8)  # rows at the last checkpoint that a writer has finished

def train():
    found = newest_checkpoint(root)
    tokens = 0 if found is None else read_checkpoint(found).tokens
    while True:
        done[:] = tokens.to_bytes(8, "little")
        tokens += EVERY
        write(root, tokens, buffer={"rows": torch.full((50, 8), float(tokens))}, milestone=tokens % 70 == 0)

def check():
    finished, found = int.from_bytes(done[:], "little"), newest_checkpoint(root)
    if found is None:
        assert finished == 0, "a checkpoint is gone"
        return 0
    read = read_checkpoint(found)
    assert finished <= read.tokens <= finished + EVERY, (finished, read.tokens)
    expected = small(read.tokens)
    x = inputs(expected, 8)
    for sae in (read.saes["sae"], SAE.load_from_disk(found / "saes" / "sae")):
        assert torch.equal(sae(x), expected(x))
    assert read.state == {"tokens": read.tokens}
    assert torch.equal(read.buffer["rows"], torch.full((50, 8), float(read.tokens)))
    return read.tokens

moments, longest, kills, halves, reached = random.Random(0), 0.05, 0, 0, 0
while kills < wanted or halves < wanted // 4 or reached < 5 * EVERY:
    if not (child := os.fork()):
        try:
            train()
        finally:
            os._exit(1)
    time.sleep(moments.uniform(0.001, longest))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    kills += 1
    halves += any(TEMPORARY.fullmatch(path.name) for path in root.glob("checkpoints/.*"))
    progress = check()
    if progress == reached:
        longest *= 1.1  # a busy machine needs more time for a checkpoint
    reached = progress
write(root, reached + EVERY)
assert [tokens for tokens in names(root)[:-2] if tokens % 70] == []
assert not [path for path in root.rglob("*") if TEMPORARY.fullmatch(path.name)]
print(kills, halves, reached)
"""


def test_killed_at_any_moment_the_newest_checkpoint_opens_and_is_right(tmp_path: Path) -> None:
    done = child(KILLS, tmp_path, 20)
    assert done.returncode == 0, done.stderr
    kills, halves, reached = map(int, done.stdout.split())
    assert kills >= 20
    assert halves >= 5, "killed between checkpoints only"
    assert reached >= 50, "killed before anything was written"
    assert all(read_checkpoint(path).tokens == int(path.name) for path in find_checkpoints(tmp_path))
    assert newest_checkpoint(tmp_path) is not None
