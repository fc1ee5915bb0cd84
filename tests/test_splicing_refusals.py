"""What cannot be spliced is refused, in words, before any forward."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from helpers import make_sae
from hosts import bridge, ids, sae_at
from torch import nn

from sae_kit import HookedSAETransformer, SAEMetadata, attached
from sae_kit.errors import ConfigError, HookNotFoundError, ShapeError

SITE, EARLIER, CANONICAL = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.hook_out"


def hooks_of(model: nn.Module) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(getattr(m, "fwd_hooks", ()))) for m in model.modules()
    ]


@pytest.fixture
def llama() -> Any:
    return HookedSAETransformer.from_model(bridge("llama"))


@pytest.mark.parametrize(
    ("saes", "error", "message"),
    [
        (lambda: sae_at("blocks.1.hook_resid_pots"), HookNotFoundError, r"Did you mean 'blocks\.1\.hook_resid_pos"),
        (
            lambda: {"blocks.9.hook_resid_post": sae_at(SITE)},
            HookNotFoundError,
            r"'blocks\.9\.hook_resid_post' is not in this",
        ),
        (lambda: [sae_at(EARLIER), sae_at("nowhere")], HookNotFoundError, "'nowhere' is not in this model"),
        (lambda: [sae_at(SITE), sae_at(CANONICAL)], ConfigError, r"two SAEs at 'blocks\.1\.hook_out' in one call"),
        (
            lambda: dict.fromkeys((SITE, EARLIER), sae_at(SITE)),
            ConfigError,
            r"attached at another site .* copy\.deepcopy",
        ),
        (lambda: sae_at(None), ConfigError, r"pass \{site: sae\}"),
        (lambda: iter(["runs/saes/sae"]), ConfigError, r"found str; SAE\.load_from_disk reads one"),
        (lambda: {SITE: sae_at(SITE), EARLIER: None}, ConfigError, "expected an SAE, .*found NoneType"),
        (lambda: sae_at("blocks.1.hook_resid_mid"), ConfigError, r"cannot be attached at 'blocks\.1\.hook_resid_mid'"),
        (lambda: sae_at(SITE, d_in=16), ShapeError, r"'blocks\.1\.hook_resid_post' takes .* width 16, found 32"),
        (lambda: {"lm_head": sae_at(SITE)}, ShapeError, "'lm_head' takes activations of width 32, found 61"),
        (
            lambda: make_sae("topk", metadata=SAEMetadata(hook_name=EARLIER, hook_name_out=SITE)),
            ConfigError,
            r"reads 'blocks\.0\.hook_mlp_out' and writes",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_any_forward(
    llama: Any, saes: Callable[[], Any], error: type[Exception], message: str
) -> None:
    names, hooks = set(llama.hook_dict), hooks_of(llama)
    with pytest.raises(error, match=message), attached(llama, saes()):
        pytest.fail("attached")
    assert (set(llama.hook_dict), hooks_of(llama), llama.acts_to_saes) == (names, hooks, {})


def test_something_else_than_an_sae_is_refused_where_nothing_checks_types() -> None:
    code = """
from torch import nn
from sae_kit import attached
for wrong in (nn.Linear(2, 2), None, "runs/saes/sae", {"0": 5}):
    try:
        attached(nn.Sequential(nn.Linear(2, 2)), wrong).__enter__()
    except ValueError as error:
        print(type(error).__name__, error)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    said = "ConfigError expected an SAE, several, or {{site: sae}}, found {}; SAE.load_from_disk reads one"
    assert child.stderr == ""
    assert child.stdout.splitlines() == [said.format(kind) for kind in ("Linear", "NoneType", "str", "int")]


def test_a_width_that_only_a_forward_knows_is_named_there(llama: Any) -> None:
    with (
        attached(llama, sae_at("blocks.1.mlp.hook_post")),
        pytest.raises(ShapeError, match=r"mlp\.hook_post.* found 48"),
    ):
        llama(ids())


def test_one_sae_cannot_be_at_two_sites_of_a_model_but_its_copy_can(llama: Any) -> None:
    sae = sae_at(SITE)
    with attached(llama, sae):
        with pytest.raises(ConfigError, match="another site"), attached(llama, {EARLIER: sae}):
            pytest.fail("attached")
        with attached(llama, {EARLIER: copy.deepcopy(sae)}) as spliced:
            llama(ids())
            assert list(spliced.acts) == [f"{EARLIER}.hook_sae_acts_post"]


def test_unknown_internals_cannot_be_recorded(llama: Any) -> None:
    with (
        pytest.raises(ConfigError, match="Did you mean 'hook_sae_acts_post'"),
        attached(llama, sae_at(SITE), record="hook_acts_post"),
    ):
        pytest.fail("attached")
