"""Callbacks in real runs: what is shown and sent, what a failure costs, what goes on after a resume."""

import importlib.util
import logging
import re
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers import BATCH, make_sae, run_config, sparse_batches

from sae_kit import SAETrainer
from sae_kit.data.batch import Batch, State
from sae_kit.errors import ConfigError
from sae_kit.training.callbacks import (
    Callback,
    Callbacks,
    Console,
    EarlyStop,
    Metrics,
    Timer,
    Wandb,
    configured_callbacks,
    histograms,
)
from sae_kit.training.callbacks.console import headline
from sae_kit.training.callbacks.early_stop import EarlyStopConfig

EACH = {"console": False, "every_tokens": BATCH}


def trainer_of(callbacks: list[Callback], steps: int = 6, several: bool = False, **sections: Any) -> SAETrainer:
    """A trainer on sparse combinations that logs after each step."""
    sae = make_sae("topk")
    saes = {"one": sae, "two": make_sae("topk", seed=1)} if several else sae
    cfg = run_config(steps, **{"log": EACH, **sections})
    return SAETrainer(cfg, saes, sparse_batches(sae, steps), callbacks=callbacks)


# ---- the list of callbacks -------------------------------------------------------------------------------------------


class Counting(Callback):
    """Counts rows over attempts."""

    def __init__(self) -> None:
        self.rows = 0

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self.rows += 1

    def state_dict(self) -> State:
        return {"rows": self.rows}

    def load_state_dict(self, state: State) -> None:
        self.rows = state["rows"]


def test_an_essential_callback_ends_the_run_and_is_closed() -> None:
    class Disk(Callback):
        essential: ClassVar[bool] = True
        closed = 0

        def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            self.closed += 1

    disk = Disk()
    with pytest.raises(OSError, match="no space left"):
        trainer_of([disk]).fit()
    assert disk.closed == 1


def test_events_come_in_order() -> None:
    seen: list[str] = []

    class Watch(Callback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_") or name in ("metrics", "close"):
                seen.append(name)
            return super().__getattribute__(name)

    trainer_of([Watch()], steps=2).fit()
    step = ["on_step_start", "on_gradients", "metrics", "on_log", "on_step_end"]
    assert seen == ["on_start", *step, *step, "on_end", "close"]


def test_states_are_kept_by_kind_and_place() -> None:
    first, second, stateless = Counting(), Counting(), Callback()
    first.rows, second.rows = 3, 5
    saved = Callbacks([first, stateless, second]).state_dict()
    assert saved == {"Counting.0": {"rows": 3}, "Counting.1": {"rows": 5}}
    again = [Counting(), Callback(), Counting(), Counting()]
    Callbacks(again).load_state_dict(saved)
    assert [c.rows for c in again if isinstance(c, Counting)] == [3, 5, 0]
    fewer = Counting()
    Callbacks([fewer]).load_state_dict(saved)
    assert fewer.rows == 3


def test_a_dropped_callback_has_no_state_and_leaves_the_places_of_others(caplog: pytest.LogCaptureFixture) -> None:
    class Breaks(Counting):
        def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
            raise RuntimeError("gone")

    class Unsaved(Counting):
        def state_dict(self) -> State:
            raise RuntimeError("cannot be saved")

    healthy = Counting()
    trainer = trainer_of([Breaks(), Unsaved(), healthy])
    trainer.fit()
    assert trainer.callbacks.state_dict() == {"Counting.0": {"rows": 6}}
    assert list(trainer.callbacks) == [healthy]
    assert "Unsaved failed in state_dict and is switched off; the run goes on" in caplog.text


def test_a_callback_adds_to_the_rows_that_others_get() -> None:
    rows: list[Metrics] = []

    class Adds(Callback):
        def metrics(self, trainer: SAETrainer) -> Metrics:
            return {"mine/steps": trainer.steps}

    class Watch(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
            rows.append(metrics)

    trainer_of([Watch(), Adds()], steps=3).fit()
    assert [row["mine/steps"] for row in rows] == [1, 2, 3]


def test_the_config_says_which_callbacks_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(**sections: Any) -> list[str]:
        return [type(c).__name__ for c in configured_callbacks(run_config(3, **sections), tmp_path)]

    assert kinds(log={}) == ["Timer", "Console", "JSONL"]
    assert kinds(log={"console": False, "jsonl": False}) == ["Timer"]
    wandb = {"project": "p", "mode": "disabled"}
    every = kinds(log={"csv": True, "wandb": wandb}, train={"early_stop": {"metric": "metrics/fvu"}})
    assert every == ["Timer", "Console", "JSONL", "CSV", "Wandb", "EarlyStop"]
    with pytest.raises(ConfigError, match=r"histograms: they are sent to Weights & Biases"):
        kinds(log={"histograms": True})


# ---- console ---------------------------------------------------------------------------------------------------------


def test_lines_say_how_a_run_is(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sae_kit"):
        trainer_of([Console()], steps=2).fit()
    first, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("64 / 128 tokens  loss ")
    for word in ("  L0 8  ", "  EV ", "  dead ", " tokens/s  ETA 0:0"):
        assert word in first
    assert last.endswith("ETA 0:00:00")


def test_several_saes_are_shown_from_the_smallest_to_the_largest() -> None:
    row = {"losses/overall_loss": 0.5, "metrics/l0": 32.0, "metrics/explained_variance": 0.75}
    assert headline(row) == "loss 0.5  L0 32  EV 0.75"
    several = {
        f"{name}/{key}": value * factor for name, factor in (("a", 1.0), ("b", 0.5)) for key, value in row.items()
    }
    assert headline(several) == "loss 0.25–0.5  L0 16–32  EV 0.375–0.75"
    assert headline({"a/losses/overall_loss": 0.5, "b/losses/overall_loss": float("nan")}) == "loss 0.5 (and nan)"
    assert headline({"losses/overall_loss": float("nan")}) == "loss nan"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    trainer_of([Console()], several=True).fit()
    shown = capsys.readouterr().err
    assert "training 2 SAEs" in shown
    assert "384/384" in shown
    assert "EV " in shown


def test_what_is_held_out_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sae_kit"):
        trainer = trainer_of([])
        row = {"evals/reconstruction_quality/explained_variance": 0.5}
        row["evals/model_performance_preservation/ce_loss_score"] = 0.875
        Console().on_eval(trainer, row)
    assert caplog.messages == ["held out at 0 tokens: EV 0.5  CE score 0.875"]


# ---- early stop ------------------------------------------------------------------------------------------------------


def stopped_after(several: bool = False, **fields: Any) -> int:
    config = EarlyStopConfig(**{"metric": "losses/overall_loss", "min_delta": 1e9, "patience": 3, **fields})
    return trainer_of([EarlyStop(config)], steps=12, several=several).fit().steps


def test_a_run_stops_when_nothing_improves(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sae_kit"):
        assert stopped_after() == 4, "the first row is the best so far, and three are waited for"
    assert (
        "stopping at 256 tokens: losses/overall_loss has not improved for 3 rows; best: losses/overall" in caplog.text
    )
    assert stopped_after(patience=2) == 3
    assert stopped_after(several=True) == 4
    trainer = trainer_of([EarlyStop(EarlyStopConfig(metric="losses/overall_loss", patience=3, min_delta=1e9))], steps=4)
    trainer.fit()
    assert trainer.callbacks.stop_reason is None, "at the end there is nothing left to stop"
    assert stopped_after(min_delta=0.0) == 12, "the loss falls in most steps"
    assert stopped_after(min_delta=0.0, mode="max") < 12, "it does not rise"


def row(trainer: SAETrainer, stop: EarlyStop, **values: float | None) -> str | None:
    stop.on_eval(trainer, {f"{name}/evals/x/ce_loss_score": value for name, value in values.items()})
    return trainer.callbacks.stop_reason


def test_every_sae_has_to_have_stopped_improving() -> None:
    trainer = trainer_of([], several=True)
    stop = EarlyStop(EarlyStopConfig(metric="evals/x/ce_loss_score", patience=2))
    assert row(trainer, stop, one=0.5, two=0.5) is None
    assert row(trainer, stop, one=0.4, two=0.6) is None
    assert row(trainer, stop, one=float("nan"), two=0.7) is None
    assert row(trainer, stop, one=None, two=0.7) is None
    continued = EarlyStop(EarlyStopConfig(metric="evals/x/ce_loss_score", patience=2))
    continued.load_state_dict(stop.state_dict())
    assert row(trainer, continued, one=0.45, two=0.65) is not None, "what was seen before counts"
    reason = "evals/x/ce_loss_score has not improved for 2 rows; best: one/evals/x/ce_loss_score 0.5, "
    assert trainer.callbacks.stop_reason == reason + "two/evals/x/ce_loss_score 0.7"


def test_an_sae_that_is_out_does_not_hold_up_the_others() -> None:
    trainer = trainer_of([], several=True)
    stop = EarlyStop(EarlyStopConfig(metric="evals/x/ce_loss_score", patience=1))
    assert row(trainer, stop, one=0.5, two=0.5) is None
    assert row(trainer, stop, two=0.4) is not None


def test_a_metric_that_is_not_there_ends_the_run_at_once() -> None:
    with pytest.raises(ConfigError, match=r"'losses/overal_loss' is not .* Did you mean 'losses/overall_loss'\?"):
        stopped_after(metric="losses/overal_loss", several=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"metric": "metrics/l0"}, "whether a lower or a higher metrics/l0 is better is not known: say min or max"),
        ({"metric": "metrics/fvu", "patience": 0}, "patience must be at least 1"),
        ({"metric": "metrics/fvu", "min_delta": -0.1}, "min_delta must be at least 0"),
    ],
)
def test_impossible_stops(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EarlyStopConfig(**fields)
    assert EarlyStopConfig(metric="metrics/l0", mode="min").mode == "min"


# ---- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_time_is_told_apart(device: str) -> None:
    rows: list[Metrics] = []

    class Watch(Callback):
        def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
            rows.append(metrics)
            time.sleep(0.05)  # counts as neither

    class SlowSteps(Callback):
        def on_gradients(self, trainer: SAETrainer) -> None:
            time.sleep(0.03)

    def slow(batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            time.sleep(0.1)
            yield batch

    trainer = trainer_of([Timer(), Watch(), SlowSteps()], steps=4, train={"device": device})
    trainer.batches = slow(sparse_batches(make_sae("topk"), 4))
    start = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - start
    waits, steps = ([float(row[f"perf/{name}_seconds"] or 0) for row in rows] for name in ("wait", "step"))
    assert min(waits) >= 0.1
    assert min(steps) >= 0.03
    assert sum(waits) + sum(steps) <= seconds - 4 * 0.05
    assert (0.05 if device == "cpu" else 1e-5) < float(rows[-1]["perf/peak_memory_gib"] or 0) < 1000


# ---- the user's own --------------------------------------------------------------------------------------------------


class Writer:
    """What the page uses of TensorBoard's writer, for machines that do not have it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: dict[str, list[int]] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.setdefault(name, []).append(step)

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.add_scalar(name, values.mean().item(), step)

    def close(self) -> None:
        (self.folder / "events.out.tfevents.stand-in").write_text(str(self.seen))


def test_the_sink_of_the_documentation_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the real package where it is installed."""
    if importlib.util.find_spec("tensorboard") is None:
        module = types.ModuleType("torch.utils.tensorboard")
        vars(module)["SummaryWriter"] = Writer
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```$", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    board = names["TensorBoard"](tmp_path)
    trainer = trainer_of([board])
    trainer.fit()
    assert list(trainer.callbacks) == [board], "it did not fail on the way"
    (events,) = tmp_path.glob("events.out.tfevents.*")
    content = events.read_bytes()
    for name in (b"losses/mse_loss", b"metrics/explained_variance", b"plots/feature_density_line_chart"):
        assert name in content


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)


def wandb_of(folder: Path, **fields: Any) -> Wandb:
    log = {"wandb": {"project": "p", "mode": "offline", **fields}, "histograms": True}
    (found,) = (c for c in configured_callbacks(run_config(3, log=log), folder) if isinstance(c, Wandb))
    return found


def kept(folder: Path) -> list[tuple[str, bytes]]:
    """Id and content of the runs in a folder, in the order of time."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    return [(path.stem.removeprefix("run-"), path.read_bytes()) for path in files]


@pytest.mark.usefixtures("quiet")
def test_wandb_keeps_rows_histograms_and_saes(tmp_path: Path) -> None:
    (tmp_path / "saes").mkdir()
    make_sae("topk").save_model(tmp_path / "saes" / "sae")

    class Save(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == 3:
                trainer.callbacks.call("on_checkpoint", trainer, tmp_path)

    trainer_of([wandb_of(tmp_path, artifacts=True), Save()]).fit()
    ((run_id, content),) = kept(tmp_path)
    for name in (b"metrics/explained_variance", b"plots/feature_density_line_chart", b"weights/W_dec_norms"):
        assert content.count(name) >= 6, "in every row"
    assert b"sae_weights.safetensors" in content
    assert f"{run_id}-checkpoint".encode() in content
    assert f"{run_id}-saes".encode() in content
    trainer_of([wandb_of(tmp_path / "without")]).fit()
    ((_, content),) = kept(tmp_path / "without")
    assert b"sae_weights.safetensors" not in content


@pytest.mark.usefixtures("quiet")
def test_wandb_keeps_its_id_when_a_run_is_continued(tmp_path: Path) -> None:
    first = trainer_of([wandb_of(tmp_path)])
    first.fit()
    time.sleep(1.1)  # folders of wandb are named by the second
    second = trainer_of([wandb_of(tmp_path)])
    second.callbacks.load_state_dict(first.callbacks.state_dict())
    second.fit()
    (one, _), (two, _) = kept(tmp_path)
    assert one == two
    chosen = wandb_of(tmp_path, id="chosen")
    chosen.load_state_dict({"id": "other"})
    assert chosen.state_dict() == {"id": "chosen"}


class OnlineRun:
    """What a run of wandb is asked for."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.id = settings, settings["id"] or "new"
        self.rows: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.usefixtures("quiet")
def test_what_is_configured_reaches_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[OnlineRun] = []
    monkeypatch.setattr("wandb.init", lambda **settings: runs.append(OnlineRun(**settings)) or runs[-1])
    fields = {"entity": "us", "name": "n", "group": "g", "tags": ["a", "b"], "mode": "online"}
    first = trainer_of([wandb_of(tmp_path, **fields)], steps=2)
    first.fit()
    wanted = {**fields, "project": "p", "id": None, "resume": "allow", "dir": str(tmp_path)}
    assert {name: runs[0].settings[name] for name in wanted} == wanted
    assert runs[0].settings["config"]["train"]["tokens"] == 2 * BATCH
    assert runs[0].metrics == [("tokens", None), ("*", "tokens")]
    assert [row["tokens"] for row in runs[0].rows] == [BATCH, 2 * BATCH]
    assert runs[0].exit_code == 0

    class Fails(Callback):
        essential: ClassVar[bool] = True

        def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
            raise RuntimeError("an essential one")

    second = trainer_of([wandb_of(tmp_path, mode="online", resume="must"), Fails()])
    second.callbacks.load_state_dict(first.callbacks.state_dict())
    with pytest.raises(RuntimeError, match="an essential one"):
        second.fit()
    assert (runs[1].settings["id"], runs[1].settings["resume"]) == ("new", "must")
    assert runs[1].settings["name"] == tmp_path.name, "without a name, that of the folder"
    assert runs[1].exit_code == 1

    stages = trainer_of([wandb_of(tmp_path / "stages", mode="online", resume="never")], steps=2)
    stages.fit(BATCH)
    stages.fit()
    assert [run.settings["resume"] for run in runs[2:]] == ["never", "allow"], "the first stage has made it"


@pytest.mark.usefixtures("quiet")
def test_a_wandb_that_is_not_there_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The real client against a port where nobody listens."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    with caplog.at_level(logging.WARNING, "sae_kit"):
        assert trainer_of([wandb_of(tmp_path, mode="online", id="mine")]).fit().steps == 6
    assert "Weights & Biases cannot be reached" in caplog.text
    assert "switched off" not in caplog.text
    ((run_id, content),) = kept(tmp_path)
    assert run_id == "mine"
    assert b"metrics/explained_variance" in content


@pytest.mark.usefixtures("quiet")
def test_a_wandb_that_dies_on_the_way_is_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dying, healthy = wandb_of(tmp_path), Counting()

    class Kill(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == 2:
                dying._run.finish()

    assert trainer_of([dying, Kill(), healthy]).fit().steps == 6
    assert caplog.text.count("Wandb failed in on_log and is switched off; the run goes on") == 1
    assert healthy.rows == 6


def test_histograms_are_of_every_latent() -> None:
    trainer = trainer_of([], steps=4, several=True)
    trainer.fit()
    found = histograms(trainer)
    assert set(found) == {
        f"{n}/{k}" for n in ("one", "two") for k in ("plots/feature_density_line_chart", "weights/W_dec_norms")
    }
    sae = trainer.saes["two"]
    torch.testing.assert_close(found["two/weights/W_dec_norms"], sae.W_dec.detach().norm(dim=1))
    density = 10 ** found["two/plots/feature_density_line_chart"].double()
    assert density.sum().item() == pytest.approx(8, rel=1e-3), "k latents fire in each row"
    assert set(histograms(trainer_of([]))) == {"plots/feature_density_line_chart", "weights/W_dec_norms"}
