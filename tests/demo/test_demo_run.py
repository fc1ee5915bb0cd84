"""The main job, for real: `sae-kit demo` in a process of its own, against the figures that it promises."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from helpers import DemoRun
from rich.console import Console

from sae_kit import SAE, RunConfig
from sae_kit import config as trees
from sae_kit.demo import run as demo_module
from sae_kit.demo.run import CONFIG, demo
from sae_kit.errors import OutputExistsError
from sae_kit.training.run import RunResult

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(1600)


@slow
def test_the_demo_reaches_what_it_promises(demo_run: DemoRun) -> None:
    metrics = json.loads((demo_run.folder / "metrics.json").read_text())
    assert metrics["explained_variance"] >= 0.85
    assert metrics["ce_loss_score"] >= 0.93
    assert metrics["l0"] <= 32
    assert metrics["dead_fraction"] < 0.05
    assert metrics["tokens_per_second"] > 0
    assert metrics["train_tokens"] == pytest.approx(1_000_000, rel=0.1)
    assert set(metrics) == {
        "explained_variance", "l0", "ce_loss_score", "dead_fraction", "tokens_per_second", "train_tokens"
    }  # fmt: skip


@slow
def test_the_demo_leaves_a_run_folder(demo_run: DemoRun) -> None:
    sae = SAE.load_from_disk(demo_run.folder / "saes" / "sae")
    assert sae.cfg.metadata.hook_name == CONFIG["hook"]
    assert (sae.d_in, sae.d_sae) == (128, 16 * 128)
    rows = [json.loads(line) for line in (demo_run.folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    assert rows[-1]["metrics/explained_variance"] > rows[0]["metrics/explained_variance"]
    assert trees.load_tree(demo_run.folder / "run.yaml")["name"] == "demo"


@slow
def test_the_demo_shows_ten_latents(demo_run: DemoRun) -> None:
    assert demo_run.output.count("  on ") == 10
    assert "explained variance" in demo_run.output
    lines = demo_run.output.splitlines()
    headings = [i for i, line in enumerate(lines) if line.startswith("latent ")]
    assert all(lines[i + 1].startswith("  ") and lines[i + 1].strip() for i in headings)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The demo with a fiftieth of its tokens."""
    cut = {"tokens": 20_480, "buffer": {"tokens": 4096}, "eval": {"tokens": 4096, "fidelity_tokens": 2048}}
    monkeypatch.setattr(demo_module, "CONFIG", {**CONFIG, **cut})
    monkeypatch.setattr(demo_module, "SHOWN_ROWS", 40)
    return demo_module.CONFIG


def quiet(out: Path, seed: int = 0) -> RunResult:
    return demo(out, seed=seed, console=Console(quiet=True))


def test_one_seed_gives_the_same_metrics_but_for_speed(short: dict[str, Any], tmp_path: Path) -> None:
    def metrics(name: str, seed: int) -> dict[str, Any]:
        quiet(tmp_path / name, seed)
        found = json.loads((tmp_path / name / "metrics.json").read_text())
        del found["tokens_per_second"]
        return found

    assert metrics("a", 0) == metrics("b", 0) != metrics("c", 1)


def test_only_a_former_demo_is_replaced(
    short: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "demo"
    out.mkdir()  # empty: nothing to lose
    quiet(out)
    before = (out / "metrics.json").read_text()
    with caplog.at_level(logging.INFO, "sae_kit"):
        quiet(out, seed=1)
    assert [r.getMessage() for r in caplog.records if "replacing" in r.getMessage()] == [
        f"replacing the former demo in {out}"
    ]
    assert (out / "metrics.json").read_text() != before
    (out / "metrics.json").unlink()
    (out / "results.json").unlink()
    quiet(out)  # interrupted before its end
    tree = trees.load_tree(out / "run.yaml")
    tree["optim"]["lr"] = 1e-3
    (out / "run.yaml").write_text(trees.dump_yaml(tree))
    quiet(out)  # a demo of another version


def test_anything_else_is_left_alone(short: dict[str, Any], tmp_path: Path) -> None:
    def refused(folder: Path) -> None:
        before = sorted(folder.rglob("*")) if folder.is_dir() else None
        with pytest.raises(OutputExistsError, match="is not the run of a demo; nothing was changed"):
            quiet(folder)
        assert before is None or sorted(folder.rglob("*")) == before

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    refused(other)
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file")
    quiet(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").write_text("what I saw")
    refused(tmp_path / "mine")
    (tmp_path / "mine" / "notes.txt").unlink()
    (tmp_path / "mine" / "metrics.json").unlink()  # now it is a finished run of somebody's own
    refused(tmp_path / "mine")


def test_the_current_folder_may_be_the_output(
    short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet(Path("."))
    assert (tmp_path / "saes" / "sae" / "cfg.json").exists()
    assert (tmp_path / "metrics.json").exists()


def test_the_demo_is_an_ordinary_run() -> None:
    """The example file holds the same tree, so that `sae-kit train` can repeat the demo."""
    path = Path(__file__).parents[2] / "examples" / "demo.yaml"
    assert RunConfig.from_dict(trees.load_tree(path)) == RunConfig.from_dict(CONFIG)
