"""A cache holds exactly what was asked for, whatever happens while it is written."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harvests import SPECIAL, RandomHarvest, all_rows

from sae_kit.data.cache import CacheConfig, PushConfig, open_cache, read_manifest, write_cache
from sae_kit.data.cache.files import read_state, write_manifest
from sae_kit.errors import (
    ConfigError,
    CorruptFileError,
    DataError,
    FormatTooNewError,
    OutputExistsError,
)

TESTS = Path(__file__).parent.parent


def contents(folder: Path) -> dict[str, Any]:
    """Hashes of all files, and the manifest without its time stamp."""
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.suffix != ".json"
    }
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["created"]
    return found | {"manifest": manifest}


def written(folder: Path, **options: Any) -> Path:
    settings: dict[str, Any] = {"tokens": 500, "dtype": "float32", "rows_per_shard": 90, **options}
    write_cache(RandomHarvest(), folder, **settings)
    return folder


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
def test_what_was_harvested_is_stored_in_the_order_of_the_text(tmp_path: Path, padded: bool) -> None:
    manifest = write_cache(RandomHarvest(padded=padded), tmp_path, tokens=500, dtype="float32", rows_per_shard=90)
    assert (manifest.rows, manifest.complete, manifest.context_size) == (500, True, 8)
    assert [shard.file for shard in manifest.shards[:2]] == ["r00-000000.safetensors", "r00-000001.safetensors"]
    assert all(90 <= shard.rows < 90 + 32 for shard in manifest.shards[:-1])
    harvest, rows = RandomHarvest(padded=padded), 0
    # Shards end where a forward does, so forwards of 4 contexts come back one by one.
    for found, forward in zip(open_cache(tmp_path).contexts(4), harvest, strict=False):
        last = len(forward.kept) - max(0, rows + len(forward.kept) - 500)
        contexts = len(found.tokens)
        assert contexts == 4 or (rows + last == 500 and contexts == int(forward.kept[last - 1]) // 8 + 1)
        assert torch.equal(found.tokens.ids, forward.tokens.ids[:contexts])
        if padded:
            assert found.tokens.lengths is not None
            assert forward.tokens.lengths is not None
            assert torch.equal(found.tokens.lengths, forward.tokens.lengths[:contexts])
        else:
            assert found.tokens.lengths is None
        assert torch.equal(found.kept, forward.kept[:last])
        for site in ("a", "b"):
            assert torch.equal(found.rows[site], forward.rows[site][:last])
        rows += last
    assert rows == 500


@pytest.mark.parametrize("tokens", [1, 27, 28, 29, 90, 499])
def test_asked_is_stored(tmp_path: Path, tokens: int) -> None:
    assert write_cache(RandomHarvest(), tmp_path, tokens=tokens, rows_per_shard=28).rows == tokens
    assert open_cache(tmp_path).rows == tokens


def test_ids_stay_integers(tmp_path: Path) -> None:
    """In bfloat16 the ids 299, 300 and 301 are one number."""
    written(tmp_path, dtype="bf16")
    assert torch.tensor(SPECIAL + 1).bfloat16() == torch.tensor(SPECIAL).bfloat16()
    for found, forward in zip(open_cache(tmp_path).contexts(4), RandomHarvest(), strict=False):
        assert torch.equal(found.tokens.ids, forward.tokens.ids[: len(found.tokens)])
        assert not (found.tokens.ids.flatten()[found.kept] == SPECIAL).any()


def test_the_manifest_says_what_there_is(tmp_path: Path) -> None:
    written(tmp_path, dtype="int8")
    data = json.loads((tmp_path / "manifest.json").read_text())
    assert (data["format"], data["dtype"], data["tokens"], data["complete"]) == (1, "int8", 500, True)
    assert data["sites"] == {"a": {"width": 6, "dtype": "float32"}, "b": {"width": 4, "dtype": "float32"}}
    assert data["provenance"] == RandomHarvest().provenance
    assert data["counters"]["lm_tokens"] >= data["counters"]["dropped_special"] + 500
    for shard in data["shards"]:
        raw = (tmp_path / shard["file"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["bytes"], shard["sha256"])


def test_the_state_of_the_data_travels_with_each_shard(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path))
    harvest, rows = RandomHarvest(), 0
    for shard in manifest.shards[:-1]:
        while rows < shard.rows:
            rows += len(next(harvest).kept)
        rows -= shard.rows
        state = read_state(tmp_path / shard.file)
        assert state["numbers"] == harvest.state_dict()["numbers"]
        assert torch.equal(state["filters"]["norms"], harvest.norms)


def test_files_are_readable_by_safetensors_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written(tmp_path, dtype="int8")
    first = load_file(tmp_path / "r00-000000.safetensors")
    expected = {"a", "a.scale", "b", "b.scale", "row", "pos", "tokens", "lengths", "state.filters.norms"}
    assert first.keys() == expected
    assert (first["a"].dtype, first["row"].dtype, first["pos"].dtype) == (torch.int8, torch.int64, torch.int32)


# ---- interruptions ---------------------------------------------------------------------------------------------------

SCRIPT = """
import os, pathlib, random, signal, sys, time
from harvests import RandomHarvest
from sae_kit.data.cache import read_manifest, write_cache

folder = pathlib.Path(sys.argv[1])
moments, longest, kills, stages = random.Random(0), 0.01, 0, {0}
while True:
    if not (child := os.fork()):
        write_cache(RandomHarvest(), folder, tokens=1500, dtype="int8", rows_per_shard=60)
        os._exit(0)
    time.sleep(moments.uniform(0.001, longest))
    os.kill(child, signal.SIGKILL)
    kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder)
        if manifest.complete:
            break
        if len(manifest.shards) not in stages:
            stages.add(len(manifest.shards))
            continue
    longest *= 1.05  # a busy machine needs more time for a shard
print(kills, len(stages))
"""


def test_killed_at_any_moment_and_written_on_gives_the_same_files(tmp_path: Path) -> None:
    write_cache(RandomHarvest(), tmp_path / "whole", tokens=1500, dtype="int8", rows_per_shard=60)
    done = child(SCRIPT, tmp_path / "killed")
    assert done.returncode == 0, done.stderr
    kills, stages = map(int, done.stdout.split())
    assert kills >= 5
    assert stages >= 3, "killed at one moment only"
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def child(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


class Stopped(RandomHarvest):
    """A harvest that the user interrupts at one forward."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.stop = at

    def __next__(self) -> Any:
        if self.at == self.stop:
            raise KeyboardInterrupt
        return super().__next__()


@pytest.mark.parametrize("at", [0, 1, 3, 4, 5, 11, 17])
def test_interrupted_writing_goes_on(tmp_path: Path, at: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        written_by(Stopped(at), tmp_path / "cut")
    if at >= 4:
        with pytest.raises(DataError, match=r"is unfinished: \d+ of 500 activations.*partial=True"):
            open_cache(tmp_path / "cut")
        assert 0 < open_cache(tmp_path / "cut", partial=True).rows < 500
    harvest = RandomHarvest()
    written_by(harvest, tmp_path / "cut")
    assert harvest.loads == (at >= 4)
    assert contents(tmp_path / "cut") == contents(written(tmp_path / "whole"))


def written_by(harvest: RandomHarvest, folder: Path) -> None:
    write_cache(harvest, folder, tokens=500, dtype="float32", rows_per_shard=90)


def test_a_finished_cache_is_left_alone(tmp_path: Path) -> None:
    before = contents(written(tmp_path))
    harvest = RandomHarvest()
    written_by(harvest, tmp_path)
    assert harvest.at == 0
    assert contents(tmp_path) == before


@pytest.mark.parametrize("broken", [(0,), (2,), (0, 1, 3), (4,)])
def test_a_torn_or_missing_shard_is_harvested_anew_alone(
    tmp_path: Path, broken: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    before = contents(written(tmp_path))
    assert len(before["manifest"]["shards"]) == 5
    for index in broken:
        path = tmp_path / f"r00-{index:06d}.safetensors"
        if index % 2:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size - 7)
    names = ".*".join(f"r00-{index:06d}.safetensors is {'missing' if index % 2 else 'torn'}" for index in broken)
    with pytest.raises(CorruptFileError, match=f"{names}.*write the cache once more with the same settings"):
        open_cache(tmp_path)
    written_by(harvest := RandomHarvest(), tmp_path)
    assert contents(tmp_path) == before
    assert "harvested anew" in caplog.text
    assert harvest.loads <= len(broken)
    open_cache(tmp_path, verify=True)


def test_a_shard_of_other_text_does_not_take_the_place_of_a_lost_one(tmp_path: Path) -> None:
    written(tmp_path)
    (tmp_path / "r00-000001.safetensors").unlink()

    class Changed(RandomHarvest):
        @property
        def provenance(self) -> dict[str, Any]:
            return RandomHarvest().provenance

    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"has \d+ rows instead of \d+: model or text are no longer"):
        written_by(Changed(seed=3), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_bits_that_changed_are_found_on_request(tmp_path: Path) -> None:
    path = written(tmp_path) / "r00-000001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    open_cache(tmp_path)
    with pytest.raises(CorruptFileError, match=r"r00-000001.*hash differs.*delete it, and write the cache once more"):
        open_cache(tmp_path, verify=True)


# ---- the disk --------------------------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
from harvests import RandomHarvest
from sae_kit.data.cache import write_cache
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write_cache(RandomHarvest(widths={"a": 6, "b": 4}, forwards=60), sys.argv[1], tokens=1500, dtype="float32",
                rows_per_shard=1000)
except OSError as error:
    print(error.errno, error)
    sys.exit(3)
"""


def test_the_kernel_refusing_to_write_is_a_clear_error(tmp_path: Path) -> None:
    done = child(LIMITED, tmp_path / "cache")
    assert done.returncode == 3, done.stderr
    number, _, message = done.stdout.partition(" ")
    assert int(number) == errno.EFBIG
    assert "writing the cache stopped. 0 of 1,500 activations are in whole shards. Make room" in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_full_disk_keeps_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sync = os.fsync

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 9:  # a file and its folder, a shard and its manifest: amid the third shard
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device: writing the cache stopped") as caught:
            written(tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    kept = read_manifest(tmp_path / "full")
    assert len(kept.shards) == 2
    assert f"{kept.rows} of 500 activations are in whole shards" in str(caught.value)
    assert open_cache(tmp_path / "full", partial=True, verify=True).rows == kept.rows
    assert not list((tmp_path / "full").glob(".*"))
    written(tmp_path / "full")
    assert contents(tmp_path / "full") == contents(written(tmp_path / "whole"))


def test_a_disk_that_is_too_small_is_found_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")

    def free(number: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12 - number, number))

    free(20_000)
    harvest = RandomHarvest()
    with pytest.raises(OSError, match=r"500 activations of \d\d bytes take 0.0 MB, and 0.0 MB are free") as caught:
        written_by(harvest, tmp_path / "small")
    assert caught.value.errno == errno.ENOSPC
    assert harvest.at == 1
    assert list((tmp_path / "small").iterdir()) == []
    free(40_000)
    with pytest.raises(KeyboardInterrupt):
        written_by(Stopped(9), tmp_path / "small")
    free(2_000)
    with pytest.raises(OSError, match=r"\d\d\d activations of \d\d bytes take 0.0 MB"):
        written_by(harvest := RandomHarvest(), tmp_path / "small")
    assert (harvest.at, harvest.loads) == (0, 0)
    free(40_000)
    written_by(RandomHarvest(), tmp_path / "small")


# ---- settings --------------------------------------------------------------------------------------------------------


def test_a_cache_is_not_continued_with_other_settings(tmp_path: Path) -> None:
    before = contents(written(tmp_path))
    with pytest.raises(ConfigError, match="tokens is 500 there and 501 here; dtype is float32 there and bf16 here"):
        write_cache(RandomHarvest(), tmp_path, tokens=501, dtype="bf16")
    with pytest.raises(ConfigError, match="rows_per_shard is 90 there and 91 here"):
        write_cache(RandomHarvest(), tmp_path, tokens=500, dtype="float32", rows_per_shard=91)
    with pytest.raises(
        ConfigError, match=r"the cache in .* was made with other settings: model.seed: expected 1, found 0"
    ):
        written_by(RandomHarvest(seed=1), tmp_path)
    assert contents(tmp_path) == before


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    class Meanwhile(RandomHarvest):
        def __next__(self) -> Any:
            if self.at == 5:
                done = child(OTHER, tmp_path)
                assert "is writing into" in done.stderr
                assert done.returncode == 1
            return super().__next__()

    written_by(Meanwhile(), tmp_path)
    written_by(RandomHarvest(), tmp_path)
    open_cache(tmp_path, verify=True)


OTHER = """
import sys
from harvests import RandomHarvest
from sae_kit.data.cache import write_cache
write_cache(RandomHarvest(), sys.argv[1], tokens=500, dtype="float32", rows_per_shard=90)
"""


def test_another_folder_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(OutputExistsError, match="holds files that are no cache"):
        written(tmp_path)
    file = tmp_path / "thesis.tex"
    with pytest.raises(OutputExistsError, match=r"thesis\.tex is a file: choose another folder"):
        written(file)
    hidden = tmp_path / "cache" / ".draft.tmp-1"
    written(tmp_path / "cache")
    hidden.write_text("precious, too")
    written(tmp_path / "cache")
    assert hidden.exists()


def test_text_that_ends_gives_a_smaller_cache_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rows = len(all_rows(RandomHarvest(forwards=5))["a"])
    for _ in range(2):
        caplog.clear()
        manifest = write_cache(RandomHarvest(forwards=5), tmp_path / "short", tokens=500, rows_per_shard=30)
        assert (manifest.rows, manifest.complete, manifest.tokens) == (rows, True, 500)
        assert f"the text ended after {rows} of the 500 activations asked for" in caplog.text
    assert open_cache(tmp_path / "short").rows == rows
    with pytest.raises(DataError, match="the text gives no activation"):
        write_cache(RandomHarvest(forwards=0), tmp_path / "none", tokens=500)
    with pytest.raises(DataError, match="the text gives no activation"):
        write_cache(Empty(forwards=3), tmp_path / "empty", tokens=500)
    assert list((tmp_path / "empty").iterdir()) == []


class Empty(RandomHarvest):
    """Forwards of which nothing is kept."""

    def __next__(self) -> Any:
        forward = super().__next__()
        rows = {site: values[:0] for site, values in forward.rows.items()}
        return replace(forward, rows=rows, kept=forward.kept[:0])


def test_mistakes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens: expected at least 1, found 0"):
        write_cache(RandomHarvest(), tmp_path / "new", tokens=0)
    assert not (tmp_path / "new").exists()
    for widths in ({"row": 3}, {"state.x": 3}, {"a": 2, "a.scale": 3}):
        with pytest.raises(ConfigError, match="cannot be cached: that name means something else"):
            write_cache(RandomHarvest(widths=widths), tmp_path / "new", tokens=10)
        assert list((tmp_path / "new").iterdir()) == []

    class Growing(RandomHarvest):
        def __next__(self) -> Any:
            self.widths["b"] += 1
            return super().__next__()

    with pytest.raises(
        DataError, match=r"expected \{'a': 6, 'b': 5\} from contexts of 8 ids.*found \{'a': 6, 'b': 6\}"
    ):
        written_by(Growing(), tmp_path / "growing")


def test_manifests_are_judged(tmp_path: Path) -> None:
    manifest = read_manifest(written(tmp_path / "cache"))
    path = tmp_path / "cache" / "manifest.json"
    text = path.read_text()
    with pytest.raises(FileNotFoundError, match=r"no cache of activations in .*: expected manifest.json, found cache"):
        read_manifest(tmp_path)
    for old, new, error, message in (
        ('"format": 1', '"format": 2', FormatTooNewError, "has format 2; this sae_kit reads up to 1"),
        ('"format": 1', '"form": 1', CorruptFileError, "expected the manifest of a cache"),
        ('"rows": ', '"rows": "x', CorruptFileError, "not valid JSON"),
        ('"bytes"', '"byte"', CorruptFileError, r"shards\[0\].byte"),
        ("r00-000001.safetensors", "../other.safetensors", CorruptFileError, "expected the names of safetensors"),
        ('"width": 6', '"width": 7', CorruptFileError, "r00-000000.safetensors: a is not what manifest.json says"),
    ):
        path.write_text(text.replace(old, new))
        with pytest.raises(error, match=message):
            open_cache(tmp_path / "cache")
    write_manifest(manifest, tmp_path / "cache")
    assert path.read_text() == text


def test_cache_configs_are_judged() -> None:
    CacheConfig(write="there", push=PushConfig(repo="me/acts"))
    cases: list[tuple[dict[str, Any], str]] = [
        ({"tokens": 0}, "tokens: expected at least 1 or None, found 0"),
        ({"read": "a", "write": "b"}, "read: expected either a cache to read or one to write"),
        ({"push": PushConfig(repo="me/acts")}, "push: expected a folder to write as well"),
    ]
    for options, message in cases:
        with pytest.raises(ConfigError, match=message):
            CacheConfig(**options)
