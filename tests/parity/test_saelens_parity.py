"""Codes, losses and gradients are those of SAELens 6.54 wherever the two define them alike (docs/parity.md).

Recorded by tests/originals/make_training_golden.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peers import (
    Golden,
    Term,
    build,
    compare_objective,
    compare_step,
    gradients,
    recorded_cases,
    step,
    values_of,
    variance,
)

from sae_kit import normalization
from sae_kit.architectures._selection import BatchSelectionSAE
from sae_kit.sae import SAE

Record = Callable[[str, object], None]
MSE = {"mse_loss": Term("mse_loss", part=True)}
L1 = {"l1_loss": Term("l1_loss")}
L0 = {"l0_loss": Term("l0_loss")}
LONE = {"W_dec": "decoder norms are a constant here: alone, their gradient would shrink dead rows at full speed"}
PRE_ACT = {"pre_act_loss": Term("pre_act_loss", departs=LONE)}
CENTRED = {"b_dec": "AuxK trains dead latents only: the b_dec subtracted from their input is a constant here"}


def aux(factor: float = 1.0, *, centred: bool = True) -> dict[str, Term]:
    name = "auxiliary_reconstruction_loss"
    return {name: Term(name, factor, departs=CENTRED if centred else {})}


@dataclass(frozen=True)
class Case:
    """What of a recorded training step is compared; its SAE is built from the recorded config."""

    architecture: str
    terms: Mapping[str, Term]
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    signed_aux: bool = False
    """AuxK of SAELens keeps negative values: ours is compared with its relu taken out"""
    factor: float = 1.0
    """of our total"""


INNER = {name: Term(name, part=True) for name in ("inner_mse_loss_8", "inner_mse_loss_20")}
STEPS = {
    # everything
    "standard_l1": Case("standard", MSE | L1),
    # everything
    "standard_lp2": Case("standard", MSE | L1),
    # everything, with our auxiliary decoder attached as theirs is (ours by default is frozen, as in the paper)
    "gated": Case(
        "gated",
        MSE | L1 | {"auxiliary_reconstruction_loss": Term("auxiliary_reconstruction_loss")},
        {"detach_aux_decoder": False},
    ),
    # everything but W_dec in the pre-act loss, where their decoder norms have a gradient
    "jumprelu_step": Case("jumprelu", MSE | L0 | PRE_ACT),
    # everything
    "jumprelu_step_ste_to_input": Case("jumprelu", MSE | L0),
    # everything but W_dec in the pre-act loss, where their decoder norms have a gradient
    "jumprelu_tanh": Case("jumprelu", MSE | L0 | PRE_ACT),
    # everything
    "jumprelu_quadratic": Case("jumprelu", MSE | L0),
    # everything but b_dec in AuxK; AuxK with a coefficient that undoes our V_y / V_e (no selected value is negative)
    "topk_rescale": Case("topk", MSE | aux()),
    # everything; AuxK with a coefficient that undoes our V_y / V_e, and without our relu (all five dead are selected)
    "topk_no_rescale": Case("topk", MSE | aux(centred=False), signed_aux=True),
    # everything but b_dec in AuxK; AuxK with a coefficient that undoes our V_y / V_e
    "abstopk": Case("abstopk", MSE | aux()),
    # as topk_rescale without our relu in AuxK (all five dead are selected); threshold and saved form below
    "batchtopk": Case("batchtopk", MSE | aux(), signed_aux=True),
    # as topk_rescale; three levels: their sum is three times our mean
    "matryoshka": Case("matryoshka_batchtopk", MSE | INNER | aux(3.0), factor=3.0),
}
PLAIN = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
PER_ROW = ("standard_layer_norm", "standard_constant_norm_rescale", "standard_hook_z")
SCALED = ("standard_expected_average_only_in", "standard_covariance_whitening")
LEVELS = "matryoshka_aux_per_level"
ELSEWHERE = {
    "matching_pursuit": "compared by the tests of that architecture",
    "temporal": "compared by the tests of that architecture",
    "temporal_untied": "compared by the tests of that architecture",
}
BATCHED = ("batchtopk", "matryoshka", LEVELS)
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


def ours(golden: Golden, architecture: str, factor: float = 1.0, **more: Any) -> SAE:
    """Our SAE of the recorded config, in which most fields have the same names."""
    fields = golden.config
    width = fields.pop("d_sae")
    for name in ("d_in", "dtype", "topk_threshold_lr"):
        fields.pop(name, None)
    if "d_out" in fields:
        fields["out_shape"] = (fields.pop("d_out"),)
    if "matryoshka_widths" in fields:
        fields["matryoshka_widths"] = tuple(fields["matryoshka_widths"])
    if "aux_loss_coefficient" in fields:
        y = golden["in.x"]
        undone = variance(y - golden["out.recons"]) / variance(y)
        fields["aux_coefficient"] = fields.pop("aux_loss_coefficient") * undone / factor
    return build(golden, architecture, width=width, **fields, **more)


def test_every_recorded_case_is_compared() -> None:
    assert recorded_cases("saelens") == {*STEPS, LEVELS, *PLAIN, *PER_ROW, *SCALED, *ELSEWHERE}


@dtypes
@pytest.mark.parametrize("name", STEPS)
def test_training_step(name: str, dtype: str, record_property: Record) -> None:
    golden, case = Golden("saelens", name, dtype), STEPS[name]
    sae = ours(golden, case.architecture, case.factor, **case.fields)
    if case.signed_aux:
        assert golden["in.dead"].sum() <= sae.d_in // 2, "all dead latents speak, in whatever order"
    compare_step(golden, step(golden, sae, signed_aux=case.signed_aux), case.terms, factor=case.factor)
    if name in BATCHED:
        golden.leave("see test_threshold_and_saved_form", *after_the_step(golden))
    else:
        compare_use(golden, sae)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


def compare_use(golden: Golden, sae: SAE) -> None:
    """The rule of use on the same rows."""
    x = golden["in.x"]
    golden.compare("out.acts", sae.encode(x))
    golden.compare("out.recons", sae(x))


def after_the_step(golden: Golden) -> list[str]:
    return ["out.topk_threshold", "metric.topk_threshold", *(f"inference.{name}" for name in golden.part("inference"))]


@dtypes
def test_auxk_of_each_matryoshka_level(dtype: str, record_property: Record) -> None:
    """Reconstruction as in "matryoshka"; AuxK of the two levels whose dead latents all speak, each in its own factor.

    In the last level theirs are the eight largest dead latents of a row, most of them negative; ours has no such codes.
    """
    golden = Golden("saelens", LEVELS, dtype)
    sae = ours(golden, "matryoshka_batchtopk")
    found = step(golden, sae, signed_aux=True)
    golden.compare("out.acts", found.acts)
    golden.compare("out.recons", found.run.y_hat)
    for term in ("mse_loss", *INNER):
        golden.compare(f"loss.{term}", found.losses.terms[term])
    for term in INNER:
        golden.compare_gradients(term, gradients(sae, found.losses.terms[term]), {})
    name = "auxiliary_reconstruction_loss"
    compare_objective(golden, sae, 3.0 * found.objective, {name: 1.0})
    aux_gradients = gradients(sae, found.losses.terms[name])
    y, dead = golden["in.x"], golden["in.dead"]
    first = 0
    for last in (8, 20):
        assert 0 < dead[first:last].sum() <= 8
        prefix = golden["out.acts"][:, :last] @ golden["param.W_dec"][:last] + golden["param.b_dec"]
        theirs = golden.config["aux_loss_coefficient"] * 3 * variance(y - prefix) / variance(y)
        factor = theirs / sae.cfg.aux_coefficient
        for parameter in ("W_enc", "b_enc", "W_dec"):
            own = (..., slice(first, last)) if parameter == "W_enc" else slice(first, last)
            recorded = golden[f"grad.{name}.{parameter}"][own]
            golden.agree(f"AuxK up to {last}: {parameter}", factor * aux_gradients[parameter][own], recorded)
        first = last
    totals = [f"grad.total.{parameter}" for parameter in golden.part("grad.total")]
    golden.leave("holds AuxK of the last level", f"loss.{name}", "loss.total", *totals)
    golden.leave("see above", *(f"grad.{name}.{parameter}" for parameter in golden.part(f"grad.{name}")))
    golden.leave("see test_threshold_and_saved_form", *after_the_step(golden))
    golden.assert_all_compared()
    record_property("difference", golden.worst)


@dtypes
@pytest.mark.parametrize("name", BATCHED)
def test_threshold_and_saved_form(name: str, dtype: str, record_property: Record) -> None:
    """Begun at the same threshold, with the window that gives their rate; then the rule of use, and the saved JumpReLU.

    Saved, our decoder rows have norm 1 also where theirs keep it: codes and thresholds are larger by the norms.
    """
    golden = Golden("saelens", name, dtype)
    sae = ours(golden, "batchtopk" if name == "batchtopk" else "matryoshka_batchtopk")
    assert isinstance(sae, BatchSelectionSAE)
    sae.set_threshold(golden["in.topk_threshold"])
    x = golden["in.x"]
    window = -len(x) / math.log(1 - golden.config["topk_threshold_lr"])
    values = values_of(sae, threshold_window_tokens=window)
    sae.observe(step(golden, sae, threshold_window_tokens=window).run.encoding, values)
    threshold = sae.training_state()["metrics/topk_threshold"]
    golden.compare("out.topk_threshold", threshold)
    golden.compare("metric.topk_threshold", threshold)
    golden.compare("inference.acts", sae.encode(x))
    golden.compare("inference.recons", sae(x))
    saved = sae.to_inference()
    longer = torch.ones(sae.d_sae) if sae.rescales else golden["param.W_dec"].norm(dim=1)
    golden.compare("inference.threshold", saved.get_parameter("threshold") / longer)
    golden.agree("saved codes", saved.encode(x) / longer, golden["inference.acts"])
    golden.agree("saved reconstruction", saved(x), golden["inference.recons"])
    golden.assert_all_compared(*after_the_step(golden))
    record_property("difference", golden.worst)


@dtypes
@pytest.mark.parametrize("name", [*PLAIN, *PER_ROW])
def test_encode_and_forward(name: str, dtype: str, record_property: Record) -> None:
    """Transcoders, which SAELens does not train, and what scales or reshapes each row: codes and output."""
    golden = Golden("saelens", name, dtype)
    sae = ours(golden, "jumprelu" if "jumprelu" in name else "standard", skip="skip" in name)
    compare_use(golden, sae)
    golden.agree("decode", sae.decode(golden["out.acts"], sae.row_context(golden["in.x"])), golden["out.recons"])
    golden.assert_all_compared()
    record_property("difference", golden.worst)


@dtypes
@pytest.mark.parametrize("name", SCALED)
def test_scaled_training_step_and_fold(
    name: str, dtype: str, monkeypatch: pytest.MonkeyPatch, record_property: Record
) -> None:
    """Estimate, a step in training space, raw output, and the fold. Gradients were not recorded.

    Whitening: their epsilon is absolute and their covariance divides by rows − 1, so the estimate is compared with
    those two undone, and the rest with their matrices.
    """
    golden = Golden("saelens", name, dtype)
    sae, x = ours(golden, "standard"), golden["in.x"]
    if name.endswith("whitening"):
        compare_whitening(golden, sae, monkeypatch)
    else:
        golden.tolerance = max(golden.tolerance, 1e-6)  # their scale is a float32 sum
        sae.norm_in.estimate(x)
        golden.compare("norm.scaling_factor", sae.norm_in.scale)
    found = step(golden, sae)
    golden.agree("normalised rows", found.run.x, golden["in.scaled_x"])
    golden.compare("out.acts", found.acts)
    golden.compare("out.recons", found.run.y_hat)
    golden.compare("loss.mse_loss", found.losses.terms["mse_loss"])
    golden.compare("loss.l1_loss", found.losses.terms["l1_loss"])
    golden.compare("loss.total", found.losses.total)
    golden.compare("out.unscaled_recons", sae(x))
    folded = sae.fold_normalization()
    assert folded.norm_in.mode == "none"
    golden.compare("folded.acts", folded.encode(x))
    golden.compare("folded.recons", folded(x))
    golden.assert_all_compared()
    record_property("difference", golden.worst)


def compare_whitening(golden: Golden, sae: SAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our estimate with their epsilon; then our buffers take their matrices, of which signs are free."""
    x, norm = golden["in.x"], sae.norm_in
    bessel = (len(x) - 1) / len(x)
    monkeypatch.setattr(normalization, "WHITENING_EPS", 1e-3 * bessel * sae.d_in / variance(x))
    norm.estimate(x.repeat(normalization.WHITENING_ROWS, 1))  # as many rows as ours asks for, of the same covariance
    theirs = {name: golden[f"norm.{name}"] for name in ("mean", "matrix", "inverse_matrix")}
    golden.compare("norm.mean", norm.mean)
    golden.agree("whitening", bessel * norm.matrix @ norm.matrix.T, theirs["matrix"] @ theirs["matrix"].T)
    golden.agree(
        "its inverse", norm.inverse.T @ norm.inverse / bessel, theirs["inverse_matrix"].T @ theirs["inverse_matrix"]
    )
    norm.matrix.copy_(theirs["matrix"])
    norm.inverse.copy_(theirs["inverse_matrix"])
    golden.leave("copied", "norm.matrix", "norm.inverse_matrix")
