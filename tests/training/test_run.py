"""A run from config to folder, on the demo model and real text, small."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sae_kit
from sae_kit import SAE, RunConfig, TopKSAEConfig
from sae_kit import config as trees
from sae_kit.demo import corpus, load_model, load_tokenizer
from sae_kit.errors import (
    ConfigError,
    DataError,
    HookNotFoundError,
    OutputExistsError,
    ShapeError,
    UnknownConfigKeyError,
)
from sae_kit.training.folder import default_name
from sae_kit.training.run import RunResult, run

HOOK = "blocks.2.hook_resid_pre"
SMALL: dict[str, Any] = {
    "data": {"context_size": 64},
    "train": {"batch_tokens": 512},
    "buffer": {"tokens": 4096},
    "optim": {"lr": 3e-3},
    "eval": {"every_tokens": None, "tokens": 2048, "fidelity_tokens": 1024},
    "log": {"console": False, "every_tokens": 4096},
    "checkpoint": {"every_tokens": None, "every_minutes": None},
}


def tiny(out: Path, **changes: Any) -> RunResult:
    fields: dict[str, Any] = {"model": "demo", "dataset": "demo", "hook": HOOK, "tokens": 12_288}
    fields |= {"sae": TopKSAEConfig(d_sae=256, k=16), "out": str(out), "name": "run", **SMALL, **changes}
    if "dataset" in fields and isinstance(fields["dataset"], str):
        fields["data"] = {**fields["data"], "sources": [fields.pop("dataset")]}
        tree = {key: fields.pop(key) for key in ("hook", "sae", "tokens", "model")}
        return run(RunConfig.from_dict({**fields, **tree}))
    return sae_kit.train(**fields)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return tiny(tmp_path_factory.mktemp("runs"))


def test_the_folder_holds_everything(result: RunResult) -> None:
    names = sorted(p.relative_to(result.folder).as_posix() for p in result.folder.rglob("*") if p.is_file())
    assert names == [
        "metrics.jsonl",
        "results.csv",
        "results.json",
        "run.yaml",
        "saes/sae/cfg.json",
        "saes/sae/sae_kit.safetensors",
        "saes/sae/sae_weights.safetensors",
        "saes/sae/sparsity.safetensors",
    ]
    cfg = RunConfig.from_dict(trees.load_tree(result.folder / "run.yaml"))
    assert cfg.saes["sae"].hook == HOOK
    assert cfg.train.tokens == 12_288
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [4096, 8192, 12_288, 12_288]
    evals = result.evals["sae"]
    assert rows[-1]["evals/sparsity/l0"] == evals["sparsity"]["l0"]
    results = json.loads((result.folder / "results.json").read_text())["sae"]
    assert results["evals"] == result.evals["sae"]
    assert results["tokens"] == 12_288


def test_the_saved_sae_is_the_trained_one(result: RunResult) -> None:
    sae = SAE.load_from_disk(result.folder / "saes" / "sae")
    torch.testing.assert_close(sae.state_dict(), result.saes["sae"].state_dict(), rtol=0, atol=0)
    trained = result.training.saes["sae"]
    u = torch.randn(10, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sae(u), trained(u), rtol=1e-4, atol=1e-4)
    metadata = sae.cfg.metadata
    assert metadata.model_name == "demo"
    assert metadata.hook_name == HOOK
    assert metadata.context_size == 64
    assert metadata.exclude_special_tokens == [0]
    assert metadata.dataset_path == "demo"
    assert (metadata.hf_hook_name, metadata.hf_hook_name_out) == ("model.layers.2:in", None)
    flags = metadata.model_from_pretrained_kwargs
    assert flags == dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    ours = metadata.extra["sae_kit"]
    assert [source["holdout"] for source in ours["provenance"]["tokens"]["sources"]] == [0.05]
    assert ours["provenance"]["model"]["name"] == "demo"
    assert ours["provenance"]["filters"] == {"excluded_ids": [0], "seq_slice": None, "norm_filter": 10.0}
    assert 0.1 < ours["median_norms"][HOOK] < 1000
    assert metadata.l0 == result.evals["sae"]["sparsity"]["l0"]
    assert metadata.training_architecture_details is not None
    assert sae.tokens_seen == 12_288
    assert sae.cfg.normalize_activations == "none"
    assert trained.cfg.normalize_activations == "expected_average_only_in"
    density = 10 ** load_file(result.folder / "saes/sae/sparsity.safetensors")["sparsity"].double()
    assert density.sum().item() == pytest.approx(16, rel=0.01), "k latents on per token of training"


def test_the_evaluation_is_plausible(result: RunResult) -> None:
    evals = result.evals["sae"]
    assert 0.3 < (evals["reconstruction_quality"]["explained_variance"] or 0) < 1
    assert 0 < (evals["model_performance_preservation"]["ce_loss_score"] or 0) < 1
    assert 0 < (evals["sparsity"]["l0"] or 0) <= 16


def test_one_seed_gives_one_result(result: RunResult, tmp_path: Path) -> None:
    again = tiny(tmp_path)
    for path in (result.folder / "saes" / "sae").glob("*.safetensors"):
        assert path.read_bytes() == (again.folder / "saes" / "sae" / path.name).read_bytes()
    assert again.evals == result.evals
    other = tiny(tmp_path / "other", seed=1, eval={"at_end": False, "every_tokens": None})
    assert not torch.equal(other.saes["sae"].W_dec, result.saes["sae"].W_dec)
    assert other.evals == {}


def test_several_saes_share_one_pass(result: RunResult, tmp_path: Path) -> None:
    """Another SAE in the run changes neither the data nor the first SAE."""
    tree = trees.load_tree(result.folder / "run.yaml")
    wide = {"hook": "blocks.1.hook_resid_post", "sae": {"architecture": "standard", "d_sae": 128}, "lr": 1e-3}
    tree |= {"out": str(tmp_path), "saes": {**tree["saes"], "other": wide}}
    both = run(RunConfig.from_dict(tree))
    assert set(both.saes) == set(both.evals) == {"sae", "other"}
    torch.testing.assert_close(both.saes["sae"].state_dict(), result.saes["sae"].state_dict(), rtol=0, atol=0)
    assert both.training.metrics["other/details/current_learning_rate"] == pytest.approx(1e-3 * 512 / 2457, rel=1e-3)


def test_the_run_says_where_an_sae_reads(result: RunResult, tmp_path: Path) -> None:
    """Metadata of a reused config do not: they would train on another site, silently."""
    old = result.saes["sae"].cfg.metadata
    old = dataclasses.replace(old, neuronpedia_id="x", hook_head_index=0, l0=None)
    sae = TopKSAEConfig(d_sae=256, k=16, metadata=old)
    found = (
        tiny(tmp_path, hook="blocks.3.hook_resid_pre", sae=sae, eval={"at_end": False, "every_tokens": None})
        .saes["sae"]
        .cfg.metadata
    )
    assert found.hook_name == "blocks.3.hook_resid_pre"
    assert (found.neuronpedia_id, found.hook_head_index) == ("x", None)


def test_a_single_head_and_a_slice_of_positions(tmp_path: Path) -> None:
    data = {**SMALL["data"], "seq_slice": [4, 60, 2]}
    found = tiny(tmp_path, hook="blocks.2.attn.hook_z[1]", data=data)
    sae = found.saes["sae"]
    assert sae.cfg.d_in == 32
    metadata = sae.cfg.metadata
    assert (metadata.hook_name, metadata.hook_head_index) == ("blocks.2.attn.hook_z", 1)
    assert metadata.hf_hook_name == "model.layers.2.self_attn.o_proj:in"
    assert metadata.sites == (("blocks.2.attn.hook_z[1]",), ("blocks.2.attn.hook_z[1]",))
    assert metadata.module_paths == {"blocks.2.attn.hook_z[1]": "model.layers.2.self_attn.o_proj:in[1]"}
    assert sae.cfg.metadata.seqpos_slice == (4, 60, 2)
    row = found.training.metrics
    assert row["data/dropped_slice"] > row["data/dropped_special"] > 0
    assert row["data/lm_tokens"] > 2 * 12_288
    assert 0 < (found.evals["sae"]["reconstruction_quality"]["explained_variance"] or 0) < 1


@pytest.mark.parametrize("change", [{"fidelity_tokens": 2048}, {"ablation": "mean"}])
def test_every_field_of_the_evaluation_has_an_effect(result: RunResult, tmp_path: Path, change: dict[str, Any]) -> None:
    found = tiny(tmp_path, eval={**SMALL["eval"], **change}).evals["sae"]["model_performance_preservation"]
    assert (
        found["ce_loss_with_ablation"] != result.evals["sae"]["model_performance_preservation"]["ce_loss_with_ablation"]
    )


def test_the_evaluation_leaves_out_what_training_left_out(result: RunResult, tmp_path: Path) -> None:
    data = {**SMALL["data"], "exclude": "none"}
    found = tiny(tmp_path, data=data).evals["sae"]["shrinkage"]["l2_norm_in"] or 0.0
    assert found > 1.05 * (result.evals["sae"]["shrinkage"]["l2_norm_in"] or 0.0), "BOS has a norm of its own"


def test_own_model_and_own_texts(tmp_path: Path) -> None:
    texts = corpus().train[:150] + corpus().held_out[:20]
    found = tiny(tmp_path, model=load_model(), tokenizer=load_tokenizer(), dataset=texts)
    assert found.training.tokens == 12_288
    assert set(found.evals) == {"sae"}


def test_an_iterator_of_texts_trains_without_evaluation(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sae_kit"):
        found = tiny(tmp_path, dataset=iter(corpus().train[:200]))
    assert found.training.tokens == 12_288
    assert found.evals == {}
    assert "an iterator of texts can be read only once" in caplog.text


def test_wandb_keeps_an_offline_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = {**SMALL["log"], "wandb": {"project": "p", "mode": "offline", "tags": ["t"]}}
    found = tiny(tmp_path, log=log, eval={"at_end": False, "every_tokens": None})
    (kept,) = (found.folder / "wandb").glob("offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"metrics/explained_variance" in content
    assert b"details/n_training_samples" in content


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hook": "blocks.2.hook_resid_prey"}, HookNotFoundError, "Did you mean 'blocks.2.hook_resid_pre'?"),
        (
            {"sae": TopKSAEConfig(d_in=64, d_sae=256)},
            ShapeError,
            "sae.d_in is 64, but 'blocks.2.hook_resid_pre' is 128 wide",
        ),
        ({"data": {"context_size": 512}}, ConfigError, "context_size: expected at most 256"),
        ({"dataset": []}, DataError, ""),
        ({"optim": {"lrr": 1}}, ConfigError, "unknown key 'optim.lrr' in OptimConfig. Did you mean 'lr'?"),
        ({"train": {"batch_tokens": 512, "device": "cuda:7"}}, ConfigError, "cuda"),
        ({"name": "../up"}, ConfigError, "name: '../up' cannot be the name of one folder"),
        ({"model": "nowhere/nothing"}, ConfigError, "cannot read model 'nowhere/nothing'"),
    ],
)
def test_bad_input_is_refused_before_training(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as found:
        tiny(tmp_path, **changes)
    assert message in str(found.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing that would block the next try"


def test_an_existing_folder_is_never_overwritten(result: RunResult) -> None:
    before = {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()}
    with pytest.raises(OutputExistsError, match="exists and is not empty; nothing was changed"):
        tiny(result.folder.parent)
    assert {p: p.read_bytes() for p in result.folder.rglob("*") if p.is_file()} == before


def test_an_unwritable_folder_is_found_before_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to the run folder .*: Not a directory"):
        tiny(tmp_path / "file" / "below")


def test_short_names_and_paths() -> None:
    short = RunConfig.from_dict(
        {"model": "m", "dataset": "d", "hook": "h", "sae": {"architecture": "topk", "d_sae": 64}, "tokens": 9000}
    )
    entry = {"hook": "h", "sae": {"architecture": "topk", "d_sae": 64}}
    long = {"model": {"name": "m"}, "data": {"sources": ["d"]}, "saes": {"sae": entry}, "train": {"tokens": 9000}}
    assert short == RunConfig.from_dict(long)
    assert RunConfig.from_dict(trees.unstructure(short)) == short
    with pytest.raises(ConfigError, match=r"tokens and train.tokens are the same field: give one of them"):
        RunConfig.from_dict({**long, "tokens": 3})
    assert default_name(short).startswith("m-topk-")
    assert default_name(short) != default_name(RunConfig.from_dict({**long, "seed": 1}))
    with pytest.raises(UnknownConfigKeyError, match=r"unknown key 'tokns' in RunConfig. Did you mean 'tokens'\?"):
        RunConfig.from_dict({"tokns": 9})


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "train: TrainConfig needs tokens"),
        ({"tokens": 5}, "tokens must be at least one batch of 4,096, found 5"),
        ({"tokens": 1e6}, "train.tokens: expected int, found 1000000.0"),
        (
            {"tokens": 9000, "saes": {"a/b": {"hook": "h", "sae": {"architecture": "topk", "d_sae": 9, "k": 2}}}},
            "'a/b'",
        ),
        ({"tokens": 9000, "sae": {"d_sae": 4}, "hook": "h"}, "saes.sae.sae: an SAE config needs its architecture"),
        (
            {"tokens": 9000, "schedule": {"warm_up_tokens": 0.1}},
            "schedule.warm_up_tokens: expected int or str, found 0.1",
        ),
        ({"tokens": 9000, "log": {"every_tokens": 0}}, "log: every_tokens must be at least 1"),
        ({"tokens": 9000, "eval": {"tokens": 0}}, "eval: tokens must be at least 1"),
    ],
)
def test_impossible_trees(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        RunConfig.from_dict(tree)
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "a\\b"])
def test_names_that_are_no_folder(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of one folder"):
        RunConfig.from_dict({"tokens": 9000, "name": name})


def test_a_name_may_hold_spaces_and_any_letters() -> None:
    assert RunConfig.from_dict({"tokens": 9000, "name": "zweiter Versuch, größer"}).name == "zweiter Versuch, größer"


def test_a_run_needs_an_sae(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no SAE to train"):
        run(RunConfig.from_dict({"model": "demo", "dataset": "demo", "tokens": 9000, "out": str(tmp_path)}))


def test_a_transcoder_in_one_call(tmp_path: Path) -> None:
    result = sae_kit.train(
        model="demo",
        dataset="demo",
        hook="blocks.1.mlp.hook_in",
        hook_out="blocks.1.hook_mlp_out",
        sae={"architecture": "topk", "d_sae": 64, "k": 4, "skip": True},
        tokens=1024,
        train={"batch_tokens": 256},
        eval={"at_end": False, "every_tokens": None},
        out=str(tmp_path),
    )
    transcoder = SAE.load_from_disk(result.folder / "saes" / "sae")
    assert transcoder.geometry.kind == "skip_transcoder"
    assert transcoder.cfg.metadata.sites == (("blocks.1.mlp.hook_in",), ("blocks.1.hook_mlp_out",))
