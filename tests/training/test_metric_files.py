"""Rows of metrics in files: what is written, torn, continued, and read again."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import BATCH, make_sae, run_config, sparse_batches

from sae_kit import SAETrainer
from sae_kit.errors import CorruptFileError
from sae_kit.training.callbacks import CSV, JSONL, Callback, read_metrics


def train(*sinks: Callback, steps: int = 6, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run that logs after each step and evaluates at its end; returns the state of its callbacks."""
    sae = make_sae("topk")
    cfg = run_config(steps, log={"console": False, "every_tokens": BATCH})
    evaluate = lambda: {"evals/sparsity/l0": 8.0, "evals/none": None}  # noqa: E731
    trainer = SAETrainer(cfg, sae, sparse_batches(sae, steps), callbacks=sinks, evaluate=evaluate)
    if state is not None:
        trainer.callbacks.load_state_dict(state)
    trainer.fit()
    return trainer.callbacks.state_dict()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_carry_their_counters(tmp_path: Path) -> None:
    train(JSONL(tmp_path / "m.jsonl"), CSV(tmp_path / "m.csv"))
    rows = lines(tmp_path / "m.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 6]
    assert [row["tokens"] for row in rows] == [64, 128, 192, 256, 320, 384, 384]
    assert {row["attempt"] for row in rows} == {1}
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    in_table = table(tmp_path / "m.csv")
    assert [row["step"] for row in in_table] == ["1", "2", "3", "4", "5", "6", "6"]
    assert in_table[-1]["evals/sparsity/l0"] == "8.0"
    assert in_table[0]["evals/sparsity/l0"] == "", "a column that came later"
    for name in rows[0]:
        if name != "time":
            assert in_table[0][name] == str(rows[0][name]), name


def test_readers_join_what_belongs_to_one_step(tmp_path: Path) -> None:
    train(JSONL(tmp_path / "m.jsonl"))
    rows = read_metrics(tmp_path / "m.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["evals/sparsity/l0"] == 8.0
    assert rows[-1]["evals/none"] is None
    assert rows[-1]["losses/mse_loss"] > 0


def test_a_later_attempt_takes_the_place_of_what_it_repeats(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    train(JSONL(path), CSV(tmp_path / "m.csv"))
    before = read_metrics(path)
    for attempt in (2, 3):
        state = {"JSONL.0": {"attempt": 1, "seconds": 100.0}, "CSV.0": {"attempt": 1, "seconds": 100.0}}
        after = train(JSONL(path), CSV(tmp_path / "m.csv"), steps=4, state=state)
        assert after["JSONL.0"]["attempt"] == attempt, "two attempts from one checkpoint are two attempts"
        assert 100 < after["JSONL.0"]["seconds"] < 200, "time goes on"
        rows = read_metrics(path)
        assert [row["attempt"] for row in rows] == [attempt] * 4, "what came after the step that is repeated is gone"
        assert [row["losses/mse_loss"] for row in rows] == [row["losses/mse_loss"] for row in before[:4]]
        assert rows[0]["time"] > 100
    assert [row["attempt"] for row in table(tmp_path / "m.csv")] == ["1"] * 7 + ["2"] * 5 + ["3"] * 5


def test_a_torn_line_is_cut_off_and_never_read(tmp_path: Path) -> None:
    paths = tmp_path / "m.jsonl", tmp_path / "m.csv"
    train(JSONL(paths[0]), CSV(paths[1]))
    whole = read_metrics(paths[0])
    for path in paths:
        with path.open("ab") as file:
            file.write(b'{"step": 7, "tok' if path.suffix == ".jsonl" else b"7,448,0.")
    assert read_metrics(paths[0]) == whole
    train(JSONL(paths[0]), CSV(paths[1]), steps=2)
    assert [row["step"] for row in lines(paths[0])] == [1, 2, 3, 4, 5, 6, 6, 1, 2, 2]
    assert [row["step"] for row in table(paths[1])] == ["1", "2", "3", "4", "5", "6", "6", "1", "2", "2"]


def test_in_another_folder_the_state_says_which_attempt_it_is(tmp_path: Path) -> None:
    state = train(JSONL(tmp_path / "one.jsonl"))
    train(JSONL(tmp_path / "two.jsonl"), state=state)
    assert {row["attempt"] for row in lines(tmp_path / "two.jsonl")} == {2}


def test_a_file_that_was_torn_before_its_first_row_is_begun_anew(tmp_path: Path) -> None:
    for name, content in (("m.csv", b"step,tok"), ("m.jsonl", b'{"st')):
        (tmp_path / name).write_bytes(content)
    train(JSONL(tmp_path / "m.jsonl"), CSV(tmp_path / "m.csv"))
    assert len(read_metrics(tmp_path / "m.jsonl")) == 6
    assert len(table(tmp_path / "m.csv")) == 7


@pytest.mark.parametrize(
    ("line", "found"), [("nonsense", "as JSON"), ("[1]", "with its step"), ('{"a": 1}', "its step")]
)
def test_what_is_no_row_is_named(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n")
    with pytest.raises(CorruptFileError, match=rf"m\.jsonl, line 2: expected a row of metrics .*{found}, found"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "other.jsonl")
