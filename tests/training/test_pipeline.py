"""The stages of a pipeline over two components, one by one and as the loop that they make."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_kit import SAE, RunConfig
from sae_kit.data.tokens import excluded_ids, held_out_rows
from sae_kit.errors import ConfigError
from sae_kit.evals import evaluate
from sae_kit.pipeline import Pipeline
from sae_kit.training.callbacks import Callback, read_metrics
from sae_kit.training.checkpoint import find_checkpoints
from sae_kit.training.run import run

BATCH = 256
COMPONENTS = {
    f"layer_{layer}": {
        "hook": f"blocks.{layer}.hook_resid_pre",
        "sae": {"architecture": "standard", "d_sae": 192, "l1_coefficient": 0.5},
        "resample": {"interval_tokens": 1024, "times": 1, "window_tokens": 512, "rows": 1024},
    }
    for layer in (1, 2)
}
TREE: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "name": "run",
    "data": {"context_size": 64, "tokenize_batch": 20},
    "buffer": {"tokens": 1024},
    "train": {"tokens": 12 * BATCH, "batch_tokens": BATCH},
    "optim": {"lr": 3e-3},
    "log": {"console": False, "every_tokens": 512},
    "checkpoint": {"every_tokens": None, "every_minutes": None},
    "saes": COMPONENTS,
}


def pipeline(out: Path, callbacks: Sequence[Callback] = (), **changes: Any) -> Pipeline:
    return Pipeline(RunConfig.from_dict({**TREE, "out": str(out), **changes}), callbacks=callbacks)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stage_after_stage(tmp_path: Path) -> None:
    stages = pipeline(tmp_path)
    activations = stages.generate_activations(1100)
    assert activations == 1024
    result = stages.train_autoencoder(activations)
    assert (result.tokens, result.stopped) == (1024, None)
    logged = result.metrics
    assert logged["layer_1/metrics/l0"] > 0
    for metric in ("metrics/l0", "sparsity/dead_features", "losses/mse_loss"):
        values = [logged[f"{name}/{metric}"] for name in COMPONENTS]
        assert logged[f"mean/{metric}"] == pytest.approx(sum(values) / 2), metric
    assert not [name for name in logged if name.startswith(("mean/details", "mean/data", "mean/optim"))]
    resampled = logged["layer_2/details/resampled"]

    scores = stages.validate_sae(2048)
    assert set(scores) == {*COMPONENTS, "mean"}
    both = [scores[name] for name in COMPONENTS]
    assert all(score is not None for score in both)
    assert scores["mean"] == pytest.approx(sum(score or 0.0 for score in both) / 2)
    last = rows_of(stages.folder)[-1]
    assert last["mean/evals/model_performance_preservation/ce_loss_score"] == scores["mean"]
    assert last["layer_1/evals/model_performance_preservation/ce_loss_score"] == scores["layer_1"]
    assert last["tokens"] == 1024
    (*_, joined) = read_metrics(stages.folder / "metrics.jsonl")
    assert joined["mean/metrics/l0"] == logged["mean/metrics/l0"], (
        "what was trained and what was validated, at one step"
    )
    assert joined["attempt"] == 1

    path = stages.save_checkpoint()
    assert path is not None
    assert path == stages.folder / "checkpoints" / f"{1024:012d}"
    assert not (stages.folder / "saes").exists()
    opened = SAE.load_from_disk(path / "saes" / "layer_1")
    assert int(opened.tokens_seen) == 1024

    result = stages.train_autoencoder(stages.generate_activations(100_000))
    assert result.tokens == 12 * BATCH
    assert result.metrics["layer_2/details/resampled"] >= resampled
    assert stages.activations_left == stages.generate_activations(1024) == 0
    stages.save_checkpoint(is_final=True)
    saved = SAE.load_from_disk(stages.folder / "saes" / "layer_2")
    torch.testing.assert_close(saved.W_dec, stages.saes_for_use()["layer_2"].W_dec)
    assert saved.cfg.metadata.extra["sae_kit"]["provenance"] == stages.store.provenance
    assert saved.cfg.metadata.extra["sae_kit"]["median_norms"] == stages.store.medians
    stages.store.close()


def test_the_score_is_the_ratio_of_sums_that_the_evaluation_has(tmp_path: Path) -> None:
    stages = pipeline(tmp_path)
    stages.train_autoencoder(stages.generate_activations(512))
    scores = stages.validate_sae(1024)
    live = stages._live
    rows = held_out_rows(stages.cfg.data, live.tokenizer, 16, context_size=64, seed=0)
    limits = {site: 10 * median for site, median in stages.store.medians.items()}
    excluded = excluded_ids("structural", live.tokenizer)
    report = evaluate(stages.saes_for_use(), live.model, rows, excluded_ids=excluded, max_norms=limits)
    for name in COMPONENTS:
        found = report.metrics[name]["model_performance_preservation"]
        losses = [found[f"ce_loss_{key}"] or 0.0 for key in ("without_sae", "with_sae", "with_ablation")]
        assert scores[name] == pytest.approx((losses[2] - losses[1]) / (losses[2] - losses[0]), rel=1e-9)


def test_the_loop_trains_as_a_run_does_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """Bit for bit, whatever the stages: validating and saving change nothing that is trained."""
    whole = pipeline(tmp_path / "loop")
    saes = whole.run_pipeline(1024, validation_n_activations=512, validate_frequency=1024, checkpoint_frequency=2048)
    assert [int(path.name) for path in find_checkpoints(whole.folder)] == [2048, 12 * BATCH]
    validated = [
        row["tokens"]
        for row in rows_of(whole.folder)
        if "mean/evals/model_performance_preservation/ce_loss_score" in row
    ]
    assert validated == [1024, 2048, 3072]

    plain = run(
        RunConfig.from_dict({**TREE, "out": str(tmp_path / "run"), "eval": {"at_end": False, "every_tokens": None}})
    )
    pipeline(tmp_path / "parts").store.close()  # stopped before its first checkpoint, it begins anew
    part = pipeline(tmp_path / "parts")
    part.train_autoencoder(part.generate_activations(1280))
    part.save_checkpoint()
    part.store.close()
    resumed = pipeline(tmp_path / "parts")
    assert resumed.trainer.tokens == 1280
    resumed.run_pipeline(100_000)
    for name in COMPONENTS:
        expected = load_file(plain.folder / "saes" / name / "sae_weights.safetensors")
        for folder in (whole.folder, resumed.folder):
            found = load_file(folder / "saes" / name / "sae_weights.safetensors")
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(saes[name].W_dec.detach(), expected["W_dec"], rtol=0, atol=0)


class StopAt(Callback):
    """A callback that ends the pipeline."""

    def on_step_end(self, trainer: Any) -> None:
        if trainer.tokens >= 600:
            trainer.callbacks.stop("it is enough")


def test_the_loop_ends_where_a_callback_says_so(tmp_path: Path) -> None:
    stages = pipeline(tmp_path, callbacks=[StopAt()])
    stages.run_pipeline(512, validation_n_activations=512)
    assert stages.activations_left == 0
    assert stages.trainer.tokens == 768
    assert rows_of(stages.folder)[-1]["tokens"] == 768
    assert (stages.folder / "saes" / "layer_1" / "cfg.json").exists()


def test_a_loop_of_stages_ends_with_its_text(tmp_path: Path) -> None:
    """Not where the tokens of the config are used up, which are more than there are."""
    texts = [f"def f{i}():\n    return {i}\n" * 20 for i in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    rest = {key: value for key, value in TREE.items() if key != "dataset"}
    data = {"context_size": 64, "sources": [{"path": str(tmp_path / "text.jsonl"), "epochs": 1}]}
    train = {"tokens": 100 * BATCH, "batch_tokens": BATCH}
    tree = {**rest, "data": data, "train": train, "out": str(tmp_path)}
    stages = Pipeline(RunConfig.from_dict(tree))
    sizes: list[int] = []
    while stages.activations_left and len(sizes) < 100:
        before = stages.trainer.tokens
        stages.train_autoencoder(stages.generate_activations(1024))
        sizes.append(stages.trainer.tokens - before)
    assert set(sizes[:-1]) == {1024}
    assert sizes[-1] < 1024
    assert stages.activations_left == 0
    stages.store.close()


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no SAE to train"):
        pipeline(tmp_path, saes={})
    with pytest.raises(ConfigError, match="'mean' stands for all components"):
        pipeline(tmp_path, saes={"mean": COMPONENTS["layer_1"]})
    stages = pipeline(tmp_path)
    with pytest.raises(ConfigError, match=r"expected at least train.batch_tokens = 256, found 255"):
        stages.generate_activations(255)
    stages.store.close()
