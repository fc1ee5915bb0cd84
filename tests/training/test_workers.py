"""Several SAEs side by side: the same results as one after the other, and errors that are not lost."""

import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from runs import LONG, go, same_end
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.errors import ShapeError, TrainingInterrupted
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback
from sae_kit.training.config import RunConfig
from sae_kit.training.losses import Pass
from sae_kit.training.trainer import SAETrainer
from sae_kit.training.workers import Workers, at_a_time

STEPS, BATCH, WIDTH = 50, 64, 16
TOPK = {"architecture": "topk", "d_sae": 64, "dtype": "float64"}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def config(
    names: tuple[str, ...], steps: int, amp: str = "auto", own: Mapping[str, Any] = MappingProxyType({})
) -> RunConfig:
    entries = {
        name: {
            "hook": "a" if i % 2 else "b",
            "lr": 1e-3 * (i + 1),
            "seed": i,
            "sae": {"d_in": WIDTH, **(own or {**TOPK, "k": 2 + i % 3})},
        }
        for i, name in enumerate("abcdef")
        if name in names
    }
    train = {"tokens": steps * BATCH, "batch_tokens": BATCH, "dead_after_tokens": 10 * BATCH, "amp": amp}
    return RunConfig.from_dict({"saes": entries, "train": train, "log": {"console": False}})


def batches() -> Iterator[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield {site: torch.randn(BATCH, WIDTH, generator=draw) for site in "ab"}


def trained(*names: str, callbacks: tuple[Callback, ...] = (), steps: int = STEPS, **more: Any) -> SAETrainer:
    cfg = config(names, steps, **more)
    saes = {name: entry.sae.build(seed=entry.seed or 0) for name, entry in cfg.saes.items()}
    trainer = SAETrainer(cfg, saes, batches(), callbacks=callbacks)
    trainer.fit()
    return trainer


class Where(Callback):
    """Which threads compute."""

    def __init__(self) -> None:
        self.of: set[str] = set()

    def on_start(self, trainer: SAETrainer) -> None:
        for part in trainer.in_training.values():
            encode = part.sae.training_encoding

            def traced(*args: object, encode: object = encode) -> object:
                self.of.add(threading.current_thread().name)
                return encode(*args)  # pyright: ignore

            part.sae.training_encoding = traced  # pyright: ignore


@pytest.mark.usefixtures("threads")
def test_a_sweep_gives_what_its_runs_give_alone() -> None:
    """Fifty steps in float64: 1e-5 is what is asked for."""
    where = Where()
    together = trained(*"abcdef", callbacks=(where,))
    assert len(where.of) > 1, "several threads compute"
    assert threading.current_thread().name not in where.of
    torch.set_num_threads(1)
    for name in "abcdef":
        alone = trained(name)
        for (what, found), expected in zip(
            together.saes[name].state_dict().items(), alone.saes[name].state_dict().values(), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, w=what: f"{w}: {text}")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sae")], "they end with the run"


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rounded", [False, True])
def test_two_runs_are_equal_bit_for_bit(rounded: bool) -> None:
    """With products of bfloat16, too: gated SAEs use one weight twice, and autocast rounds it once for all threads."""
    own = {"architecture": "gated", "d_sae": 256, "dtype": "float32"} if rounded else {}
    first, second = (trained(*"abcd", steps=30, amp="bf16" if rounded else "auto", own=own) for _ in range(2))
    for name, sae in first.saes.items():
        for found, expected in zip(sae.state_dict().values(), second.saes[name].state_dict().values(), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.usefixtures("threads")
def test_a_callback_that_sees_gradients_sees_one_sae_at_a_time() -> None:
    class Gradients(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[str, list[str]]] = []

        def on_gradients(self, trainer: SAETrainer) -> None:
            having = [name for name, part in trainer.in_training.items() if part.sae.W_dec.grad is not None]
            self.seen.append((threading.current_thread().name, having))

    gradients = Gradients()
    trained(*"ab", callbacks=(gradients,), steps=3)
    assert gradients.seen == [(threading.current_thread().name, [name]) for name in "ab"] * 3


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("own", ["optimizer", "loss"])
def test_what_users_bring_is_called_in_the_thread_of_the_run(own: str) -> None:
    seen = set[str]()

    class SGD(torch.optim.SGD):
        def step(self, *args: Any, **named: Any) -> Any:
            seen.add(threading.current_thread().name)
            return super().step(*args, **named)

    def term(sae: SAE, batch: Batch, run: Pass) -> dict[str, Tensor]:
        seen.add(threading.current_thread().name)
        return {"none": run.y_hat.sum() * 0}

    cfg = config(("a", "b"), 2)
    saes = {name: entry.sae.build() for name, entry in cfg.saes.items()}
    brought = {"optimizer": lambda groups: SGD(groups, lr=1e-3)} if own == "optimizer" else {"loss": term}
    SAETrainer(cfg, saes, batches(), callbacks=(), **brought).fit()  # pyright: ignore
    assert seen == {threading.current_thread().name}


@pytest.mark.usefixtures("threads")
def test_threads_are_shared_and_given_back() -> None:
    workers, numbers = Workers(at_a_time(5, torch.device("cpu"))), set[int]()
    workers.run([lambda: numbers.add(torch.get_num_threads())] * 20)
    assert numbers == {1}
    assert torch.get_num_threads() == 2
    workers.close()


@pytest.mark.usefixtures("threads")
def test_the_first_error_is_raised_when_all_have_ended() -> None:
    workers, ended = Workers(3), []

    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(ShapeError, match="the first"):
        workers.run(
            [
                lambda: fails(ShapeError("the first")),
                lambda: fails(ValueError("the second")),
                lambda: ended.append(1),
            ]
        )
    assert ended == [1]
    workers.close()


@pytest.mark.usefixtures("threads")
def test_an_interrupt_is_raised_when_all_have_ended() -> None:
    workers, ended = Workers(2), []

    def interrupted() -> None:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.2)
        ended.append(1)

    with pytest.raises(KeyboardInterrupt):
        workers.run([interrupted])
    assert ended == [1]
    workers.close()


@pytest.mark.usefixtures("threads")
def test_a_run_of_several_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """Stopped by a signal and gone on with, while threads make the steps and another one the rows."""
    sections = {name: LONG[name] for name in ("buffer", "optim", "checkpoint")}
    sections |= {"saes": {name: LONG["saes"][name] for name in ("jumprelu", "batchtopk", "resampled", "clt")}}
    where = Where()
    whole = go(tmp_path / "whole", where, **sections).folder
    assert where.of
    assert threading.current_thread().name not in where.of

    class Stop(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            if trainer.steps == 3:
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        go(tmp_path / "parts", Stop(), **sections)
    same_end(go(tmp_path / "parts", **sections).folder, whole)
