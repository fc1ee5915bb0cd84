"""Results of runs: one table, whatever wrote them, and the plot of it."""

import csv
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sae_kit import JumpReLUSAEConfig, TopKSAEConfig
from sae_kit import config as trees
from sae_kit.errors import ConfigError, CorruptFileError, MissingDependencyError
from sae_kit.sae_config import SAEConfig
from sae_kit.training.config import SAEEntry
from sae_kit.training.results import compare, pareto_front, pareto_plot, read_results, show, write_results

HOOK = "blocks.2.hook_resid_pre"


def result(sae: SAEConfig, l0: float, ev: float, ce: float | None = 0.9, **fields: Any) -> dict[str, Any]:
    lr = fields.pop("lr", None)
    return {
        "config": trees.unstructure(SAEEntry(sae=sae, hook=HOOK, lr=lr)),
        "tokens": 1000,
        "tokens_per_second": 50.0,
        "dead_fraction": 0.125,
        "evals": {
            "sparsity": {"l0": l0},
            "reconstruction_quality": {"explained_variance": ev},
            "model_performance_preservation": {"ce_loss_score": ce},
        },
        **fields,
    }


def topk(k: int, ev: float, **fields: Any) -> dict[str, Any]:
    return result(TopKSAEConfig(d_sae=64, k=k), float(k), ev, **fields)


def a_run(folder: Path, results: Mapping[str, Mapping[str, Any]], **config: Any) -> Path:
    folder.mkdir(parents=True)
    write_results(folder, results)
    (folder / "run.yaml").write_text(trees.dump_yaml({"name": folder.name, "out": str(folder.parent), **config}))
    return folder


def test_a_run_leaves_json_and_a_table(tmp_path: Path) -> None:
    a_run(tmp_path / "r", {"a": topk(8, 0.7), "b": topk(16, 0.8, lr=1e-3) | {"status": "failed", "evals": None}})
    found = read_results(tmp_path / "r")
    assert found["a"] == {"status": "trained", **topk(8, 0.7)}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r" / "results.csv").read_text())))
    assert [(row["sae"], row["status"], row["sae.k"], row["lr"], row["sparsity/l0"]) for row in rows] == [
        ("a", "trained", "8", "", "8.0"),
        ("b", "failed", "16", "0.001", ""),
    ]
    assert "hook" not in rows[0], "a field in which they do not differ"
    assert rows[0]["dead_fraction"] == "0.125"


def test_fields_that_differ_over_runs_are_columns(tmp_path: Path) -> None:
    first = a_run(tmp_path / "x" / "one", {"sae": topk(8, 0.7)}, train={"batch_tokens": 512, "tokens": 9}, seed=1)
    second = a_run(tmp_path / "x" / "two", {"sae": topk(8, 0.8)}, train={"batch_tokens": 1024, "tokens": 9}, seed=2)
    comparison = compare([first, second])
    assert set(comparison.fields) == {"train.batch_tokens", "run.seed"}
    assert [(row["run"], row["train.batch_tokens"], row["run.seed"]) for row in comparison.rows] == [
        ("one", 512, 1),
        ("two", 1024, 2),
    ]
    assert compare([tmp_path / "x"]) == comparison, "a folder of runs stands for them"
    third = a_run(tmp_path / "y" / "one", {"sae": topk(8, 0.7)}, train={"batch_tokens": 512, "tokens": 9}, seed=1)
    assert [row["run"] for row in compare([first, third]).rows] == ["x/one", "y/one"]


def test_fields_of_one_architecture_show_where_they_are_chosen(tmp_path: Path) -> None:
    jumprelu = JumpReLUSAEConfig(d_sae=64, l0_coefficient=0.3)
    run = a_run(tmp_path / "r", {"t": topk(8, 0.7), "j": result(jumprelu, 20.0, 0.75)})
    comparison = compare([run])
    assert set(comparison.fields) == {"sae.architecture", "sae.k", "sae.l0_coefficient"}
    assert [row["sae.l0_coefficient"] for row in comparison.rows] == [None, 0.3]


def test_comparisons_are_written_and_shown(tmp_path: Path) -> None:
    run = a_run(tmp_path / "r", {"low": topk(8, 0.70001), "high": topk(16, 0.8) | {"status": "failed"}})
    comparison = compare([run], out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text()) == [dict(row) for row in comparison.rows]
    rows = list(csv.reader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert tuple(rows[0]) == comparison.columns
    assert rows[1][:4] == ["r", "low", "trained", "8"]
    screen = Console(file=io.StringIO(), width=120)
    show(comparison, screen)
    lines = screen.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert lines[1].replace("┃", " ").split() == ["SAE", "status", "k", "tokens", "dead", "L0", "EV", "CE", "score"]
    assert lines[3].replace("│", " ").split() == ["low", "trained", "8", "1,000", "0.125", "8", "0.7", "0.9"]
    assert "failed" in lines[4]


def test_what_a_terminal_has_no_room_for_is_named(tmp_path: Path) -> None:
    """Columns of three letters each say nothing."""
    runs = [
        a_run(
            tmp_path / name, {"s": topk(k, 0.7)}, train={"batch_tokens": k, "tokens": 9 * k}, data={"context_size": k}
        )
        for name, k in (("one", 8), ("two", 16))
    ]
    comparison = compare(runs)
    fields = ["sae.k", "train.batch_tokens", "train.tokens", "data.context_size"]
    assert sorted(comparison.fields) == sorted(fields)
    assert comparison.fields[0] == "sae.k", "what is of the SAE comes first"
    for width, missing in ((160, 0), (80, 2), (60, 3)):
        screen = Console(file=io.StringIO(), width=width)
        show(comparison, screen)
        shown = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
        table, _, below = shown.partition("No room here for")
        assert "…" not in table
        assert max(map(len, table.splitlines())) <= width
        assert sum(name in below.replace("\n", " ") for name in fields) == missing
        assert " k " in table
        assert all(label in table for label in ("run", "SAE", "L0", "EV", "CE score"))


def test_brackets_in_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = a_run(tmp_path / "r", {"attn.hook_z[1]": topk(8, 0.7), "[red]": topk(9, 0.7)})
    screen = Console(file=io.StringIO(), width=120)
    show(compare([run]), screen)
    shown = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "attn.hook_z[1]" in shown
    assert "[red]" in shown


def test_the_front_is_what_no_other_beats() -> None:
    points = [(8.0, 0.7), (4.0, 0.6), (8.0, 0.75), (16.0, 0.74), (32.0, 0.9), (32.0, 0.9)]
    assert [points[i] for i in pareto_front(points)] == [(4.0, 0.6), (8.0, 0.75), (32.0, 0.9)]
    for x, y in (points[i] for i in pareto_front(points)):
        assert not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points)
    assert pareto_front([]) == []


def test_equal_tables_make_equal_plots(tmp_path: Path) -> None:
    jumprelu = result(JumpReLUSAEConfig(d_sae=64), 20.0, 0.75)
    run = a_run(tmp_path / "r", {"a": topk(8, 0.7), "b": topk(16, 0.8), "j": jumprelu})
    for name in ("pareto.png", "pareto.svg"):
        compare([run], plot=tmp_path / name)
        first = (tmp_path / name).read_bytes()
        assert pareto_plot(compare([run]), tmp_path / name).read_bytes() == first
    drawing = (tmp_path / "pareto.svg").read_text()
    for text in ("explained variance", "CE score", "L0", ">a<", ">b<", ">j<", "jumprelu", "topk"):
        assert text in drawing
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
    other = a_run(tmp_path / "other", {"a": topk(8, 0.6)})
    compare([run, other], plot=tmp_path / "both.svg")
    assert ">other/a<" in (tmp_path / "both.svg").read_text(), "names of SAEs are those of their runs"


def test_a_plot_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    without_ce = {"a": topk(8, 0.7, ce=None), "failed": topk(16, 0.8) | {"evals": None}}
    pareto_plot(compare([a_run(tmp_path / "r", without_ce)]), tmp_path / "p.svg")
    drawing = (tmp_path / "p.svg").read_text()
    assert "explained variance" in drawing
    assert "CE score" not in drawing
    assert ">failed<" not in drawing
    nothing = compare([a_run(tmp_path / "n", {"a": topk(8, 0.7) | {"evals": None}})])
    with pytest.raises(ConfigError, match="there is nothing to draw"):
        pareto_plot(nothing, tmp_path / "n.svg")


def test_a_plot_says_what_it_needs_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"expected a file that ends in \.png or \.svg, found 'p\.pdf'"):
        compare([tmp_path / "nowhere"], plot=Path("p.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"a plot needs matplotlib: pip install 'sae-kit\[plots\]'"):
        compare([tmp_path / "nowhere"], plot=Path("p.svg"))


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: it does not exist"):
        compare([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected results\.json in it, or in the folders in it"):
        compare([tmp_path / "empty"])
    with pytest.raises(FileNotFoundError, match=r"no results in .*empty"):
        read_results(tmp_path / "empty")
    run = a_run(tmp_path / "r", {"a": topk(8, 0.7)})
    with pytest.raises(ConfigError, match="is given twice"):
        compare([run, tmp_path / "." / "r"])
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"a": 1}', "expected a result with its config"),
        ("[]", "expected a result"),
    ):
        (run / "results.json").write_text(text)
        with pytest.raises(CorruptFileError, match=message):
            compare([run])
