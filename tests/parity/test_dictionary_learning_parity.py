"""Codes, losses, gradients and whole updates are those of dictionary_learning 0.1 wherever the two define them alike.

Recorded by tests/originals/make_dictionary_learning_golden.py; docs/parity.md says what departs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peers import (
    Golden,
    Step,
    Term,
    build,
    compare_step,
    forward,
    recorded_cases,
    step,
    values_of,
    variance,
)
from torch import Tensor

from sae_kit import Batch, RunConfig
from sae_kit.annealing import PAnnealing
from sae_kit.architectures import standard
from sae_kit.architectures._selection import BatchSelectionSAE
from sae_kit.conversions import to_jumprelu
from sae_kit.ops import to_dense
from sae_kit.sae import SAE
from sae_kit.training.losses import training_pass
from sae_kit.training.part import SAEInTraining
from sae_kit.training.schedules import StepValues

Record = Callable[[str, object], None]
D_SAE = 48
CENTRED = {"b_dec": "AuxK trains dead latents only: the b_dec subtracted from their input is a constant here"}


@dataclass(frozen=True)
class Case:
    """What of a recorded training step is compared."""

    architecture: str
    terms: Mapping[str, str]
    """their terms without coefficient, and ours with it"""
    coefficient: str = "l1_penalty"
    """the recorded field with the weight of their penalty"""
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    tangential: bool = True
    """rows are unit and their penalty leaves the norms out: W_dec's gradient is compared along the sphere"""


GATE = {"aux_loss": "auxiliary_reconstruction_loss"}
PENALISED = {
    # everything, W_dec along the sphere; a whole update with unit rows
    "standard": Case("standard", {"sparsity_loss": "l1_loss"}),
    # everything; a whole update with clipping
    "standard_april_update": Case("standard", {"sparsity_loss": "l1_loss"}, tangential=False),
    # everything, W_dec along the sphere; a whole update with unit rows
    "gated": Case("gated", {"sparsity_loss": "l1_loss", **GATE}),
    # everything, W_dec along the sphere, with our ε of 1e-3 replaced by 1e-30 (they have none)
    "p_anneal_lp_p": Case("standard", {"lp_loss": "l1_loss"}, "initial_sparsity_penalty"),
    # everything, W_dec along the sphere, with our ε of 1e-3 replaced by 1e-30 (they have none)
    "gated_anneal": Case("gated", {"lp_loss": "l1_loss", **GATE}, "initial_sparsity_penalty"),
}
# everything but b_dec in AuxK, with a coefficient that undoes our V_y and our scale of few dead latents; thresholds
# with the window and start that give their rule; "topk": a whole update; "matryoshka": their levels count a third
SELECTED = {"topk": "topk", "topk_few_dead": "topk", "batchtopk": "batchtopk", "matryoshka": "matryoshka_batchtopk"}
OTHERS = {"jumprelu", "p_anneal_lp", "p_anneal_schedule"}
UPDATES = ("standard", "standard_april_update", "gated", "jumprelu", "topk")
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


@pytest.fixture
def no_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    """x^p without the offset that bounds its slope at 0: as good as none, but finite."""
    monkeypatch.setattr(standard, "LP_OFFSET", 1e-30)


def test_every_recorded_case_is_compared() -> None:
    assert recorded_cases("dictionary_learning") == {*PENALISED, *SELECTED, *OTHERS}


def penalty_weight(golden: Golden, name: str) -> float:
    """What their penalty was multiplied by in this step, in the middle of its warm-up."""
    return golden.config[name] * golden.about["sparsity_scale"]


def penalised(golden: Golden, case: Case) -> SAE:
    """Our SAE of a case of PENALISED."""
    fields = {"l1_coefficient": penalty_weight(golden, case.coefficient), **case.fields}
    if golden.about["decoder"] == "unit":
        fields["decoder_norm_constraint"] = "unit"
    return build(golden, case.architecture, width=D_SAE, **fields)


@dtypes
@pytest.mark.parametrize("name", PENALISED)
@pytest.mark.usefixtures("no_offset")
def test_penalised_training_step(name: str, dtype: str, record_property: Record) -> None:
    golden, case = Golden("dictionary_learning", name, dtype), PENALISED[name]
    sae = penalised(golden, case)
    given = {"p": golden.config["p"]} if "p" in golden.config else {}
    if given and dtype == "float32":
        golden.tolerance = 1e-4  # codes of 1e-3 where the slope of their square root is 16
    found = step(golden, sae, **given)
    weight = penalty_weight(golden, case.coefficient)
    terms = {theirs: Term(ours, 1.0 if theirs in GATE else 1 / weight) for theirs, ours in case.terms.items()}
    compare_step(golden, found, {"mse_loss": Term("mse_loss", part=True), **terms}, tangential=case.tangential)
    if case.architecture == "standard" and not given:  # of this name it is only logged
        golden.compare("loss.l2_loss", (found.run.y_hat - found.run.y).norm(dim=1).mean())
    golden.agree("encode", sae.encode(golden["in.x"]), golden["out.acts"])
    leave_update(golden)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


@dtypes
@pytest.mark.usefixtures("no_offset")
def test_lp_penalty_with_their_root(dtype: str, record_property: Record) -> None:
    """Their "Lp" takes the root 1/p of each row's sum, which ours leaves out for p < 1; everything else agrees."""
    golden = Golden("dictionary_learning", "p_anneal_lp", dtype)
    weight, p = penalty_weight(golden, "initial_sparsity_penalty"), golden.config["p"]
    sae = build(golden, "standard", width=D_SAE, l1_coefficient=weight)
    found = step(golden, sae, p=p)
    lengths = to_dense(found.run.encoding.codes) * sae.decoder_norms()
    penalty = standard.lp_penalty(lengths, p).pow(1 / p).mean()
    changed = found.losses._replace(terms={**found.losses.terms, "l1_loss": weight * penalty})
    changed = changed._replace(total=found.objective + weight * penalty)
    terms = {"mse_loss": Term("mse_loss", part=True), "lp_loss": Term("l1_loss", 1 / weight)}
    compare_step(golden, Step(sae, found.run, changed), terms, tangential=True)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


@dtypes
def test_jumprelu_training_step(dtype: str, record_property: Record) -> None:
    """Everything but θ's gradient of the sparsity term, for which their step reads codes: they see half the window.

    Their term, λ (L0 / L* − 1)² of the batch's mean L0, is put together from the L0 of our "step" mode.
    """
    golden = Golden("dictionary_learning", "jumprelu", dtype)
    sae = jumprelu(golden)
    found = step(golden, sae)
    weight, target = penalty_weight(golden, "sparsity_penalty"), golden.config["target_l0"]
    sparsity = weight * (found.losses.terms["l0_loss"] / target - 1).square()
    changed = found.losses._replace(terms={**found.losses.terms, "l0_loss": sparsity})
    changed = changed._replace(total=found.objective + sparsity)
    codes = {"threshold": "their step function is given codes, which are never in the lower half of the window"}
    terms = {"l2_loss": Term("mse_loss", part=True), "scaled_sparsity_loss": Term("l0_loss", departs=codes)}
    compare_step(golden, Step(sae, found.run, changed), terms)
    golden.agree("encode", sae.encode(golden["in.x"]), golden["out.acts"])
    leave_update(golden)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


def jumprelu(golden: Golden) -> SAE:
    """L0 alone, weight 1."""
    return build(
        golden,
        "jumprelu",
        width=D_SAE,
        apply_b_dec_to_input=False,
        l0_coefficient=1.0,
        jumprelu_bandwidth=golden.config["bandwidth"],
        decoder_norm_constraint="unit",
    )


def selected(golden: Golden, name: str) -> tuple[SAE, float]:
    """Our SAE of a case of SELECTED, and what its total has to be multiplied by to be theirs."""
    fields: dict[str, Any] = {"k": golden.config["k"], "rescale_acts_by_decoder_norm": False}
    if name == "matryoshka":
        fields["matryoshka_widths"] = (12, 24, 48)
    levels = len(fields.get("matryoshka_widths", (1,)))
    dead, aux_k = int(golden["in.dead"].sum()), golden["in.x"].shape[1] // 2
    undone = levels / variance(golden["in.x"]) / min(dead / aux_k, 1.0)
    fields |= {"aux_coefficient": golden.config["auxk_alpha"] * undone, "decoder_norm_constraint": "unit"}
    return build(golden, SELECTED[name], width=D_SAE, **fields), 1 / levels


@dtypes
@pytest.mark.parametrize("name", SELECTED)
def test_selected_training_step(name: str, dtype: str, record_property: Record) -> None:
    golden = Golden("dictionary_learning", name, dtype)
    sae, factor = selected(golden, name)
    found = step(golden, sae)
    alpha = golden.config["auxk_alpha"]
    compare_step(
        golden,
        found,
        {"auxk_loss": Term("auxiliary_reconstruction_loss", factor / alpha, departs=CENTRED)},
        factor=factor,
    )
    golden.compare("loss.l2_loss", factor * found.objective)
    if isinstance(sae, BatchSelectionSAE):
        compare_thresholds(golden, sae)
    else:
        golden.agree("encode", sae.encode(golden["in.x"]), golden["out.acts"])
        golden.leave("our TopK keeps no threshold", "out.threshold", "out.threshold_after_second_batch")
        used = to_jumprelu(sae, float(golden["out.threshold_after_second_batch"]))
        golden.compare("inference.acts", used.encode(golden["in.x"]))
    leave_update(golden)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


def compare_thresholds(golden: Golden, sae: BatchSelectionSAE) -> None:
    """First the value of one batch; then their average, which ours is when it starts from that value with weight 1."""
    values = values_of(sae)
    sae.observe(forward(golden, sae, values).encoding, values)
    golden.compare("out.threshold", sae.training_state()["metrics/topk_threshold"])
    sae.set_threshold(golden["out.threshold"])
    x = 0.9 * golden["in.x"]
    beta = torch.tensor(golden.config["threshold_beta"], dtype=torch.float64)
    values["threshold_window_tokens"] = float(-len(x) / beta.log())
    sae.observe(training_pass(sae, Batch(x, x), values).encoding, values)
    golden.compare("out.threshold_after_second_batch", sae.training_state()["metrics/topk_threshold"])
    golden.compare("inference.acts", sae.encode(golden["in.x"]))


def leave_update(golden: Golden) -> None:
    names = [f"{part}.{name}" for part in ("given", "after") for name in golden.part(part)]
    golden.leave("see test_whole_update", *names)


@pytest.mark.parametrize("name", UPDATES)
def test_whole_update(name: str, record_property: Record) -> None:
    """Projection, clipping, Adam and renormalisation by our trainer: what Adam is given, and what it leaves.

    Where one gradient departs and the common norm is clipped, the others agree up to one factor; Adam's first step does
    not see it.
    """
    golden = Golden("dictionary_learning", name)
    if name in ("jumprelu", "topk"):
        golden.tolerance = 3e-6  # before they project, they divide decoder rows by their norm + 1e-6
    departs = {"jumprelu": "threshold", "topk": "b_dec"}.get(name)
    if name == "jumprelu":
        sae = jumprelu(golden)
    elif name == "topk":
        sae, _ = selected(golden, name)
    else:
        sae = penalised(golden, PENALISED[name])
    given = update(golden, sae, clip=None if name in ("standard", "gated") else 1.0)
    compared = [parameter for parameter in given if parameter != departs]
    recorded, ours, theirs = golden.part("given"), 1.0, 1.0
    if departs is not None:
        ours, theirs = (common_norm(gradients, compared) for gradients in (given, recorded))
    after = dict(sae.named_parameters())
    for parameter in compared:
        golden.agree(f"given {parameter}", given[parameter] / ours, recorded[parameter] / theirs)
        golden.agree(f"after {parameter}", after[parameter].detach(), golden[f"after.{parameter}"])
    record_property("difference", golden.worst)


def common_norm(gradients: Mapping[str, Tensor], names: list[str]) -> float:
    return torch.cat([gradients[name].flatten() for name in names]).norm().item()


def update(golden: Golden, sae: SAE, clip: float | None) -> dict[str, Tensor]:
    """One step of our trainer; the gradients that the optimizer was given."""
    cfg = RunConfig.from_dict(
        {
            "optim": {"lr": golden.config["lr"], "clip_grad_norm": clip},
            "train": {"tokens": 10**6, "batch_tokens": 24, "device": "cpu", "dead_after_tokens": 1_000},
        }
    )
    x = golden["in.x"]
    trained = SAEInTraining(cfg, "sae", sae)
    sae.tokens_since_fired += 1_000 * golden.get("in.dead", torch.zeros(sae.d_sae, dtype=torch.bool))
    given: dict[str, Tensor] = {}

    def remember(*_: Any) -> None:
        for name, parameter in sae.named_parameters():
            assert parameter.grad is not None
            given[name] = parameter.grad.clone()

    trained.optimizer.register_step_pre_hook(remember)
    trained.step(Batch(x, x), tokens=0, lr_factor=1.0)
    return given


@pytest.mark.usefixtures("no_offset")
def test_p_annealing_over_ten_steps(record_property: Record) -> None:
    """p, the coefficient that keeps the penalty continuous, and the penalty itself.

    Their n updates are n values of p, the first of them the start, and p changes after the loss of its step: n − 1
    steps of ours, begun one step later. Their row t holds what step t + 1 is trained with. The ratio of penalties is
    taken in float32.
    """
    golden = Golden("dictionary_learning", "p_anneal_schedule")
    golden.tolerance = 1e-6
    annealing = PAnnealing(start=1.0, end=0.25, start_tokens=3, end_tokens=9, n_updates=3, window=2)
    sae = build(golden, "standard", width=D_SAE, l1_coefficient=0.2, p_annealing=annealing)
    schedule = StepValues(sae.cfg, total=20)
    coefficients, ps, penalties = [], [], []
    for index, x in enumerate(golden["in.xs"]):
        values = schedule.at(index)
        ps.append(values["p"])
        coefficients.append(values["l1_coefficient"])
        run = training_pass(sae, Batch(x, x), values)
        schedule.observe(sae, run.encoding)
        penalties.append(sae.sparsity_losses(run.encoding, x, {**values, "l1_coefficient": 1.0})["l1_loss"])
    following = schedule.at(len(ps))
    golden.compare("trace.p", torch.tensor([*ps[1:], following["p"]]))
    golden.compare("trace.sparsity_coeff", torch.tensor([*coefficients[1:], following["l1_coefficient"]]))
    golden.compare("trace.lp_loss", torch.stack(penalties))
    golden.leave("ours is not stored", "trace.next_p")
    golden.assert_all_compared()
    record_property("difference", golden.worst)
