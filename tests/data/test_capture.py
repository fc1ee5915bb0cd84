"""Values are read without changing the model, and the forward stops at the last site that was asked for."""

import threading
from typing import Any

import pytest
import torch
from hosts import BLOCKS, FAMILIES, LAYERS, Toy, bridge, ids, kinds, shared
from torch import Tensor, nn

from sae_kit.data.capture import Reader, capture, max_context, site_width
from sae_kit.data.families import FAMILIES as TABLE
from sae_kit.data.sites import resolve
from sae_kit.errors import ConfigError, ShapeError, SiteDidNotFireError

HOSTS = [(family, kind) for family in FAMILIES for kind in kinds(family)]
HOSTS += [("gpt2", "folded"), ("llama", "folded"), ("gpt2", "native")]
every_host = pytest.mark.parametrize(("family", "kind"), HOSTS)
NAMES = ["blocks.1.hook_mlp_out", "blocks.0.hook_resid_pre", "hook_embed", "blocks.1.attn.hook_z"]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@every_host
def test_values_are_those_of_a_whole_forward_in_any_order(family: str, kind: str) -> None:
    host = shared(kind, family)
    names = [*NAMES, *(f"blocks.1.{name}" for name in TABLE[family].places)]
    whole = dict[str, Tensor]()
    handles = [
        resolve(host, name).on_read(lambda value, name=name: whole.update({name: value.clone()})) for name in names
    ]
    host(ids())
    for handle in handles:
        handle.remove()
    for order in (names, names[::-1], sorted(names)):
        values = capture(host, order, ids())
        assert list(values) == list(dict.fromkeys(order))
        for name, value in values.items():
            # Not bit by bit: hooks change where tensors lie in memory, and with it how some CPUs sum.
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
            assert not value.requires_grad


@pytest.mark.parametrize(("family", "kind"), [host for host in HOSTS if host[1] != "plain"])
def test_values_equal_the_hosts_own_cache(family: str, kind: str) -> None:
    host = shared(kind, family)
    _, cache = host.run_with_cache(ids())
    for name, value in capture(host, NAMES, ids()).items():
        torch.testing.assert_close(value, cache[name].reshape(*ids().shape, -1), rtol=1e-5, atol=1e-6)


def blocks_of(host: Any, family: str) -> Any:
    return host.blocks if hasattr(host, "hook_dict") else host.get_submodule(BLOCKS[family])


@every_host
def test_stops_after_the_last_site_and_leaves_no_hook(family: str, kind: str) -> None:
    host = shared(kind, family)
    clean = host(ids())  # transformers attaches hooks of its own in the first forward
    before = hooks_of(host)
    blocks, ran = blocks_of(host, family), list[int]()
    own = [block.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(blocks)]
    for names, expected in (
        (["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"], [0, 1]),
        (["blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"], [0, 1]),
        (["hook_embed"], []),
        ([f"blocks.{LAYERS - 1}.hook_resid_post"], list(range(LAYERS))),
    ):
        ran.clear()
        capture(host, names, ids())
        assert ran == expected
    for handle in own:
        handle.remove()
    assert hooks_of(host) == before
    assert kind == "plain" or not host.list_hooks()
    again = host(ids())
    assert torch.equal(*(out if isinstance(out, Tensor) else out.logits for out in (again, clean)))


@every_host
def test_a_site_that_never_fires_and_a_model_that_fails_leave_no_hook(family: str, kind: str) -> None:
    host = shared(kind, family)
    host(ids())
    before, blocks = hooks_of(host), {"hooked": "blocks", "native": "layers"}.get(kind, BLOCKS[family])
    with pytest.raises(SiteDidNotFireError, match=rf"never reached '{blocks}:out'"):
        capture(host, ["blocks.1.hook_resid_pre", f"{blocks}:out"], ids())
    with pytest.raises(IndexError):
        capture(host, ["blocks.1.hook_resid_pre"], ids() + 1000)
    assert hooks_of(host) == before


@every_host
def test_a_forward_in_another_thread_is_neither_read_nor_stopped(family: str, kind: str) -> None:
    host, ran = shared(kind, family), []
    expected = capture(host, NAMES, ids())

    def whole() -> None:
        ran.append(host(ids(seed=2)))

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(target=whole)
            other.start()
            other.join()

    handle = blocks_of(host, family)[0].register_forward_pre_hook(meanwhile)
    found = capture(host, NAMES, ids())
    handle.remove()
    assert len(ran) == 1, "the other forward came to its end"
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


class Giving(nn.Module):
    """Gives what it was made with."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value, self.inner = value, nn.Identity()

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.value)


def test_outputs_of_other_kinds() -> None:
    x = torch.ones(1, 2, 3)
    for value in (x, (x, None), [x, 1], {"logits": x, "more": None}):
        assert torch.equal(capture(Giving(value), ["inner"], x)["inner"], x)
    for value in (None, (), {}, "text", (None, x), {"logits": None}):
        with pytest.raises(ShapeError, match=r"expected a tensor at 'inner', found .*; choose another site"):
            capture(Giving(value), ["inner"], x)
    with pytest.raises(ShapeError, match=r"expected a tensor at 'inner:in', found NoneType"):
        capture(Giving(None), ["inner:in"], x)
    model = Giving({"logits": x})
    handle = resolve(model, "inner").on_write(torch.zeros_like)
    with pytest.raises(ShapeError, match=r"'inner' gives a dict: only tensors and tuples can be replaced"):
        model(x)
    handle.remove()


def test_what_cannot_be_read_is_refused_before_the_forward() -> None:
    host = shared("plain", "llama")
    with pytest.raises(ConfigError, match="output_hidden_states=True cannot be combined with an early stop"):
        capture(host, ["model.layers.1"], ids(), output_hidden_states=True)
    host.config.output_hidden_states = True
    with pytest.raises(ConfigError, match="output_hidden_states=True cannot be combined with an early stop"):
        capture(host, ["model.layers.1"], ids())
    host.config.output_hidden_states = False
    with pytest.raises(ConfigError, match="at least one site"):
        capture(host, [], ids())


def test_resolved_sites_are_accepted_and_named_by_their_spelling() -> None:
    host = shared("bridge", "llama")
    assert list(capture(host, [resolve(host, "blocks.1.hook_resid_pre")], ids())) == ["blocks.1.hook_resid_pre"]


def test_written_value_is_what_readers_and_the_users_hooks_see() -> None:
    host = bridge()
    seen: dict[str, Tensor] = {}
    host.add_hook("blocks.1.hook_resid_pre", lambda value, hook: seen.update(user=value))
    site = resolve(host, "blocks.1.hook_resid_pre")
    reading = site.on_read(lambda value: seen.update(reader=value))
    writing = site.on_write(lambda value: torch.zeros_like(value))
    host(ids())
    assert not seen["user"].any()
    assert not seen["reader"].any()
    host.reset_hooks()
    seen.clear()
    host(ids())
    assert list(seen) == ["reader"], "reset_hooks removes the user's hook, not ours"
    reading.remove()
    writing.remove()
    assert not host.list_hooks()


# ---- readers: what every forward is given ----------------------------------------------------------------------------


@every_host
def test_padded_rows_give_what_the_rows_alone_give(family: str, kind: str) -> None:
    reader, lengths = Reader(shared(kind, family)), torch.tensor([8, 5, 3])
    rows = ids(3)
    values = reader.capture(NAMES, rows, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = reader.capture(NAMES, rows[row : row + 1, :length])
        for name, value in values.items():
            torch.testing.assert_close(value[row : row + 1, :length], alone[name], atol=1e-5, rtol=1e-4)


def test_padding_is_not_attended_to() -> None:
    """In a causal model no position sees what comes after it, so that this is seen where the padding itself is."""
    reader, rows = Reader(shared("plain", "llama")), ids()
    masked = reader.capture(["blocks.2.hook_resid_pre"], rows, torch.tensor([8, 2]))["blocks.2.hook_resid_pre"]
    full = reader.capture(["blocks.2.hook_resid_pre"], rows, torch.tensor([8, 8]))["blocks.2.hook_resid_pre"]
    torch.testing.assert_close(masked[0], full[0])
    assert (masked[1, 3:] - full[1, 3:]).abs().max() > 1e-3


def test_padded_rows_need_a_model_that_takes_a_mask() -> None:
    reader = Reader(Toy())
    assert reader.capture(["layer"], ids(), torch.tensor([8, 8]))["layer"].shape == (2, 8, 32)
    with pytest.raises(ConfigError, match="takes attention_mask, which Toy does not"):
        reader.capture(["layer"], ids(), torch.tensor([8, 5]))


def test_arguments_of_every_forward_reach_it() -> None:
    host, shifted = shared("plain", "llama"), torch.arange(8)[None] + 5
    expected = capture(host, NAMES, ids(), position_ids=shifted)
    reader = Reader(host, {"position_ids": shifted})
    found = reader.capture(NAMES, ids())
    assert all(torch.equal(found[name], expected[name]) for name in NAMES)
    assert site_width(Reader(host, {"attention_mask": torch.ones(1, 1)}), "blocks.1.hook_mlp_out") == 32
    torch.testing.assert_close(reader(ids()).logits, host(ids(), position_ids=shifted).logits)
    seen = []
    handle = host.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    Reader(host, {"logits_to_keep": 1})(ids(), torch.tensor([8, 5]))
    handle.remove()
    assert seen[0]["logits_to_keep"] == 1
    assert seen[0]["attention_mask"].sum(1).tolist() == [8, 5]
    assert seen[0]["use_cache"] is False


def test_autocast_runs_matrix_products_in_bfloat16() -> None:
    for family, kind in (("llama", "plain"), ("gpt2", "plain"), ("llama", "bridge")):
        host = shared(kind, family)
        exact = Reader(host).capture(["blocks.1.mlp.hook_post"], ids())["blocks.1.mlp.hook_post"]
        rough = Reader(host, autocast=True).capture(["blocks.1.mlp.hook_post"], ids())["blocks.1.mlp.hook_post"]
        assert exact.dtype == torch.float32
        assert rough.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, atol=0.02, rtol=0.1)
        assert {parameter.dtype for parameter in host.parameters()} == {torch.float32}


# ---- models of other kinds -------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Two layers, the second of which works in place and is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), Doubling()

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return self.second(value=self.first(x), note="kept")


class Doubling(nn.Module):
    def forward(self, value: Tensor, note: str) -> tuple[Tensor, str]:
        return value.mul_(2), note


def test_any_module_and_values_that_are_changed_in_place_later() -> None:
    model, x = InPlace(), torch.ones(3, 4)
    values = capture(model, ["first", "second:in", "second"], x)
    expected = model.first(x).detach()
    torch.testing.assert_close(values["first"], expected)
    torch.testing.assert_close(values["second:in"], expected)
    torch.testing.assert_close(values["second"], 2 * expected)
    with torch.no_grad():
        for spelling in ("second:in", "second:out"):
            handle = resolve(model, spelling).on_write(torch.zeros_like)
            out, note = model(x)
            assert not out.any()
            assert note == "kept"
            handle.remove()
        assert model(x)[0].any()


def test_hooked_root_module_with_a_plain_hook_dict() -> None:
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.HookedRootModule import HookedRootModule

    class Tiny(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.hook_mid, self.head = nn.Linear(4, 6), HookPoint(), nn.Linear(6, 2)
            self.setup()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hook_mid(self.layer(x)))

    model, x = Tiny(), torch.ones(2, 3, 4)
    values = capture(model, ["hook_mid", "head:in"], x)
    torch.testing.assert_close(values["hook_mid"], model.layer(x).detach())
    assert torch.equal(values["hook_mid"], values["head:in"])
    assert site_width(model, "hook_mid", x) == 6


def test_width_and_context() -> None:
    for family, kind in (("llama", kind) for kind in kinds("llama")):
        host = shared(kind, family)
        assert site_width(host, "blocks.1.hook_resid_pre") == 32
        assert site_width(host, "blocks.1.mlp.hook_post") == 48
        assert site_width(host, "blocks.1.attn.hook_z[1]") == 8
        assert max_context(host) == 32
    assert max_context(nn.Linear(1, 1)) is None
