"""Codes, losses and gradients are those of EleutherAI's sparsify 1.3.3 wherever the two define them alike.

Recorded by tests/originals/make_sparsify_golden.py; docs/parity.md says what departs.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from peers import (
    Golden,
    Term,
    build,
    compare_objective,
    compare_step,
    gradients,
    recorded_cases,
    step,
    variance,
)

from sae_kit.sae import SAE
from sae_kit.training.optim import project_decoder_gradient

Record = Callable[[str, object], None]
NO_ENCODER: Mapping[str, str] = {
    "W_enc": "their AuxK gives the encoder no gradient: dead latents learn what to write, and never when",
    "b_enc": "the same",
}
STEPS: Mapping[str, Mapping[str, str]] = {
    # everything
    "topk": {},
    # everything but W_enc and b_enc in AuxK, with a coefficient that undoes our V_y / V_e; the projected gradient
    "topk_auxk": NO_ENCODER,
    # everything but W_enc and b_enc in AuxK, with a coefficient that undoes our V_y / V_e, few dead latents
    "groupmax_auxk": NO_ENCODER,
    # everything, W_skip among it
    "transcode_skip": {},
}
MULTI = "multi_topk"
dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])


def test_every_recorded_case_is_compared() -> None:
    assert recorded_cases("sparsify") == {*STEPS, MULTI}


def ours(golden: Golden, **more: Any) -> SAE:
    """Our SAE of the recorded config."""
    theirs = golden.config
    fields: dict[str, Any] = {
        "k": theirs["k"],
        "selection": theirs["activation"],
        "rescale_acts_by_decoder_norm": False,
        "reconstruction_loss": "fvu",
        "decoder_norm_constraint": golden.about["decoder"],
        "aux_coefficient": 0.0,
    }
    if theirs.get("transcode"):
        fields |= {"out_shape": (theirs["d_in"],), "skip": theirs["skip_connection"]}
    if golden["loss.auxk_loss"] > 0:
        y = golden["in.x"]
        fields["aux_coefficient"] = theirs["auxk_alpha"] * variance(y - golden["out.recons"]) / variance(y)
    return build(golden, "topk", width=theirs["num_latents"], **{**fields, **more})


@dtypes
@pytest.mark.parametrize("name", STEPS)
def test_training_step(name: str, dtype: str, record_property: Record) -> None:
    golden = Golden("sparsify", name, dtype)
    sae = ours(golden)
    terms = {"fvu": Term("mse_loss", part=True)}
    if sae.cfg.aux_coefficient:
        factor = 1 / golden.config["auxk_alpha"]
        terms["auxk_loss"] = Term("auxiliary_reconstruction_loss", factor, departs=STEPS[name])
    else:
        golden.leave("no dead latents", "loss.auxk_loss")
    golden.leave("off", "loss.multi_topk_fvu")
    found = step(golden, sae)
    compare_step(golden, found, terms)
    x = golden["in.x"]
    golden.agree("encode", sae.encode(x), golden["out.acts"])
    golden.agree("forward", sae(x), golden["out.recons"])
    if sae.cfg.decoder_norm_constraint == "unit":
        found.losses.total.backward()
        project_decoder_gradient(sae)
        assert sae.W_dec.grad is not None
        golden.compare("projected.W_dec", sae.W_dec.grad)
    golden.assert_all_compared()
    record_property("difference", golden.worst)


@dtypes
def test_multi_topk_is_the_fvu_of_a_larger_k(dtype: str, record_property: Record) -> None:
    """We have no such term: an SAE with k stands for one part of it, and one with 4k for the other.

    Theirs gives the encoder no gradient, nor b_dec that of its subtraction from what the encoder reads.
    """
    golden = Golden("sparsify", MULTI, dtype)
    sae, wide = ours(golden), ours(golden, k=4 * golden.config["k"])
    found, large = step(golden, sae), step(golden, wide)
    golden.compare("out.acts", found.acts)
    golden.compare("out.recons", large.run.y_hat)
    golden.compare("loss.fvu", found.objective)
    golden.compare("loss.multi_topk_fvu", large.objective)
    golden.compare("loss.total", found.objective + large.objective / 8)
    golden.compare_gradients(
        "multi_topk_fvu", gradients(wide, large.objective), {**NO_ENCODER, "b_dec": "read as well"}
    )
    compare_objective(golden, sae, found.objective, {"multi_topk_fvu": 1 / 8})
    totals = [f"grad.total.{name}" for name in golden.part("grad.total")]
    golden.leave("the sum of the two", *totals, "loss.auxk_loss")
    golden.assert_all_compared()
    record_property("difference", golden.worst)
