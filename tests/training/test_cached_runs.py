"""Activations written once train like live ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import HOOK, SMALL

from sae_kit import SAE, RunConfig, TopKSAEConfig, cache_activations
from sae_kit.cli import main
from sae_kit.demo import load_model, load_tokenizer
from sae_kit.errors import ConfigError, HookNotFoundError
from sae_kit.training.run import RunResult, run, train

TREE: dict[str, Any] = {
    "model": "demo",
    "dataset": "demo",
    "hook": HOOK,
    "tokens": 8192,
    "sae": {"architecture": "topk", "d_sae": 256, "k": 16},
    "name": "run",
    **SMALL,
}


def changed(**changes: Any) -> dict[str, Any]:
    """The tree of a run, sections merged."""
    sections = {key: {**TREE[key], **new} for key, new in changes.items() if isinstance(TREE.get(key), dict)}
    return {**TREE, **changes, **sections}


def go(out: Path, **changes: Any) -> RunResult:
    return run(RunConfig.from_dict(changed(out=str(out), **changes)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "float32"
    cfg = changed(cache={"write": str(folder), "dtype": "float32"})
    assert cache_activations(RunConfig.from_dict(cfg)) == folder
    return folder


def test_a_run_on_the_same_rows_in_the_same_order_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    live = go(tmp_path / "live")
    cached = go(tmp_path / "cached", cache={"read": str(folder), "order": "blocks"})  # one shard: as it was written
    torch.testing.assert_close(cached.saes["sae"].state_dict(), live.saes["sae"].state_dict(), rtol=0, atol=0)
    assert cached.evals == live.evals
    mine, yours = (SAE.load_from_disk(found.folder / "saes" / "sae").cfg.metadata for found in (cached, live))
    assert mine == yours


def test_a_shuffled_cache_needs_no_model(folder: Path, tmp_path: Path) -> None:
    found = train(
        hook=HOOK,
        sae=TopKSAEConfig(d_sae=256, k=16),
        tokens=16_384,
        cache={"read": str(folder), "epochs": 2},
        out=str(tmp_path),
        name="run",
        train=SMALL["train"],
        optim=SMALL["optim"],
        log=SMALL["log"],
    )
    assert found.training.tokens == 16_384
    assert found.evals == {}
    assert found.training.metrics["metrics/explained_variance"] > 0.5
    metadata = found.saes["sae"].cfg.metadata
    assert (metadata.model_name, metadata.hook_name, metadata.dataset_path) == ("demo", HOOK, "demo")
    assert metadata.exclude_special_tokens == [0]
    assert metadata.extra["sae_kit"]["median_norms"][HOOK] > 0
    assert metadata.extra["sae_kit"]["provenance"]["filters"]["norm_filter"] == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hook": "blocks.1.hook_resid_post"}, "is not in the cache in .*Did you mean 'blocks.2.hook_resid_pre'"),
        ({"data": {"context_size": 32}}, r"tokens\.packing\.context_size: expected 32, found 64"),
        ({"buffer": {"norm_filter": 5.0}}, r"filters\.norm_filter: expected 5\.0, found 10\.0"),
        ({"data": {"exclude": "none"}}, r"filters\.excluded_ids"),
        ({"model": {"name": "demo", "dtype": "bfloat16"}}, r"model\.dtype: expected 'bfloat16', found 'float32'"),
        ({"tokens": 9000}, r"8,192 activations.*Set cache\.epochs to 2"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, HookNotFoundError), match=message):
        go(tmp_path, **{**changes, "cache": {"read": str(folder)}})


def test_a_model_without_its_text_is_refused(folder: Path, tmp_path: Path) -> None:
    tree = changed(out=str(tmp_path), cache={"read": str(folder)})
    del tree["dataset"]
    with pytest.raises(ConfigError, match="name both, to compare the cache with them and to evaluate, or neither"):
        run(RunConfig.from_dict(tree))


def test_the_command_line_writes_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    flags = ["--model", "demo", "--dataset", "demo", "--hook", HOOK, "--data.context_size", "64"]
    written = ["cache", *flags, "--tokens", "6000", "--cache.write", str(folder), "--cache.dtype", "int8"]
    assert main(written) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    assert sum(shard["rows"] for shard in manifest["shards"]) == 6000
    assert main(["cache", *flags, "--tokens", "7000", "--cache.write", str(folder), "--cache.dtype", "int8"]) == 2
    assert "7000" in capsys.readouterr().err.replace(",", "")
    trained = ["train", "--hook", HOOK, "--tokens", "4096", "--cache.read", str(folder), "--sae.d_sae", "256"]
    assert main([*trained, "--train.batch_tokens", "512", "--log.console", "false", "--out", str(tmp_path)]) == 0
    assert SAE.load_from_disk(Path(capsys.readouterr().out.strip())).cfg.metadata.model_name == "demo"


def test_what_cannot_be_cached_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache\.write: expected a folder to write to, found None"):
        cache_activations(RunConfig.from_dict(TREE))
    tree = changed(cache={"write": str(tmp_path / "c")})
    del tree["hook"], tree["sae"]
    folder = cache_activations(RunConfig.from_dict({**tree, "cache": {"write": str(tmp_path / "d"), "sites": HOOK}}))
    assert list(json.loads((folder / "manifest.json").read_text())["sites"]) == [HOOK]
    with pytest.raises(ConfigError, match="there is no site to read"):
        cache_activations(RunConfig.from_dict(tree))


def test_objects_take_the_place_of_names(tmp_path: Path) -> None:
    tree = changed(cache={"write": str(tmp_path / "c"), "tokens": 700})
    del tree["model"], tree["dataset"]
    texts = [f"import os\nimport sys\n\nprint(os.path.join('a', '{i}'))\n" * 9 for i in range(40)]
    folder = cache_activations(
        RunConfig.from_dict(tree), model=load_model(), tokenizer=load_tokenizer(), documents=texts
    )
    assert json.loads((folder / "manifest.json").read_text())["provenance"]["model"]["name"] is None
