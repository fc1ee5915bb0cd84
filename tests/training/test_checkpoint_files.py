"""Checkpoints hold what was written, open as SAEs, and stay as long as they should."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import contents, names, small, write
from helpers import estimated, every_trainable, inputs, make_sae, run_config

from sae_kit import SAE
from sae_kit import config as trees
from sae_kit.data.buffer import BufferConfig
from sae_kit.data.store import ActivationsStore, with_rows, without_rows
from sae_kit.devices import kernels
from sae_kit.errors import CorruptFileError, FormatTooNewError, SAEKitError
from sae_kit.training import checkpoint as module
from sae_kit.training.checkpoint import (
    environment,
    environment_changes,
    find_checkpoints,
    newest_checkpoint,
    read_checkpoint,
)
from sae_kit.training.resume import checkpoint_to_resume

# ---- what is in them -------------------------------------------------------------------------------------------------


@every_trainable
@pytest.mark.parametrize("mode", ["expected_average_only_in", "none"])
def test_an_sae_of_a_checkpoint_opens_and_is_right(name: str, mode: str, tmp_path: Path) -> None:
    sae = make_sae(name, normalize_activations=mode)
    if mode != "none":
        estimated(sae, scale=3.0)
    sae.firing_count.copy_(torch.arange(sae.d_sae) % 7)
    sae.tokens_since_fired.copy_(torch.arange(sae.d_sae))
    sae.tokens_seen.fill_(4096)
    path = write(tmp_path, 4096, saes={"a.b": sae, "frozen": small()})
    found = read_checkpoint(path).saes
    opened = SAE.load_from_disk(path / "saes" / "a.b")
    assert list(found) == ["a.b", "frozen"]
    x = 3 * inputs(sae, 32)
    for other in (found["a.b"], opened):
        assert type(other) is type(sae)
        assert other.cfg == sae.cfg
        assert torch.equal(other(x), sae(x))
        expected = sae.state_dict()
        assert list(other.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[key]) for key, tensor in other.state_dict().items())


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    state = {"optim": {"sae": {"W_dec": (torch.randn(3, 2), float("nan"))}}, "step": 10}
    buffer = {"rows": {"hook": torch.randn(4, 3).bfloat16()}, "slots": torch.arange(4)}
    run = {"config": {"clip": float("inf"), "betas": (0.9, 0.99)}, "step": 10}
    path = write(tmp_path, 100, state=state, buffer=buffer, run=run)
    assert path == tmp_path / "checkpoints" / "000000000100"
    assert json.loads((tmp_path / "latest.json").read_text()) == {
        "checkpoint": "checkpoints/000000000100",
        "tokens": 100,
    }
    found = read_checkpoint(path)
    assert (found.path, found.tokens, found.run["step"], found.run["config"]) == (path, 100, 10, run["config"])
    assert found.run["environment"] == environment()
    weight, loss = found.state["optim"]["sae"]["W_dec"]
    assert torch.equal(weight, state["optim"]["sae"]["W_dec"][0])
    assert loss != loss
    assert found.buffer is not None
    assert torch.equal(found.buffer["rows"]["hook"], buffer["rows"]["hook"])
    assert read_checkpoint(write(tmp_path, 110)).buffer is None


def test_the_manifest_has_every_file(tmp_path: Path) -> None:
    path = write(tmp_path, 100, buffer={})
    files = json.loads((path / "MANIFEST.json").read_text())["files"]
    assert {*files, "MANIFEST.json"} == {*contents(path)}
    assert {"saes/sae/cfg.json", "state.json", "state.safetensors", "buffer.json", "run.json"} <= {*files}
    assert all(file.suffix in (".json", ".safetensors") for file in path.rglob("*") if file.is_file())


def test_what_bits_depend_on_is_compared() -> None:
    now = environment()
    assert environment_changes(now) == []
    assert environment_changes(now | {"torch": "1.0", "threads": 10**6}) == [
        f"torch: '1.0' → {now['torch']!r}",
        f"threads: 1000000 → {now['threads']}",
    ]


def test_going_on_elsewhere_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = run_config()
    with kernels(tf32=cfg.train.tf32, deterministic=cfg.deterministic):
        write(tmp_path, 10, run={"config": trees.unstructure(cfg)})
        now = environment()
    assert checkpoint_to_resume(cfg, tmp_path) is not None
    assert not caplog.records
    monkeypatch.setattr(module, "environment", lambda: now | {"torch": "9.9"})
    assert checkpoint_to_resume(cfg, tmp_path) is not None
    assert caplog.messages == [
        f"not bit for bit the run that was interrupted, because of torch: {now['torch']!r} → '9.9'"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"saes": {"../out": small()}}, r"the SAE '\.\./out': expected the name of one folder"),
        ({"saes": {"..": small()}}, "the SAE '..'"),
        ({"state": {"x": {1, 2}}}, "x: a state holds .* found a builtins.set"),
        ({"run": {"x": torch.ones(1)}}, "run: expected JSON values, found tensors at x"),
    ],
)
def test_what_cannot_be_written_changes_nothing(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write(tmp_path, 10)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        write(tmp_path, 20, **changes)
    sae = small()
    sae.W_dec.data[0, 0] = torch.nan
    with pytest.raises(SAEKitError, match="refusing to save: W_dec"):
        write(tmp_path, 20, saes={"good": small(), "bad": sae})
    assert contents(tmp_path) == before


# ---- which of them stay ----------------------------------------------------------------------------------------------


def test_the_newest_stay_and_milestones_and_the_best(tmp_path: Path) -> None:
    for tokens in range(10, 80, 10):
        write(tmp_path, tokens, milestone=tokens == 20, best=40 if tokens >= 40 else 10, buffer={"rows": torch.ones(5)})
    assert names(tmp_path) == [20, 40, 60, 70]
    held = {path.name[-2:]: read_checkpoint(path).buffer is not None for path in find_checkpoints(tmp_path)}
    assert held == {"20": False, "40": False, "60": True, "70": True}
    assert not list((tmp_path / "checkpoints" / "000000000020").glob("buffer*"))
    write(tmp_path, 80, keep=1)
    assert names(tmp_path) == [20, 80]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"000000000020", "000000000080"}


def test_a_run_that_was_set_back_goes_on_from_what_it_wrote_last(tmp_path: Path) -> None:
    for tokens in (10, 20, 30):
        write(tmp_path, tokens, keep=3)
    write(tmp_path, 20, keep=3, state={"again": True})
    assert names(tmp_path) == [10, 30, 20]
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest).state == {"again": True}
    write(tmp_path, 25, keep=1)
    assert names(tmp_path) == [25]


def test_one_with_a_label_is_beside_the_others(tmp_path: Path) -> None:
    write(tmp_path, 10, keep=1)
    path = write(tmp_path, 20, keep=1, label="nonfinite")
    assert path.name == "nonfinite-000000000020"
    assert names(tmp_path) == [10]
    write(tmp_path, 30, keep=1)
    assert names(tmp_path) == [30]
    assert read_checkpoint(path).tokens == 20


# ---- damage ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda path: (path / "MANIFEST.json").unlink(), "there is no MANIFEST.json"),
    "half a manifest": (lambda path: os.truncate(path / "MANIFEST.json", 99), "MANIFEST.json is not that of a checkp"),
    "another manifest": (lambda path: edit(path / "MANIFEST.json", files=[]), "MANIFEST.json is not that of a checkp"),
    "a way out": (
        lambda path: edit(path / "MANIFEST.json", files={"../x": {"bytes": 1, "sha256": ""}}),
        r"MANIFEST.json names '\.\./x'",
    ),
    "no weights": (lambda path: (path / "saes/sae/sae_weights.safetensors").unlink(), "safetensors is missing"),
    "half a state": (lambda path: os.truncate(path / "state.safetensors", 99), r"state\.safetensors is torn: .* 99"),
    "a flipped bit": (lambda path: flip(path / "saes/sae/sae_weights.safetensors"), "does not hold what was written"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_passed_over(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = write(tmp_path, 10), write(tmp_path, 20)
    spoil, message = DAMAGES[damage]
    spoil(second)
    with caplog.at_level(logging.WARNING):
        assert newest_checkpoint(tmp_path) == first
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert caplog.messages[0].startswith(f"{second} is passed over: ")
    with pytest.raises(FileNotFoundError if damage == "no manifest" else CorruptFileError):
        read_checkpoint(second)
    problem = module.damage(second, verify=True)
    assert problem is not None
    assert re.search(message, problem)
    shutil.rmtree(first)
    assert newest_checkpoint(tmp_path) is None
    write(tmp_path, 20)
    assert newest_checkpoint(tmp_path) == second, "a torn folder makes room"


def test_no_checkpoints_are_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert find_checkpoints(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"no checkpoint in .*: expected MANIFEST\.json"):
        read_checkpoint(tmp_path)


def test_a_later_format_is_not_passed_over(tmp_path: Path) -> None:
    edit(write(tmp_path, 10) / "MANIFEST.json", format=2)
    with pytest.raises(FormatTooNewError, match="has format 2; this sae_kit reads up to 1: upgrade it"):
        newest_checkpoint(tmp_path)


# ---- the buffer apart ------------------------------------------------------------------------------------------------


class Rows:
    """Rows that say which they are, in chunks of 48."""

    def __init__(self, chunks: int) -> None:
        self.chunk, self.chunks = 0, chunks

    def __iter__(self) -> "Rows":
        return self

    def __next__(self) -> torch.Tensor:
        if self.chunk == self.chunks:
            raise StopIteration
        self.chunk += 1
        return (torch.arange(48.0) + 48 * (self.chunk - 1))[:, None].expand(48, 2)

    def state_dict(self) -> dict[str, int]:
        return {"chunk": self.chunk}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.chunk = state["chunk"]


def given(store: ActivationsStore) -> list[list[float]]:
    return [batch["rows"][:, 0].tolist() for batch in store]


@pytest.mark.parametrize("chunks", [1000, 21], ids=["enough", "too few"])
@pytest.mark.parametrize("steps", [1, 20, 55])
def test_a_stream_goes_on_with_its_buffer_or_without(chunks: int, steps: int, tmp_path: Path) -> None:
    def store() -> ActivationsStore:
        return ActivationsStore.from_rows(
            Rows(chunks), BufferConfig(tokens=256, prefetch=2), batch_tokens=16, train_tokens=960
        )

    whole = store()
    before = [next(whole) for _ in range(steps)]
    stream, buffer = without_rows(whole.state_dict())
    path = write(tmp_path, 16 * steps, state={"stream": stream}, buffer=buffer)
    expected = given(whole)
    read = read_checkpoint(path)
    exact = store()
    exact.load_state_dict(with_rows(read.state["stream"], read.buffer))
    assert given(exact) == expected
    anew, lost = store(), sum(stream["held"].values())
    anew.load_state_dict(with_rows(read.state["stream"], None))
    found = [row for batch in given(anew) for row in batch]
    assert lost > 0
    seen = {row for batch in before for row in batch["rows"][:, 0].tolist()}
    assert not seen & {*found}, "no row comes twice"
    there_are = 48 * chunks - 16 * steps - lost
    assert len(found) == min(sum(map(len, expected)), there_are // 16 * 16)
    for each in (whole, exact, anew):
        each.close()


def test_a_stream_that_mixes_nothing_keeps_the_batches_made_ahead() -> None:
    state = {"source": {"position": 3}, "ready": [{"batch": {"a": torch.ones(2, 3)}}], "counters": None}
    place, rows = without_rows(state)
    assert rows is None
    assert with_rows(place, rows) is state
