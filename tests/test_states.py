"""States come back from their files as they were, and nothing is there in part."""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sae_kit import atomic
from sae_kit.data.cache import files
from sae_kit.errors import CorruptFileError
from sae_kit.states import NAMES_IN_FILES, join_state, read_state, split_state, write_state, write_tensors


def same(found: Any, expected: Any) -> bool:
    """Equal in types, values and bits."""
    if isinstance(expected, Tensor):
        alike = isinstance(found, Tensor) and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        return alike and bits(found) == bits(expected)
    if type(found) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(found) == list(expected) and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return (math.isnan(found) and math.isnan(expected)) or (found, math.copysign(1, found)) == (
            expected,
            math.copysign(1, expected),
        )
    return found == expected


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


STATE = {
    "a.b": torch.tensor([1.0, torch.nan, -torch.inf]),
    "a": {"b": torch.arange(6).reshape(2, 3).T, "": torch.tensor(3), "'": (torch.ones(2), [torch.zeros(0, 4)])},
    "__metadata__": torch.ones(1),
    "numbers": [0, -1, 2**63, 2**200, 0.1, -0.0, 5e-324, math.nan, math.inf, -math.inf, True, False, None],
    "tuples": ((), (1, (2.5, "x")), [], {}, [()]),
    "$tensor": "not one",
    "marks": {"$tensor": "a.b", "$$": {"$tuple": [1], "$x": 2}},
    "texts": ["", "é\n\x00\ud800", "$tensor"],
    "\ud800": torch.ones(1),
}


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    write_state(tmp_path, "state", STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    found = read_state(tmp_path, "state")
    assert same(found, STATE)
    assert not same(found, STATE | {"numbers": STATE["numbers"][::-1]})
    assert same(join_state(*split_state(STATE)), STATE)


@pytest.mark.parametrize("state", [torch.ones(3), [], (), {}, None, "x", 1, math.nan], ids=repr)
def test_any_value_is_a_state(state: object, tmp_path: Path) -> None:
    write_state(tmp_path, "s", state)
    assert same(read_state(tmp_path, "s"), state)


@pytest.mark.parametrize("dtype", NAMES_IN_FILES, ids=str)
def test_every_kind_of_number_is_what_safetensors_calls_it(dtype: torch.dtype, tmp_path: Path) -> None:
    raw = torch.randint(0, 2, (3, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    values = raw.view(dtype)
    write_state(tmp_path, "s", {"x": values, "scalar": values[0, 0], "none": values[:0]})
    assert same(read_state(tmp_path, "s"), {"x": values, "scalar": values[0, 0], "none": values[:0]})
    with safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert file.get_slice("x").get_dtype() == NAMES_IN_FILES[dtype]


def test_the_files_are_as_documented(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(2, 3))
    state = {"optim": {"W_dec": weight, "again": weight.detach(), "row": weight[0]}, "pair": (1, math.inf), "$x": [2]}
    write_state(tmp_path, "state", state)
    assert json.loads((tmp_path / "state.json").read_text()) == {
        "optim": {
            "W_dec": {"$tensor": "optim.W_dec"},
            "again": {"$alias": "optim.W_dec"},
            "row": {"$tensor": "optim.row"},
        },
        "pair": {"$tuple": [1, {"$float": "inf"}]},
        "$$x": [2],
    }
    found = read_state(tmp_path, "state")
    assert found["optim"]["again"] is found["optim"]["W_dec"]
    assert not found["optim"]["W_dec"].requires_grad
    found["optim"]["row"].zero_()
    assert bool(found["optim"]["W_dec"].all())
    with safe_open(tmp_path / "state.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["optim.W_dec", "optim.row"]


def test_tensors_are_aliases_only_if_they_are_the_same_memory_in_the_same_shape() -> None:
    x = torch.arange(6)
    state = [x, x.view(2, 3), x.view(3, 2), x[:3], x.view(2, 3).T, x.clone(), x.view(torch.float64), torch.zeros(0)]
    plain, tensors = split_state([*state, torch.zeros(0), x[:]])
    assert [next(iter(item)) for item in plain] == ["$tensor"] * 9 + ["$alias"]
    assert same(join_state(plain, tensors)[:8], state)


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        for file, (size, digest) in write_state(tmp_path, name, copy.deepcopy(STATE)).items():
            content = (tmp_path / file).read_bytes()
            assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    for suffix in ("json", "safetensors"):
        assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_what_comes_back_outlives_its_file(tmp_path: Path) -> None:
    write_state(tmp_path, "s", {"x": torch.arange(10_000)})
    found = read_state(tmp_path, "s")
    with (tmp_path / "s.safetensors").open("r+b") as file:
        file.truncate(0)
    assert torch.equal(found["x"], torch.arange(10_000))


def test_subclasses_become_what_they_stand_for(tmp_path: Path) -> None:
    write_state(tmp_path, "s", OrderedDict(size=torch.Size([2, 3]), x=numpy.float64("0.1"), y=numpy.float64("nan")))
    assert same(read_state(tmp_path, "s"), {"size": (2, 3), "x": 0.1, "y": math.nan})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (numpy.ones(2), "optim.sae: a state holds dicts, .* found a numpy.ndarray"),
        ({1, 2}, "optim.sae: .* found a builtins.set"),
        ({0: 1}, "optim.sae: expected keys that are strings, found 0"),
        (
            [1, {"x": torch.ones(2).to_sparse()}],
            r"optim.sae.1.x: expected a dense tensor .*, found one of torch.sparse_coo",
        ),
        (torch.ones(2, device="meta"), "optim.sae: expected a dense tensor .* one of meta"),
        (torch.ones(2, dtype=torch.complex64), "optim.sae: expected a dense tensor .*complex64"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_state(tmp_path, "state", {"optim": {"sae": value}})
    assert not list(tmp_path.iterdir())


# ---- damaged files ---------------------------------------------------------------------------------------------------


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    write_state(tmp_path, "s", {"x": torch.ones(100), "y": 1})
    plain, tensors = tmp_path / "s.json", tmp_path / "s.safetensors"
    whole, text = tensors.read_bytes(), plain.read_text()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match="cannot be read as safetensors"):
        read_state(tmp_path, "s")
    tensors.write_bytes(whole)
    for wrong, message in [
        (text[:-5], "does not hold a state"),
        (text.replace('"y"', '"x"'), "key 'x' is given twice"),
        (text.replace("$tensor", "$pickle"), r"expected \$tensor, .* found \$pickle"),
        (text.replace('"$tensor": "x"', '"$tensor": "z"'), "lacks the tensor 'z' that s.json names"),
    ]:
        assert wrong != text
        plain.write_text(wrong)
        with pytest.raises(CorruptFileError, match=message):
            read_state(tmp_path, "s")
    plain.unlink()
    with pytest.raises(FileNotFoundError, match=r"no s\.json in .*a state is s\.json and s\.safetensors"):
        read_state(tmp_path, "s")


def test_caches_that_numbered_the_tensors_of_their_states_are_read(tmp_path: Path) -> None:
    columns = {"state.0": [torch.ones(2)], "state.1": [torch.zeros(3)], "row": [torch.arange(4)]}
    text = '{"a": [{"$tensor": 0}, NaN], "b": {"$tensor": 1}}'
    write_tensors(tmp_path / "shard", columns, {"data_state": text})
    found = files.read_state(tmp_path / "shard")
    assert same(found, {"a": [torch.ones(2), math.nan], "b": torch.zeros(3)})


# ---- whole or not at all ---------------------------------------------------------------------------------------------


def test_files_and_folders_that_fail_leave_nothing_and_change_nothing(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", "old")
    with atomic.new_folder(tmp_path / "folder") as new:
        (new / "x").write_text("old")

    def begin_a_file() -> None:
        with atomic.new_file(tmp_path / "file") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    def begin_a_folder() -> None:
        with atomic.new_folder(tmp_path / "folder") as new:
            (new / "x").write_text("new")
            raise KeyboardInterrupt

    for begin in (begin_a_file, begin_a_folder):
        with pytest.raises(KeyboardInterrupt):
            begin()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert ((tmp_path / "file").read_text(), (tmp_path / "folder" / "x").read_text()) == ("old", "old")
    with atomic.new_folder(tmp_path / "folder") as new:
        (new / "y").write_text("new")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["y"]


def test_a_folder_is_replaced_before_the_old_one_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    delete = shutil.rmtree

    def look_and_delete(path: Path, **options: Any) -> None:
        seen.append((tmp_path / "folder" / "x").read_text())
        delete(path, **options)

    for text in ("old", "new"):
        with atomic.new_folder(tmp_path / "folder") as new:
            (new / "x").write_text(text)
        monkeypatch.setattr(shutil, "rmtree", look_and_delete)
    assert set(seen) == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_leftovers_go_and_nothing_else_does(tmp_path: Path) -> None:
    kept = ["000", ".000", ".000.tmp", ".000.tmp-12-123", ".x.tmp-12-12345678", "000.tmp-12-12345678"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".000.tmp-12-12345678" / "deep").mkdir(parents=True)
    (tmp_path / ".111.tmp-7-abcdef01").write_text("")
    atomic.remove_leftovers(tmp_path, re.compile(r"\d+"))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


KILLED = """
import os, pathlib, signal, sys
from sae_kit import atomic
from sae_kit.data.cache import files
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
atomic.os.replace = die
atomic.write_text(pathlib.Path(sys.argv[1]) / "file", "new")
"""


def test_a_killed_writer_leaves_what_was_there_and_a_leftover(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "file", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    atomic.remove_leftovers(tmp_path, re.compile("file"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_json_is_written_without_numbers_that_are_none(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "x.json", {"x": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic.write_json(tmp_path / "x.json", {"x": math.nan})
    assert json.loads((tmp_path / "x.json").read_text()) == {"x": 1.5}
    assert os.listdir(tmp_path) == ["x.json"]


def test_parts_of_a_tensor_are_written_one_after_another(tmp_path: Path) -> None:
    parts = [torch.arange(6.0).reshape(2, 3), torch.ones(3, 1).expand(3, 3), torch.zeros(0, 3)]
    size, digest = write_tensors(tmp_path / "x.safetensors", {"x": parts, "y": [torch.tensor(True)]}, {"said": "so"})
    content = (tmp_path / "x.safetensors").read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"said": "so"}
        assert torch.equal(file.get_tensor("x"), torch.cat(parts))
