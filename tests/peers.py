"""What other libraries recorded of their training steps (tests/golden/training), and how ours are held against it.

A `Golden` keeps account: every recorded result has to be compared, or left out for a reason, and where two definitions
depart on purpose they have to be found apart.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from sae_kit import Batch, list_architectures
from sae_kit.ops import to_dense
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import Losses, Pass, training_losses, training_pass
from sae_kit.training.schedules import StepValues

FOLDER = Path(__file__).parent / "golden" / "training"
RESULTS = ("out", "loss", "grad", "metric", "norm", "folded", "inference", "projected", "given", "after", "trace")
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
RECORDED_IN_FLOAT32 = 1e-6
"""tolerance of the cases in which the other library computes a part in float32"""
END = 10**9
"""tokens after which every warm-up is over"""
Gradients = dict[str, Tensor]


def recorded_cases(library: str) -> set[str]:
    """Names of all golden files of a library."""
    return {path.stem for path in (FOLDER / library).glob("*.safetensors")}


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())


class Golden:
    """One recorded case, and which of its results have been compared. Differences are relative to the largest value."""

    def __init__(self, library: str, case: str, dtype: str = "float64") -> None:
        with safe_open(FOLDER / library / f"{case}.safetensors", framework="pt") as file:
            self.about: dict[str, Any] = json.loads(file.metadata()["about"])
            names = file.keys()
            self._tensors = {name: file.get_tensor(name) for name in names}
        self.dtype = dtype
        self.tolerance = max(TOLERANCE[dtype], RECORDED_IN_FLOAT32 if self.about.get("float32") else 0.0)
        self.worst = 0.0
        """largest difference so far"""
        self._left = {name for name in self._tensors if name.split(".")[0] in RESULTS}

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.about.get("config", {}))

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.double() if tensor.is_floating_point() else tensor

    def get(self, name: str, default: Tensor) -> Tensor:
        return self[name] if name in self._tensors else default

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name begins with `prefix` and a dot, by the rest of it."""
        return {name.removeprefix(f"{prefix}."): self[name] for name in self._tensors if name.startswith(f"{prefix}.")}

    def compare(self, name: str, found: Tensor) -> None:
        """`found` is the recorded result of this name."""
        self.agree(name, found, self[name])
        self._left.discard(name)

    def agree(self, what: str, found: Tensor, expected: Tensor, size: float = 0.0) -> None:
        """The same for a value derived from the recorded ones; `size` replaces its own where that is smaller."""
        assert found.shape == expected.shape, f"{what}: {list(found.shape)}, recorded {list(expected.shape)}"
        difference = largest(found.double() - expected) / max(largest(expected), size, 1e-30)
        self.worst = max(self.worst, difference)
        assert difference <= self.tolerance, f"{what} differs by {difference:.1e} of its largest value"

    def compare_gradients(
        self, term: str, found: Gradients, departs: Mapping[str, str], tangential: bool = False
    ) -> None:
        """Gradients of a term; of those in `departs` that they are others than the recorded ones."""
        recorded = self.part(f"grad.{term}")
        size = max(map(largest, recorded.values()))
        for name, gradient in found.items():
            expected = recorded.get(name, torch.zeros_like(gradient, dtype=torch.float64))
            smallest = 1e-3 * size
            if tangential and name == "W_dec":
                rows, smallest = self["param.W_dec"], max(size, largest(gradient))  # what is left may be nothing
                gradient, expected = along_sphere(rows, gradient.double()), along_sphere(rows, expected)
            if name in departs:
                assert largest(gradient.double() - expected) > 1e-4 * size, f"{term}: {name} no longer departs"
            else:
                self.agree(f"gradient of {term}: {name}", gradient, expected, size=smallest)
            self._left.discard(f"grad.{term}.{name}")

    def leave(self, reason: str, *names: str) -> None:
        """Results that are not compared."""
        assert reason
        assert set(names) <= self._left, f"{set(names) - self._left} are compared or not recorded"
        self._left -= set(names)

    def assert_all_compared(self, *names: str) -> None:
        """All results, or all those of `names`."""
        left = self._left & set(names) if names else self._left
        assert left == set(), "neither compared nor left out for a reason"


def along_sphere(rows: Tensor, gradient: Tensor) -> Tensor:
    """The part of a gradient of decoder rows that leaves their norms alone."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return gradient - (gradient * unit).sum(dim=1, keepdim=True) * unit


def build(golden: Golden, architecture: str, *, width: int, **fields: Any) -> SAE:
    """Our SAE with the parameters of a case; `width` is its d_sae."""
    cls = list_architectures()[architecture].config
    given = golden.part("param")
    d_in = given["W_enc"].shape[0] if "W_enc" in given else given["W_dec"].shape[1]  # tied to the decoder
    fields |= {"d_in": d_in, "d_sae": width, "dtype": golden.dtype}
    sae = cls(**fields).build()
    ours = dict(sae.named_parameters())
    assert given.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            assert parameter.shape == given[name].shape
            parameter.copy_(given[name])
    return sae


def values_of(sae: SAE, **given: float) -> dict[str, float]:
    """The values of a step after all warm-ups, those given replaced."""
    return StepValues(sae.cfg, END).at(END) | given


def forward(golden: Golden, sae: SAE, values: Mapping[str, float]) -> Pass:
    """Our pass of training over the rows of a case."""
    x = golden["in.x"]
    return training_pass(sae, Batch(x, golden.get("in.y", x)), values)


def dead_latents(golden: Golden, sae: SAE) -> DeadLatents:
    """Exactly the latents of the case's mask are dead."""
    dead = DeadLatents(sae, after=1_000)
    mask = golden.get("in.dead", torch.zeros(sae.d_sae, dtype=torch.bool))
    sae.tokens_since_fired.copy_(mask * 1_000)
    dead.candidates = mask.nonzero().squeeze(1)
    return dead


def variance(rows: Tensor) -> float:
    """E‖row − mean‖², by which AuxK and fvu divide."""
    return (rows - rows.mean(dim=0)).square().sum(dim=1).mean().item()


def gradients(sae: SAE, loss: Tensor) -> Gradients:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@dataclass(frozen=True)
class Term:
    """A recorded loss term: its name here, and what ours has to be multiplied by to be theirs."""

    ours: str
    factor: float = 1.0
    departs: Mapping[str, str] = field(default_factory=dict[str, str])
    """parameters whose gradient is another one here on purpose, with the reason"""
    part: bool = False
    """part of the reconstruction loss, which is not added to it"""


@dataclass(frozen=True)
class Step:
    """What our step gave."""

    sae: SAE
    run: Pass
    losses: Losses

    @property
    def acts(self) -> Tensor:
        """Codes by the rule of training, as users see codes."""
        norms = self.sae.decoder_norms() if self.sae.rescales else 1.0
        return to_dense(self.run.encoding.codes) * norms

    @property
    def added(self) -> dict[str, Tensor]:
        """Terms beside the reconstruction loss."""
        parts = ("mse_loss", "inner_mse_loss_")
        return {name: loss for name, loss in self.losses.terms.items() if not name.startswith(parts)}

    @property
    def objective(self) -> Tensor:
        """The reconstruction loss that is minimised: the total less all other terms."""
        return self.losses.total - sum(self.added.values())


def step(golden: Golden, sae: SAE, *, signed_aux: bool = False, **given: float) -> Step:
    """A whole step on the rows of a case, up to the losses; `signed_aux` takes the relu out of AuxK alone."""
    values = values_of(sae, **given)
    run = forward(golden, sae, values)
    dead = dead_latents(golden, sae)
    with pytest.MonkeyPatch.context() as patch:
        if signed_aux:
            patch.setattr(sae, "activation", lambda pre: pre)
        return Step(sae, run, training_losses(sae, run, values, dead))


def compare_step(
    golden: Golden, ours: Step, terms: Mapping[str, Term], *, factor: float = 1.0, tangential: bool = False
) -> None:
    """Codes, reconstruction, every term, the total, the reconstruction loss, and all their gradients.

    `factor` · our total is theirs. With `tangential` the gradients of (unit) decoder rows are compared along the
    sphere, which is what is left of them in an optimizer step.
    """
    sae, losses = ours.sae, ours.losses
    golden.compare("out.acts", ours.acts)
    golden.compare("out.recons", ours.run.y_hat)
    own = {name: term for name, term in terms.items() if not term.part}
    assert {term.ours for term in own.values()} == ours.added.keys()
    for name, term in terms.items():
        loss = term.factor * losses.terms[term.ours]
        golden.compare(f"loss.{name}", loss)
        if not term.part or golden.part(f"grad.{name}"):
            golden.compare_gradients(name, gradients(sae, loss), term.departs, tangential)
    golden.compare("loss.total", factor * losses.total)
    departs = {parameter: reason for term in own.values() for parameter, reason in term.departs.items()}
    golden.compare_gradients("total", gradients(sae, factor * losses.total), departs, tangential)
    compare_objective(golden, ours.sae, factor * ours.objective, {n: factor / t.factor for n, t in own.items()})


def compare_objective(golden: Golden, sae: SAE, objective: Tensor, weights: Mapping[str, float]) -> None:
    """The recorded total less its terms, times their weights, is the reconstruction loss."""
    golden.agree(
        "reconstruction loss",
        objective,
        golden["loss.total"] - sum(weight * golden[f"loss.{term}"] for term, weight in weights.items()),
        size=largest(golden["loss.total"]),
    )
    total = golden.part("grad.total")
    size = max(map(largest, total.values()))
    for name, gradient in gradients(sae, objective).items():
        expected = total.get(name, torch.zeros_like(gradient, dtype=torch.float64))
        for term, weight in weights.items():
            expected = expected - weight * golden.part(f"grad.{term}").get(name, torch.zeros_like(expected))
        golden.agree(f"gradient of the reconstruction: {name}", gradient, expected, size=1e-3 * size)
