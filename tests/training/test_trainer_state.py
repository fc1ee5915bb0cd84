"""2N steps in one go are N steps, a save, new objects and N steps more: bit for bit, whatever the step is made of."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BATCH, every_trainable, make_config, run_config, sparse_batches
from torch import Tensor
from trees import equal

from sae_kit import SAEMetadata, SAETrainer, list_architectures
from sae_kit.annealing import KAnnealing, PAnnealing
from sae_kit.data.batch import State
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.states import read_state, write_state
from sae_kit.training.callbacks import Callback
from sae_kit.training.part import SAEInTraining

STEPS = 24
AUXK: dict[str, Any] = {"dead_after_tokens": 2 * BATCH, "aux_coefficient": 0.5}
OPTIM: dict[str, Any] = {"lr": 3e-3, "amsgrad": True, "ema": 0.5}
TRAIN: dict[str, Any] = {"density_window_tokens": 5 * BATCH, "accumulate": 2}
RESAMPLE = {"interval_tokens": 7 * BATCH, "window_tokens": BATCH, "times": 3, "rows": 4 * BATCH}
Fields = dict[str, tuple[str, dict[str, Any]]]
"""Name of the SAE -> architecture and fields."""


class Rows(Callback):
    """What was logged."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_log(self, trainer: SAETrainer, metrics: Any) -> None:
        self.found.append({key: value for key, value in metrics.items() if not key.startswith("perf/")})


class Run:
    """A trainer of some SAEs at the start of a fixed stream."""

    def __init__(self, fields: Fields, **sections: Any) -> None:
        self.saes: dict[str, SAE] = {
            name: make_config(architecture, metadata=SAEMetadata(hook_name="site"), **own).build(seed=3)
            for name, (architecture, own) in fields.items()
        }
        for sae in self.saes.values():
            if "b_enc" in sae._parameters:
                sae.b_enc.data[..., ::4] -= 3  # some latents die
        log = {"console": False, "every_tokens": 5 * BATCH}
        cfg = run_config(STEPS, **({"log": log, "optim": OPTIM, "train": TRAIN} | sections))
        self.rows = Rows()
        self.first = next(iter(self.saes.values()))
        self.trainer = SAETrainer(cfg, self.saes, self._stream(0), callbacks=[self.rows])

    def _stream(self, skipped: int) -> Iterator[dict[str, Tensor]]:
        for number, batch in enumerate(sparse_batches(self.first, STEPS)):
            if number >= skipped:
                yield {"site": batch.x}

    def steps(self, number: int) -> None:
        """So many more steps, logged as `fit` logs them."""
        trainer = self.trainer
        stream = self._stream(trainer.steps)
        for _ in range(number):
            rows = trainer.step(next(stream))
            if trainer.tokens % (5 * rows) == 0:
                trainer.callbacks.call("on_log", trainer, trainer._metrics())

    def state(self) -> State:
        tensors = {name: dict(sae.state_dict()) for name, sae in self.saes.items()}
        return {"trainer": self.trainer.state_dict(), "tensors": tensors}

    def load(self, state: State) -> None:
        for name, sae in self.saes.items():
            sae.load_state_dict(state["tensors"][name])
        self.trainer.load_state_dict(state["trainer"])


def check_resume(
    tmp_path: Path, fields: dict[str, tuple[str, dict[str, Any]]], half: int = STEPS // 2, **sections: Any
) -> Run:
    """Compare at the end every tensor and number, and every row that was logged; returns the run in one go."""
    whole, first, second = (Run(fields, **sections) for _ in range(3))
    whole.steps(STEPS)
    first.steps(half)
    write_state(tmp_path, "state", first.state())
    second.load(read_state(tmp_path, "state"))
    second.steps(STEPS - half)
    equal(second.state(), whole.state(), "state")
    assert whole.rows.found
    equal(first.rows.found + second.rows.found, whole.rows.found, "rows")
    return whole


@every_trainable
def test_every_architecture_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    has_pre = list_architectures()[name].sae.has_preactivations
    whole = check_resume(tmp_path, {"sae": (name, AUXK if has_pre else {})})
    aux = whole.rows.found[-1].get("losses/auxiliary_reconstruction_loss", 0.0)
    assert aux > 0 or not has_pre, "AuxK is at work"
    assert whole.trainer.in_training["sae"].ema is not None


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("topk", {"k": 6, "k_annealing": KAnnealing(start=16, tokens="80%")}),
        ("batchtopk", {"k": 6, "k_annealing": KAnnealing(start=16, tokens="50%")}),
        ("standard", {"p_annealing": PAnnealing(start_tokens=0, end_tokens="100%", n_updates=5, window=4)}),
        ("standard", {"target_l0": 5.0, "l1_warm_up_tokens": "20%"}),
        ("jumprelu", {"target_l0": 5.0, "threshold_lr_factor": 0.5, "jumprelu_bandwidth": 0.5}),
        ("gated", {"target_l0": 5.0, "normalize_activations": "expected_average_only_in"}),
        ("matryoshka_batchtopk", {"matryoshka_random_prefixes": 3}),
    ],
)
def test_whatever_changes_in_the_course_of_a_run(name: str, own: dict[str, Any], tmp_path: Path) -> None:
    whole = Run({"sae": (name, own)})
    if whole.first.norm_in.needs_estimate:
        own = own | {"normalize_activations": "none"}
    check_resume(tmp_path, {"sae": (name, own)}, half=11)


@pytest.mark.parametrize(
    "optim", [{"name": "signum"}, {"name": "sgd"}, {"name": "adamw", "weight_decay": 0.1}, {"fused": False}], ids=str
)
def test_every_optimizer(optim: dict[str, Any], tmp_path: Path) -> None:
    check_resume(tmp_path, {"sae": ("jumprelu", AUXK)}, optim={"lr": 3e-3, **optim})


@pytest.mark.parametrize("half", [5, 7, 12, 13])
def test_two_saes_with_resampling_and_averages(half: int, tmp_path: Path) -> None:
    """Saved also while rows are collected, and just after latents were drawn anew."""
    entry = {"hook": "site", "resample": RESAMPLE}
    saes = {name: {**entry, "sae": {"architecture": "standard", "d_sae": 96}} for name in ("one", "two")}
    saes["two"]["optim"] = {"ema": None}
    fields = {"one": ("standard", AUXK), "two": ("standard", AUXK | {"l1_coefficient": 0.1})}
    whole = check_resume(tmp_path, fields, half, saes=saes)
    parts = whole.trainer.in_training
    assert parts["one"].resampler is not None
    assert parts["one"].resampler.resampled > 0
    assert parts["two"].ema is None


def test_a_state_is_not_changed_by_who_gets_it() -> None:
    first, second = (Run({"sae": ("batchtopk", AUXK)}) for _ in range(2))
    first.steps(6)
    state = first.state()
    kept = copy.deepcopy(state)
    second.load(state)
    second.steps(6)
    equal(first.state(), kept, "state")


def test_states_of_others_are_refused() -> None:
    topk, other, plain = (
        Run({"a": ("topk", {})}),
        Run({"b": ("topk", {})}),
        Run({"a": ("topk", {})}, optim={"lr": 1e-3}),
    )
    with pytest.raises(ConfigError, match="the state is of SAEs b, found a"):
        topk.trainer.load_state_dict(other.trainer.state_dict())
    with pytest.raises(ConfigError, match=r"SAE 'a': expected a state of .*, ema, .*found dead, "):
        topk.trainer.load_state_dict(plain.trainer.state_dict())
    gated, part = Run({"a": ("gated", {})}), topk.trainer.in_training["a"]
    gated.steps(1)
    with pytest.raises(ConfigError, match="the state is of another SAE: it holds b_gate, b_mag, r_mag, found "):
        part.load_state_dict(gated.trainer.in_training["a"].state_dict())


def test_the_state_of_an_optimizer_of_ones_own() -> None:
    """By name, numbers among it; groups keep the settings that they are built with."""

    def build(lr: float) -> SAEInTraining:
        sae = make_config("standard").build()
        optimizer = lambda groups: torch.optim.RMSprop(groups, lr=lr, momentum=0.9)  # noqa: E731
        return SAEInTraining(run_config(100), "sae", sae, optimizer=optimizer)

    first, second = build(3e-3), build(1e-3)
    batches = list(sparse_batches(first.sae, 4))
    for step, batch in enumerate(batches[:2]):
        first.step(batch, step * BATCH)
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_state_dict(first.state_dict())
    assert second.optimizer.param_groups[0]["base_lr"] == first.optimizer.param_groups[0]["base_lr"] == 3e-3
    for step, batch in enumerate(batches[2:], start=2):
        first.step(batch, step * BATCH)
        second.step(batch, step * BATCH)
    torch.testing.assert_close(second.sae.state_dict(), first.sae.state_dict(), rtol=0, atol=0)
