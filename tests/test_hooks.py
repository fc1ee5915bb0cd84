"""The light HookPoint, and the generators that everything random draws from."""

import copy
import hashlib

import pytest
import torch
from torch import Tensor

from sae_kit.hooks import HookPoint
from sae_kit.seeding import derive_seed, generator


def test_hooks_run_in_order_and_replace() -> None:
    point, seen = HookPoint(), []

    def double(tensor: Tensor, hook: HookPoint) -> Tensor:
        seen.append("double")
        assert hook is point
        return 2 * tensor

    def watch(tensor: Tensor, hook: HookPoint) -> None:
        seen.append(tensor.item())

    point.add_hook(watch)
    point.add_hook(double, prepend=True)
    assert point(torch.tensor(3.0)) == 6
    assert seen == ["double", 6.0]
    assert [record.user_hook for record in point.fwd_hooks] == [double, watch]


def test_removal_by_permanence_and_level() -> None:
    point = HookPoint()
    for permanent, level in ((False, None), (False, 1), (True, None)):
        point.add_hook(lambda t, hook: None, is_permanent=permanent, level=level)
    point.remove_hooks(level=1)
    assert [record.is_permanent for record in point.fwd_hooks] == [False, True]
    assert point.has_hooks(including_permanent=False)
    point.remove_hooks()
    assert not point.has_hooks(including_permanent=False)
    assert point.has_hooks("fwd")
    assert point.is_listening
    point.remove_hooks(including_permanent=True)
    assert not point.is_listening
    assert not point.has_hooks()


def test_backward_hooks_see_and_replace_gradients() -> None:
    point, seen = HookPoint(), []

    def negate(gradient: Tensor, hook: HookPoint) -> Tensor:
        seen.append(gradient.item())
        return -gradient

    point.add_hook(negate, dir="bwd")
    assert point.has_hooks("bwd")
    assert not point.has_hooks("fwd")
    x = torch.tensor(2.0, requires_grad=True)
    (3 * point(x)).backward()
    assert seen == [3.0]
    assert x.grad == -3
    point.remove_hooks("both")
    assert not point.is_listening


def test_alias_names_are_seen_one_by_one() -> None:
    point, names = HookPoint(), []
    point.name = "own"

    def add(tensor: Tensor, hook: HookPoint) -> Tensor:
        names.append(hook.name)
        return tensor + 1

    point.add_hook(add, alias_names=["a", "b"])
    assert point(torch.tensor(0.0)) == 2
    assert names == ["a", "b"]
    assert point.name == "own"


def test_layer_and_context() -> None:
    point = HookPoint()
    point.name = "blocks.3.hook_resid_pre.hook_sae_input"
    point.ctx["x"] = 1
    assert point.layer() == 3
    point.clear_context()
    assert point.ctx == {}
    point.name = "embed"
    with pytest.raises(ValueError, match="'embed' is in no block"):
        point.layer()


def test_a_copy_starts_without_hooks() -> None:
    point = HookPoint()
    point.add_hook(lambda t, hook: 2 * t)
    assert copy.deepcopy(point)(torch.tensor(1.0)) == 1


def test_seeds_are_hashes_of_what_they_are_for() -> None:
    digest = hashlib.sha256(b"7/init/sae/3").digest()
    assert derive_seed(7, "init", "sae", 3) == int.from_bytes(digest[:8], "big") >> 1
    seeds = {derive_seed(s, p, n, i) for s in (0, 1) for p in ("init", "buffer") for n in ("", "a") for i in (0, 1)}
    assert len(seeds) == 16
    draw = [torch.rand(3, generator=generator(0, "x")) for _ in range(2)]
    assert torch.equal(*draw)
