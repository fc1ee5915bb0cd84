"""BatchTopK: who competes with whom in training, and the threshold that stands for it in use."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import BATCH, D_SAE, SITES, batch, inputs, make_config, make_sae, one_pass, relative, run_config, values_of
from torch import Tensor

from sae_kit import SAE, SAETrainer
from sae_kit.annealing import KAnnealing
from sae_kit.architectures._selection import BatchSelectionSAE
from sae_kit.conversions import calibrated
from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.ops import to_dense
from sae_kit.training.callbacks import Callback

BOTH = pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk"])


def make(name: str = "batchtopk", geometry: str = "sae", **fields: Any) -> BatchSelectionSAE:
    sae = make_sae(name, geometry, dtype="float64", **fields)
    assert isinstance(sae, BatchSelectionSAE)
    return sae


def ranked(sae: SAE, x: Tensor) -> Tensor:
    """relu(z) of every row and latent, by the formula."""
    return torch.relu(sae.preactivations(x)) * (sae.decoder_norms() if sae.rescales else 1.0)


@BOTH
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("k", [8, 0.29, 7.5])
def test_training_keeps_the_largest_of_the_whole_batch(name: str, rescale: bool, k: float) -> None:
    """K = round(k·B): 29 of 100 rows at k = 0.29, where truncation would give 28."""
    sae = make(name, rescale_acts_by_decoder_norm=rescale, k=k)
    data = batch(sae, 100)
    codes = to_dense(one_pass(sae, data).encoding.codes)
    z, h = ranked(sae, data.x), torch.relu(sae.preactivations(data.x))
    threshold = z.flatten().topk(round(k * 100)).values[-1]
    torch.testing.assert_close(codes, h * (z >= threshold))
    assert (codes != 0).sum() == round(k * 100)
    per_row = (codes != 0).sum(dim=1)
    assert per_row.max() > per_row.min(), "rows take latents from each other"


def test_at_least_one_is_kept_and_no_more_than_there_are() -> None:
    sae = make(k=0.01)
    assert (to_dense(one_pass(sae, batch(sae, 5)).encoding.codes) != 0).sum() == 1
    full = make(k=D_SAE)
    data = batch(full, 5)
    assert torch.equal(to_dense(one_pass(full, data).encoding.codes) != 0, full.preactivations(data.x) > 0)


def test_only_positive_latents_are_on() -> None:
    sae = make(k=60)
    data = batch(sae, 30)
    codes = to_dense(one_pass(sae, data).encoding.codes)
    assert (codes >= 0).all()
    assert (codes != 0).sum() == (sae.preactivations(data.x) > 0).sum() < 60 * 30


def test_layers_compete_within_themselves_or_all_together() -> None:
    for scope, sets in (("layer", SITES), ("batch", 1)):
        sae = make(geometry="clt", k_scope=scope, k=5)
        data = batch(sae, 40)
        codes = to_dense(one_pass(sae, data).encoding.codes)
        z = ranked(sae, data.x).view(40, sets, -1)
        for part in range(sets):
            own = z[:, part]
            threshold = own.flatten().topk(5 * 40 * SITES // sets).values[-1]
            assert torch.equal(codes.view(40, sets, -1)[:, part] != 0, own >= threshold)
        per_layer = (codes.view(40, SITES, -1) != 0).sum(dim=(0, 2))
        assert per_layer.sum() == 5 * 40 * SITES
        assert (per_layer == 5 * 40).all() == (scope == "layer")


def test_which_rule_runs_depends_on_the_method_alone() -> None:
    sae = make()
    sae.set_threshold(1.1)
    data = batch(sae, 50)
    for mode in (True, False):
        sae.train(mode)
        z = ranked(sae, data.x)
        torch.testing.assert_close(sae.encode(data.x), z * (z > 1.1))
        assert (to_dense(one_pass(sae, data).encoding.codes) != 0).sum() == 8 * 50


def test_before_the_first_estimate_each_row_keeps_its_own() -> None:
    for k in (7, 6.5):
        sae = make_config("batchtopk", k=k).build()
        u = inputs(sae, 30)
        assert isinstance(sae, BatchSelectionSAE)
        assert sae.inference_threshold is None
        z = ranked(sae, u)
        wanted = z.topk(7, dim=1).values
        torch.testing.assert_close(sae.encode(u).sort(dim=1, descending=True).values[:, :7], wanted)
        torch.testing.assert_close(sae.encode(u[:1]), sae.encode(u)[:1])
        inference = sae.to_inference()
        assert (inference.cfg.architecture, inference.cfg.k) == ("topk", 7)  # pyright: ignore[reportAttributeAccessIssue]
        assert relative(inference(u), sae(u)) < 1e-5


# ---- the threshold's average -----------------------------------------------------------------------------------------


@torch.no_grad()
def smallest_kept(sae: SAE, data: Batch) -> Tensor:
    run = one_pass(sae, data)
    kept = to_dense(run.encoding.codes) * (sae.decoder_norms() if sae.rescales else 1.0)
    return kept[kept > 0].min()


@BOTH
@pytest.mark.parametrize("rescale", [True, False])
def test_the_average_is_right_from_the_first_step_on(name: str, rescale: bool) -> None:
    """m ← βm + (1 − β)τ, w ← βw + (1 − β), θ̄ = m/w with β = exp(−B / window)."""
    sae = make(name, rescale_acts_by_decoder_norm=rescale)
    sae.schedule_settled()
    m = w = 0.0
    for step, size in enumerate((40, 64, 10)):
        data = batch(sae, size, seed=step)
        tau, beta = float(smallest_kept(sae, data)), math.exp(-size / 200)
        sae.observe(one_pass(sae, data).encoding, {"threshold_window_tokens": 200.0})
        m, w = beta * m + (1 - beta) * tau, beta * w + (1 - beta)
        threshold = sae.inference_threshold
        assert threshold is not None
        torch.testing.assert_close(threshold, torch.full_like(threshold, m / w))
        if step == 0:
            assert float(threshold[0]) == pytest.approx(tau), "exact after one step"
    assert sae.training_state()["metrics/topk_threshold"] == pytest.approx(m / w)


def test_a_constant_threshold_is_found_whatever_the_window() -> None:
    for window in (1.0, 1e3, 1e9):
        sae = make()
        sae.schedule_settled()
        data = batch(sae, 40)
        for _ in range(3):
            sae.observe(one_pass(sae, data).encoding, {"threshold_window_tokens": window})
        assert sae.inference_threshold is not None
        assert float(sae.inference_threshold[0]) == pytest.approx(float(smallest_kept(sae, data)), rel=1e-5)


def test_a_batch_without_a_positive_latent_leaves_the_average() -> None:
    sae = make()
    before = sae.state_dict()
    before = {key: before[key].clone() for key in ("threshold_average", "threshold_weight")}
    with torch.no_grad():
        sae.b_enc -= 100
    sae.observe(one_pass(sae, batch(sae, 20)).encoding, {"threshold_window_tokens": 100.0})
    for key, value in before.items():
        assert torch.equal(sae.state_dict()[key], value)


def test_layers_have_thresholds_of_their_own() -> None:
    sae = make(geometry="clt", k=5)
    sae.schedule_settled()
    data = batch(sae, 60)
    run = one_pass(sae, data)
    sae.observe(run.encoding, values_of(sae))
    threshold = sae.inference_threshold
    assert threshold is not None
    kept = (to_dense(run.encoding.codes) * sae.decoder_norms()).view(60, SITES, D_SAE)
    smallest = torch.where(kept > 0, kept, torch.inf).amin(dim=(0, 2))
    torch.testing.assert_close(threshold.view(SITES, D_SAE), smallest[:, None].expand(SITES, D_SAE))
    z = ranked(sae, data.x).view(60, SITES, D_SAE)
    torch.testing.assert_close(sae.encode(data.x), z * (z > smallest[:, None]))
    inference = sae.to_inference()
    assert inference.get_parameter("threshold").shape == (SITES, D_SAE)
    fresh = inputs(sae, 60, seed=5)  # there nothing lies exactly at the threshold
    assert relative(inference.encode(fresh), sae.encode(fresh)) < 1e-9


def test_the_average_restarts_when_k_settles() -> None:
    """While k moves thresholds are those of larger k: they are not part of what is used."""
    cfg = make_config("batchtopk", k_annealing=KAnnealing(start=40, tokens=3 * BATCH), threshold_window_tokens=1000)
    sae = cfg.build()
    assert isinstance(sae, BatchSelectionSAE)
    found: list[tuple[float, float]] = []

    class Watch(Callback):
        def on_step_end(self, trainer: SAETrainer) -> None:
            found.append((float(sae.threshold_weight), float(sae.threshold_average)))

    SAETrainer(run_config(5), sae, [inputs(sae, BATCH, seed=seed) for seed in range(5)], callbacks=[Watch()]).fit()
    alone = 1 - math.exp(-BATCH / 1000)
    grown = alone * (1 + math.exp(-BATCH / 1000))
    weights = [weight for weight, _ in found]
    assert weights[:2] == pytest.approx([alone, grown], rel=1e-5)
    assert weights[3:] == pytest.approx([alone, grown], rel=1e-5), "from the step on in which k is 8"
    assert found[3][1] / found[3][0] > 1.2 * found[2][1] / found[2][0]


def test_thresholds_are_kept_exactly(tmp_path: Any) -> None:
    """Buffers: saved, loaded, and not rounded with the weights."""
    sae = make_sae("batchtopk", dtype="bfloat16")
    assert isinstance(sae, BatchSelectionSAE)
    sae.threshold_average.fill_(1 / 3)
    sae.threshold_weight.fill_(0.7)
    again = SAE.load_from_disk(sae.save_model(tmp_path / "sae"))
    for one in (again, copy.deepcopy(sae), sae.to(torch.float16)):
        assert isinstance(one, BatchSelectionSAE)
        assert one.inference_threshold is not None
        assert one.inference_threshold.dtype == torch.float32
        assert float(one.inference_threshold[0]) == pytest.approx(1 / 3 / 0.7, rel=1e-6)


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("geometry", ["sae", "crosscoder"])
def test_saved_form_has_the_same_l0_on_fresh_data(rescale: bool, geometry: str) -> None:
    sae = make(geometry=geometry, rescale_acts_by_decoder_norm=rescale)
    sae.schedule_settled()
    for seed in range(20):
        sae.observe(one_pass(sae, batch(sae, 200, seed=seed)).encoding, {"threshold_window_tokens": 4000.0})
    inference = sae.to_inference()
    assert inference.cfg.architecture == "jumprelu"
    fresh = inputs(sae, 2000, seed=99)
    l0 = (inference.encode(fresh) != 0).sum() / 2000
    assert abs(float(l0) - 8) < 0.8
    assert torch.equal(inference.encode(fresh) != 0, sae.encode(fresh) != 0)


def test_a_threshold_of_one_s_own() -> None:
    sae = make()
    u = inputs(sae, 500)
    new, report = calibrated(sae, [u])
    sae.set_threshold(report.threshold)
    assert torch.equal(sae.encode(u) != 0, new.encode(u) != 0)
    assert (sae.encode(u) != 0).sum() == 8 * 500
    before = float(sae.threshold_average)
    sae.observe(one_pass(sae, batch(sae, 40)).encoding, {"threshold_window_tokens": 1e6})
    assert float(sae.threshold_average) == pytest.approx(before, rel=1e-3), "training goes on from it"


def test_calibration_counts_k_in_every_layer() -> None:
    sae = make(geometry="clt", k=5)
    new, report = calibrated(sae, [inputs(sae, 50), inputs(sae, 30, seed=3)])
    assert report.l0_after == 5 * SITES
    assert (new.encode(inputs(sae, 50)) != 0).sum() + (new.encode(inputs(sae, 30, seed=3)) != 0).sum() == 5 * SITES * 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k": 0}, "k must lie between 1 and d_sae = 96, found 0"),
        ({"k": 96.5}, "k must lie between 1 and d_sae = 96, found 96.5"),
        ({"threshold_window_tokens": 0}, "threshold_window_tokens must be positive"),
        ({"k_scope": "batch"}, "k_scope is for cross-layer transcoders"),
    ],
)
def test_impossible_configs(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config("batchtopk", **fields)


def test_what_shaped_training_stays_in_the_metadata_of_the_result() -> None:
    sae = make_sae("batchtopk", threshold_window_tokens=77)
    sae.set_threshold(0.1)  # pyright: ignore[reportCallIssue]
    metadata = sae.to_inference().cfg.metadata
    assert metadata.training_architecture == "batchtopk"
    details = metadata.training_architecture_details
    assert details is not None
    assert details["k"] == 8
    assert details["threshold_window_tokens"] == 77
    assert details["aux_coefficient"] == 1 / 32
