"""Several SAEs side by side: the same results as one after the other, and errors that are not lost."""

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from sae_kit.errors import ShapeError
from sae_kit.training.callbacks import Callback
from sae_kit.training.config import RunConfig
from sae_kit.training.trainer import SAETrainer
from sae_kit.training.workers import Workers

STEPS, BATCH, WIDTH = 50, 64, 16


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def config(names: tuple[str, ...], steps: int) -> RunConfig:
    entries = {
        name: {
            "hook": "a" if i % 2 else "b",
            "lr": 1e-3 * (i + 1),
            "seed": i,
            "sae": {"architecture": "topk", "d_in": WIDTH, "d_sae": 64, "k": 2 + i % 3, "dtype": "float64"},
        }
        for i, name in enumerate("abcdef")
        if name in names
    }
    train = {"tokens": steps * BATCH, "batch_tokens": BATCH, "dead_after_tokens": 10 * BATCH}
    return RunConfig.from_dict({"saes": entries, "train": train, "log": {"console": False}})


def batches() -> Iterator[dict[str, Tensor]]:
    draw = torch.Generator().manual_seed(0)
    while True:
        yield {site: torch.randn(BATCH, WIDTH, generator=draw) for site in "ab"}


def trained(*names: str, callbacks: tuple[Callback, ...] = (), steps: int = STEPS) -> SAETrainer:
    cfg = config(names, steps)
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
def test_two_runs_are_equal_bit_for_bit() -> None:
    first, second = trained(*"abcd", steps=10), trained(*"abcd", steps=10)
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
def test_threads_are_shared_and_given_back() -> None:
    workers, numbers = Workers(5), set[int]()
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
