"""Before the first token: what is counted is what comes, what is measured is measured, what cannot be is said."""

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import BATCH, HOOK, config, go
from torch import Tensor

from sae_kit import SAETrainer
from sae_kit.cli import main
from sae_kit.data.mixing import Mixing
from sae_kit.errors import ConfigError, DiskFullError, OutputExistsError
from sae_kit.training import memory, outline
from sae_kit.training import plan as planning
from sae_kit.training.building import build_saes
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.inputs import open_inputs
from sae_kit.training.plan import plan
from sae_kit.training.run import cache_activations

EVALUATED: dict[str, Any] = {"tokens": 256, "fidelity_tokens": 128, "at_end": True}
TOPK = {"architecture": "topk", "d_sae": 64, "k": 4}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement is made once: how long things take on this machine is no matter here."""
    monkeypatch.setattr(planning, "ENOUGH_SECONDS", 1e-9)


@pytest.mark.parametrize(
    "fields",
    [{}, {"name": "adamw", "amsgrad": True}, {"name": "signum"}, {"name": "sgd", "momentum": 0.0}, {"ema": 0.9}],
)
def test_what_the_optimizer_keeps(tmp_path: Path, fields: dict[str, Any]) -> None:
    cfg = config(tmp_path, optim={"lr": 1e-3, **fields})
    inputs, _ = open_inputs(cfg, None, None, None)
    saes = build_saes(cfg, inputs)
    counted = memory.moments(cfg.optim, saes["sae"]), memory.averages(cfg.optim, saes["sae"])
    trainer = SAETrainer(cfg, saes, [torch.randn(BATCH, saes["sae"].cfg.d_in or 0)], callbacks=[])
    trainer.fit()
    part = trainer.in_training["sae"]
    kept = [t for state in part.optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    averages = [] if part.ema is None else part.ema.weights.values()
    assert counted == (memory.size(kept), memory.size(averages))


def test_the_parts_of_the_stream_are_what_it_allocates(tmp_path: Path) -> None:
    cfg = config(tmp_path, buffer={"tokens": 4 * BATCH, "dtype": "bfloat16"})
    inputs, live = open_inputs(cfg, None, None, None)
    assert live is not None
    store = inputs.open()
    found = memory.lasting_parts(cfg, build_saes(cfg, inputs), inputs, store, live.model)
    store.fill()
    assert isinstance(store.mixed, Mixing)
    state = store.mixed.state_dict()
    there = {part.name: part.bytes for part in found}
    assert there["buffer"] == memory.size(state["buffer"]["rows"].values()) == 4 * BATCH * 128 * 2
    batch = next(store)
    assert there["batches"] == memory.size(batch.values())
    weights = sum(p.nbytes for p in {p.data_ptr(): p for p in live.model.parameters()}.values())
    assert weights <= there["model"] < 1.01 * weights, "tied weights once, and tables of rotary positions"


@pytest.mark.parametrize(
    "sections",
    [
        {"checkpoint": {"every_tokens": "30%"}, "eval": {"every_tokens": "25%"}},
        {"checkpoint": {"every_tokens": None, "spacing": "log", "count": 3, "final": True}},
        {"checkpoint": {"every_tokens": 100, "milestones": [300]}, "eval": {"every_tokens": 50, "at_end": False}},
        {"checkpoint": {"every_tokens": 2 * BATCH, "buffer": "drop"}, "optim": {"ema": 0.9}},
    ],
)
def test_counts_are_those_of_the_run(tmp_path: Path, sections: dict[str, Any]) -> None:
    """Steps, evaluations, checkpoints; and what these take on the disk."""
    sizes: list[int] = []

    class Sizes(Callback):
        def on_checkpoint(self, trainer: SAETrainer, path: Path) -> None:
            sizes.append(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))

    sections = {**sections, "eval": {"every_tokens": None, **EVALUATED, **sections.get("eval", {})}}
    cfg = config(tmp_path, **sections)
    planned = plan(cfg)
    assert not any(tmp_path.iterdir()), "nothing was written"
    result = go(tmp_path, Sizes(), **sections)
    rows = read_metrics(result.folder / "metrics.jsonl")
    assert (planned.tokens, planned.steps) == (result.training.tokens, result.training.steps)
    assert planned.evaluations == sum(any("evals/" in name for name in row) for row in rows)
    assert planned.disk.checkpoints == len(sizes)
    assert planned.disk.newest - memory_overhead() < max(sizes) < 1.05 * planned.disk.newest
    (sae,) = planned.saes
    assert sae.parameters == sum(p.numel() for p in result.training.saes["sae"].parameters())
    assert (sae.architecture, sae.reads, sae.d_in, sae.latents) == ("topk", (HOOK,), 128, 64)
    assert planned.buffer == 4 * BATCH


def memory_overhead() -> int:
    """What the estimate of a checkpoint allows for files that are no tensors."""
    return outline.OVERHEAD


def test_a_rehearsal_measures_and_leaves_nothing(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    found = plan(config(tmp_path, eval=EVALUATED))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.name for part in found.meanwhile] == ["a step", "a forward", "an evaluation"]
    # A forward of 16 rows of 32 makes at least the activations of an MLP; logits are wider.
    forward, evaluation = (part.bytes for part in found.meanwhile[1:])
    assert 16 * 32 * 128 * 4 < forward < evaluation < 2**30
    assert found.timing is not None
    assert found.timing.forwards == 3, "1,024 activations from forwards of 512 ids, some of which are excluded"
    assert min(found.timing.reading, found.timing.steps, found.timing.evaluating) > 0
    assert found.timing.total == pytest.approx(found.timing.reading + found.timing.steps + found.timing.evaluating)
    assert not any(tmp_path.iterdir())


def test_steps_side_by_side_take_memory_side_by_side(tmp_path: Path) -> None:
    """One after the other they take turns with it: gradients are gone when the next SAE has its step."""
    before = torch.get_num_threads()

    def planned(number: int, threads: int) -> tuple[int, int]:
        torch.set_num_threads(threads)
        entry = {"hook": HOOK, "sae": {**TOPK, "d_sae": 512}}
        found = plan(config(tmp_path, saes={f"s{i}": entry for i in range(number)}))
        (gradients,) = (part.bytes for part in found.lasting if part.name == "gradients")
        return gradients, found.meanwhile[0].bytes

    try:
        alone, in_turn, together = planned(1, 1), planned(3, 1), planned(3, 2)
    finally:
        torch.set_num_threads(before)
    assert alone[1] > 512 * 128 * 4
    assert in_turn == pytest.approx(alone, rel=0.2)
    assert together == pytest.approx([2 * alone[0], 2 * alone[1]], rel=0.2)
    assert (in_turn[0], together[0]) == (alone[0], 2 * alone[0])


def test_what_goes_on_says_so(tmp_path: Path) -> None:
    folder = go(tmp_path, checkpoint={"every_tokens": 4 * BATCH}).folder
    (folder / "results.json").unlink()
    assert [note for note in plan(config(tmp_path)).notes if "goes on from" in note] == [
        f"goes on from {folder / 'checkpoints' / '000000000512'}, with 512 tokens behind it; what is shown is of the "
        "whole run"
    ]


def test_a_rehearsal_that_runs_out_of_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(SAETrainer, "step", full)
    found = plan(config(tmp_path))
    assert found.timing is None
    assert found.notes[-1] == "memory does not suffice: a rehearsal ended with 'CUDA out of memory'"


def test_memory_is_the_most_at_a_time() -> None:
    def work() -> None:
        kept = torch.empty(2**20)
        del kept
        both = torch.empty(2**20), torch.empty(2**19)
        del both

    assert memory.peak_of(work, torch.device("cpu")) == 6 * 2**20


@pytest.mark.parametrize(
    "entry",
    [
        {"hook": "blocks.1.mlp.hook_in", "hook_out": "blocks.1.hook_mlp_out", "sae": {**TOPK, "skip": True}},
        {"hook": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"], "sae": TOPK},
        {"hook": HOOK, "sae": TOPK, "end_to_end": {"kl": 1.0}},
    ],
    ids=["transcoder", "crosscoder", "end to end"],
)
def test_every_kind_of_sae_is_rehearsed(tmp_path: Path, entry: dict[str, Any]) -> None:
    buffer = {"buffer": {"tokens": "auto"}} if "end_to_end" in entry else {}
    found = plan(config(tmp_path, saes={"sae": entry}, **buffer))
    assert found.timing is not None
    assert found.timing.steps > 0


def test_a_cache_is_rehearsed_without_a_model(tmp_path: Path) -> None:
    folder = cache_activations(config(tmp_path, cache={"write": str(tmp_path / "cache")}))
    cfg = config(tmp_path, cache={"read": str(folder)})
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, name=None),
        data=dataclasses.replace(cfg.data, sources=()),
    )
    found = plan(cfg)
    assert "model" not in [part.name for part in found.lasting]
    assert found.timing is not None
    assert (found.evaluations, found.timing.forwards) == (0, None)
    assert found.timing.reading > 0


# ---- what cannot go well ---------------------------------------------------------------------------------------------


def test_what_is_probably_not_meant_is_said_and_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (memory, outline):
        monkeypatch.setattr(module, "available", lambda _: (2**10, 2**40))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * 2**20))
    saes = {"sae": {"hook": HOOK, "sae": {**TOPK, "dead_after_tokens": 8 * BATCH}}}
    changes: dict[str, Any] = {"saes": saes, "checkpoint": {"every_tokens": 2 * BATCH, "keep": 3}}
    found = plan(config(tmp_path, **changes))
    assert found.timing is None, "it would not have fitted"
    dead, room, disk = found.notes
    assert dead == "dead_after_tokens of sae is not below train.tokens = 1,024: no latent will count as dead"
    assert room.startswith("memory may not suffice on cpu: 1.0 KiB are free, and about")
    assert disk.startswith("the disk may become full: up to")
    with caplog.at_level(logging.INFO, "sae_kit"):
        assert go(tmp_path, **changes).training.steps == 8
    assert all(note.split(":")[0] in caplog.text for note in found.notes)
    assert "1 SAE of 16,576 parameters, 8 steps; memory: about" in caplog.text


def test_no_room_for_one_checkpoint_is_an_error_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**18))
    with pytest.raises(DiskFullError, match=r"no room for a checkpoint and the trained SAEs in .*262,144 are free"):
        go(tmp_path, checkpoint={"every_tokens": BATCH})
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**10))
    with pytest.raises(DiskFullError, match="no room for the trained SAEs in"):
        go(tmp_path)


def test_a_gpu_that_is_too_small_in_any_case_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(config(tmp_path))
    gpu = torch.device("cuda:0")
    on_gpu = tuple(dataclasses.replace(part, device=gpu) for part in found.lasting)
    monkeypatch.setattr(outline, "available", lambda _: (0, 2**10))
    with pytest.raises(ConfigError, match=r"this run holds .* on cuda:0, which has 1\.0 KiB: a smaller buffer\.tokens"):
        list(outline._about_memory(dataclasses.replace(found, lasting=on_gpu)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"buffer": {"tokens": BATCH}}, "buffer.tokens: expected at least two batches of 128, found 128"),
        ({"saes": {"sae": {"hook": HOOK, "sae": {**TOPK, "k": 65}}}}, "k"),
        ({"saes": {}}, "there is no SAE to train"),
        ({"data": {"context_size": 300}}, "data.context_size: expected at most 256"),
        ({"train": {"device": "cuda:9"}}, "train.device"),
        ({"checkpoint": {"resume": "must"}}, "there is no checkpoint"),
    ],
)
def test_a_dry_run_is_refused_like_the_run(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    errors: list[str] = []
    for attempt in (lambda: plan(config(tmp_path, **changes)), lambda: go(tmp_path, **changes)):
        with pytest.raises(ConfigError) as found:
            attempt()
        errors.append(str(found.value))
    assert message in errors[0]
    assert errors[0] == errors[1]


def test_a_taken_folder_and_texts_for_once_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists and is not empty"):
        plan(config(tmp_path))
    with pytest.raises(ConfigError, match="an iterator gives them only once: pass a list"):
        plan(config(tmp_path), documents=iter(["a"]))


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_shows_what_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", "demo", "--dataset", "demo", "--hook", HOOK, "--tokens", "2048", "--sae.d_sae", "64"]
    words += ["--data.context_size", "32", "--train.batch_tokens", "256", "--out", str(tmp_path / "out"), "--dry-run"]
    words += ["--eval.tokens", "256", "--eval.fidelity_tokens", "128", "--data.rows_per_forward", "16"]
    assert main([*words, "sweep.grid.sae.k=[2,4]", "sweep.grid.train.batch_tokens=[256,512]"]) == 0
    printed, said = capsys.readouterr()
    for expected in ("topk", "16,576", "during an evaluation", "2,048 in 8 steps", "8 of 256 held-out", "time "):
        assert expected in printed
    assert printed.count("most at a time") == 2
    assert printed.count("k2") == printed.count("k4") == 2
    assert "USDT" not in said, "what the profiler says is not for users"
    assert not (tmp_path / "out").exists()
