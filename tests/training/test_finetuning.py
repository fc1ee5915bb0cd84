"""Training that begins from an SAE that exists begins where that one is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_run import HOOK, SMALL

from sae_kit import SAE, RunConfig
from sae_kit.errors import ConfigError, ShapeError
from sae_kit.training.run import RunResult, run


def go(out: Path, architecture: str = "topk", *, entry: dict[str, Any] | None = None, **sae: Any) -> RunResult:
    fields = {"architecture": architecture, "d_sae": 256, "k": 16, **sae}
    tree = {"model": "demo", "dataset": "demo", "tokens": 12_288, "out": str(out), "name": "run", **SMALL}
    return run(RunConfig.from_dict({**tree, "saes": {"sae": {"hook": HOOK, "sae": fields, **(entry or {})}}}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return go(tmp_path_factory.mktemp("first")).folder


def test_a_rate_of_zero_leaves_the_sae_as_it_was(trained: Path, tmp_path: Path) -> None:
    start = str(trained / "saes" / "sae")
    found = go(tmp_path, entry={"start": start, "lr": 0.0}).saes["sae"]
    before = SAE.load_from_disk(start)
    u = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found(u), before(u), rtol=1e-5, atol=1e-5)
    assert found.cfg.normalize_activations == before.cfg.normalize_activations == "none"
    assert int(found.tokens_seen) == 12_288, "counted anew"


def test_training_goes_on_from_there(trained: Path, tmp_path: Path) -> None:
    start = str(trained / "saes" / "sae")
    entry = {"start": start, "lr": 1e-4}
    first, again = (
        found.evals["sae"]["reconstruction_quality"]["explained_variance"] or 0.0
        for found in (go(tmp_path / "a"), go(tmp_path / "b", entry=entry, aux_coefficient=0.01))
    )
    assert again > first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 512}, "sae.d_sae is 512, there it is 256"),
        ({"k": 8}, "sae.k is 8, there it is 16"),
        ({"architecture": "batchtopk"}, "holds a topk SAE, and sae.architecture is batchtopk"),
        ({"normalize_activations": "layer_norm"}, "sae.normalize_activations is 'layer_norm', there it is 'none'"),
    ],
)
def test_another_sae_is_refused(trained: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        go(tmp_path, entry={"start": str(trained / "saes" / "sae")}, **changes)


def test_what_cannot_be_a_start_is_said(trained: Path, tmp_path: Path) -> None:
    start = str(trained / "saes" / "sae")
    with pytest.raises(FileNotFoundError):
        go(tmp_path, entry={"start": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match="give one of them"):
        go(tmp_path, entry={"start": start, "init": {"b_dec": "mean"}})
    with pytest.raises((ConfigError, ShapeError)):
        go(tmp_path, entry={"start": start, "hook": "blocks.2.attn.hook_z[1]"})
