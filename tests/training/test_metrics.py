"""The row of metrics: its names, and its values against direct computations."""

import math
from typing import Any

import pytest
import torch
from helpers import BATCH, make_sae, run_config, sparse_batches

from sae_kit import SAETrainer
from sae_kit.data.batch import Batch
from sae_kit.evals.family import EvalStep
from sae_kit.evals.reconstruction import Reconstruction
from sae_kit.sae import SAE
from sae_kit.training.callbacks import Callback, Metrics, Timer

OF_ONE = {
    "losses/overall_loss",
    "losses/mse_loss",
    "metrics/explained_variance",
    "metrics/fvu",
    "metrics/nmse",
    "metrics/cosine_similarity",
    "metrics/l2_ratio",
    "metrics/l0",
    "metrics/mean_log10_feature_sparsity",
    "sparsity/dead_features",
    "sparsity/dead_fraction",
    "sparsity/dead_features_1e5",
    "sparsity/dead_features_1e6",
    "sparsity/below_1e-5",
    "sparsity/below_1e-6",
    "sparsity/above_1e-2",
    "sparsity/above_1e-1",
    "optim/grad_norm",
    "optim/clipped_fraction",
    "optim/skipped_steps",
    "weights/b_dec_norm",
    *(f"weights/{name}_norms_{quantile}" for name in ("W_enc", "W_dec") for quantile in ("p05", "median", "p95")),
    "details/current_learning_rate",
}
"""What every SAE has."""
OF_RUN = {
    "details/n_training_samples",
    "perf/tokens_per_second",
    "perf/wait_seconds",
    "perf/step_seconds",
    "perf/peak_memory_gib",
}


class Keep(Callback):
    def __init__(self) -> None:
        self.rows: list[Metrics] = []

    def on_log(self, trainer: SAETrainer, metrics: Metrics) -> None:
        self.rows.append(metrics)


def rows_of(saes: SAE | dict[str, SAE], steps: int = 2, **train: Any) -> list[dict[str, Any]]:
    """Rows of metrics of a run that logs after each step and trains with a rate of 0."""
    keep = Keep()
    some = next(iter(saes.values())) if isinstance(saes, dict) else saes
    log = {"console": False, "every_tokens": BATCH}
    cfg = run_config(steps, log=log, optim={"lr": 0.0}, train=train)
    SAETrainer(cfg, saes, sparse_batches(some, steps), callbacks=[Timer(), keep]).fit()
    return [dict(row) for row in keep.rows]


def test_a_row_of_two_saes_has_these_names() -> None:
    saes = {"one": make_sae("batchtopk", aux_coefficient=0.0), "two": make_sae("jumprelu", target_l0=5.0)}
    own = {
        "one": {"metrics/topk_threshold"},
        "two": {"losses/l0_loss", "details/l0_coefficient", "metrics/target_l0"},
    }
    for row in rows_of(saes):
        expected = {f"{name}/{key}" for name, keys in own.items() for key in OF_ONE | keys} | OF_RUN
        assert set(row) == expected
        assert all(isinstance(value, int | float) for value in row.values())


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("form", [("topk", "sae"), ("standard", "crosscoder"), ("topk", "transcoder")])
def test_what_compares_activations_is_that_of_evals(form: tuple[str, str], accumulate: int) -> None:
    """One definition: the family of evals on the same rows, those of both steps together."""
    sae = make_sae(*form, normalize_activations="expected_average_only_in")
    given = [Batch(batch.x, batch.y) for batch in sparse_batches(sae, 2)]
    given[0].x[5], given[0].y[5] = 0.0, 0.0  # has no cosine and no ratio
    keep = Keep()
    log = {"console": False, "every_tokens": 2 * BATCH}
    cfg = run_config(2, log=log, optim={"lr": 0.0}, train={"accumulate": accumulate})
    SAETrainer(cfg, sae, given, callbacks=[keep]).fit()
    family = Reconstruction(math.prod(sae.geometry.out_shape), sae.geometry.n_latents)
    with torch.no_grad():
        for batch in given:
            codes = sae.encode_sparse(batch.x)
            family.update(EvalStep(batch.y.flatten(1), sae.decode(codes).flatten(1), codes))
    found = family.compute()
    quality = found["reconstruction_quality"]
    (row,) = keep.rows
    for ours, value in {
        "explained_variance": quality["explained_variance"],
        "nmse": quality["nmse"],
        "cosine_similarity": quality["cossim"],
        "l2_ratio": found["shrinkage"]["l2_ratio"],
    }.items():
        assert row[f"metrics/{ours}"] == pytest.approx(value, rel=1e-5), ours


def test_norms_are_those_of_the_weights() -> None:
    sae = make_sae("topk")
    row = rows_of(sae)[-1]
    assert row["weights/b_dec_norm"] == pytest.approx(float(sae.b_dec.detach().norm()))
    for name, norms in (("W_enc", sae.W_enc.detach().norm(dim=0)), ("W_dec", sae.W_dec.detach().norm(dim=1))):
        assert row[f"weights/{name}_norms_median"] == pytest.approx(float(norms.median()), rel=0.1)
        below = [float((norms <= row[f"weights/{name}_norms_{q}"]).float().mean()) for q in ("p05", "p95")]
        assert below == pytest.approx([0.05, 0.95], abs=0.011)


def test_latents_are_counted_between_bounds_of_their_frequency() -> None:
    sae = make_sae("topk")
    row, density = rows_of(sae, steps=4)[-1], sae.firing_count / (4 * BATCH)
    assert row["sparsity/above_1e-1"] == int((density > 0.1).sum()) > 0
    assert row["sparsity/above_1e-2"] == int((density > 0.01).sum()) > row["sparsity/above_1e-1"]
    assert row["sparsity/below_1e-5"] == row["sparsity/below_1e-6"] == int((density == 0).sum()) > 0


def test_a_step_that_is_skipped_is_in_no_comparison() -> None:
    good, bad = (next(sparse_batches(make_sae("topk"), 1, seed=seed)).x for seed in (1, 2))
    bad[3, 3] = torch.nan
    found = []
    for batches in ([good], [good, bad]):
        keep, log = Keep(), {"console": False, "every_tokens": 2 * BATCH}
        cfg = run_config(len(batches), log=log, optim={"lr": 0.0})
        SAETrainer(cfg, make_sae("topk"), batches, callbacks=[keep]).fit()
        found.append([keep.rows[-1][f"metrics/{name}"] for name in ("nmse", "cosine_similarity", "l2_ratio", "fvu")])
    assert found[0] == found[1]
    assert all(math.isfinite(value) for value in found[1])
