"""Sites are found by name before any forward, read without changing the model, and the forward stops at the last."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_kit.data.capture import capture, max_context, site_width
from sae_kit.data.models import ModelConfig, load_model
from sae_kit.data.sites import resolve
from sae_kit.errors import ConfigError, HookNotFoundError, SiteDidNotFireError

# The same place under its TransformerLens name and as a module path.
PLACES = {
    "hook_embed": "model.embed_tokens",
    "blocks.1.hook_resid_pre": "model.layers.1:in",
    "blocks.1.hook_resid_post": "model.layers.1",
    "blocks.1.hook_resid_mid": "model.layers.1.post_attention_layernorm:in",
    "blocks.1.hook_attn_out": "model.layers.1.self_attn:out",
    "blocks.1.hook_mlp_out": "model.layers.1.mlp:out",
    "blocks.1.attn.hook_z": "model.layers.1.self_attn.o_proj:in",
    "blocks.1.mlp.hook_pre": "model.layers.1.mlp.gate_proj:out",
    "blocks.1.mlp.hook_post": "model.layers.1.mlp.down_proj:in",
    "blocks.1.mlp.hook_in": "model.layers.1.mlp:in",
    "blocks.1.ln2.hook_out": "model.layers.1.post_attention_layernorm:out",
}
WRITABLE = {name: path for name, path in PLACES.items() if name != "blocks.1.hook_resid_mid"}


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", PLACES)
def test_same_value_under_every_spelling_and_host(bridge: Any, llama: nn.Module, ids: Tensor, name: str) -> None:
    path = PLACES[name]
    canonical = resolve(bridge, name).names[0]
    values = [
        capture(host, [s], ids)[s] for host, s in ((bridge, name), (bridge, canonical), (bridge, path), (llama, path))
    ]
    for value in values:
        torch.testing.assert_close(value, values[0], atol=1e-4, rtol=1e-4)
        assert value.ndim == 3
        assert not value.requires_grad


@pytest.mark.parametrize("name", WRITABLE)
def test_same_effect_of_an_edit_under_every_spelling_and_host(
    bridge: Any, llama: nn.Module, ids: Tensor, name: str
) -> None:
    results = []
    for host, spelling in ((bridge, name), (bridge, WRITABLE[name]), (llama, WRITABLE[name])):
        clean = logits(host, ids)
        handle = resolve(host, spelling).on_write(lambda value: 0.5 * value + 0.1)
        results.append(logits(host, ids))
        handle.remove()
        handle.remove()
        assert torch.equal(logits(host, ids), clean)
        assert (results[-1] - clean).abs().max() > 1e-3
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[2], results[0], atol=1e-4, rtol=1e-4)


def logits(host: nn.Module, ids: Tensor) -> Tensor:
    out = host(ids)
    return (out if isinstance(out, Tensor) else out.logits).log_softmax(-1)


def test_values_equal_the_hosts_own_cache_in_any_order(bridge: Any, ids: Tensor) -> None:
    names = ["blocks.2.hook_mlp_out", "blocks.0.hook_resid_pre", "blocks.1.attn.hook_z"]
    _, cache = bridge.run_with_cache(ids)
    values = capture(bridge, names, ids)
    assert list(values) == names
    for name in names:
        # Not bit by bit: the cache's hooks change where tensors lie in memory, and with it how some CPUs sum.
        torch.testing.assert_close(values[name], cache[name].reshape(*ids.shape, -1), rtol=1e-5, atol=1e-7)
    again = capture(bridge, names[::-1], ids)
    assert all(torch.equal(again[name], values[name]) for name in names)


def test_stops_after_the_last_site_and_leaves_no_hook(bridge: Any, ids: Tensor) -> None:
    clean = bridge(ids)  # transformers attaches hooks of its own in the first forward
    before = hooks_of(bridge)
    ran: list[int] = []
    for i, block in enumerate(bridge.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    capture(bridge, ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre"], ids)
    assert ran == [0, 1]
    assert hooks_of(bridge) == before + len(bridge.blocks)
    assert not bridge.list_hooks()
    assert torch.equal(bridge(ids), clean)


def test_resolved_sites_are_accepted_and_named_by_their_spelling(bridge: Any, ids: Tensor) -> None:
    site = resolve(bridge, "blocks.1.hook_resid_pre")
    assert site.names[0] == "blocks.1.hook_in"
    assert "blocks.1.hook_resid_pre" in site.names
    assert list(capture(bridge, [site], ids)) == ["blocks.1.hook_resid_pre"]
    assert resolve(bridge, ("model.layers.1", "in")).names == ("model.layers.1:in", "blocks.1.hook_resid_pre")
    assert resolve(bridge, "model.layers.1:out").names[0] == "model.layers.1"


def test_head_shaped_values_are_flat_to_the_function_and_keep_their_shape_in_the_model(
    bridge: Any, ids: Tensor
) -> None:
    seen: list[Tensor] = []
    site = resolve(bridge, "blocks.1.attn.hook_z")
    assert site.layout == "heads"
    handle = site.on_write(lambda value: seen.append(value) or value.clone())
    clean = bridge(ids)
    assert seen[0].shape == (2, 8, 32)
    handle.remove()
    torch.testing.assert_close(bridge(ids), clean, atol=0, rtol=0)


def test_written_value_is_what_readers_and_the_users_hooks_see(bridge: Any, ids: Tensor) -> None:
    seen: dict[str, Tensor] = {}
    bridge.add_hook("blocks.1.hook_resid_pre", lambda value, hook: seen.update(user=value))
    site = resolve(bridge, "blocks.1.hook_resid_pre")
    reading = site.on_read(lambda value: seen.update(reader=value))
    writing = site.on_write(lambda value: torch.zeros_like(value))
    bridge(ids)
    assert not seen["user"].any()
    assert not seen["reader"].any()
    bridge.reset_hooks()
    seen.clear()
    bridge(ids)
    assert list(seen) == ["reader"], "reset_hooks removes the user's hook, not ours"
    reading.remove()
    writing.remove()
    assert not bridge.list_hooks()


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (
            "blocks.1.hook_resid_prey",
            "hook 'blocks.1.hook_resid_prey' is not in this model. Did you mean 'blocks.1.hook_resid_pre'?",
        ),
        ("model.layers.1.mlpp", "hook 'model.layers.1.mlpp' is not in this model. Did you mean 'model.layers.1.mlp'?"),
        ("model.layers.1:inn", "hook 'model.layers.1:inn' is not in this model."),
        ("", "hook '' is not in this model."),
        ("blocks.1.hook_mlp_in", "sleeps in this model: call model.set_use_hook_mlp_in(True)"),
        ("blocks.1.hook_attn_in", "call model.set_use_attn_in(True)"),
        ("blocks.1.hook_q_input", "call model.set_use_split_qkv_input(True)"),
        ("blocks.1.attn.hook_result", "call model.set_use_attn_result(True)"),
    ],
)
def test_unknown_and_sleeping_names_raise_before_any_forward(
    bridge: Any, ids: Tensor, spelling: str, message: str
) -> None:
    bridge.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(HookNotFoundError) as caught:
        capture(bridge, [spelling], ids)
    assert message in str(caught.value)
    assert isinstance(caught.value, KeyError)


def test_a_sleeping_name_wakes(bridge: Any, ids: Tensor) -> None:
    bridge.set_use_hook_mlp_in(True)
    value = capture(bridge, ["blocks.1.hook_mlp_in", "blocks.1.hook_resid_mid"], ids)
    torch.testing.assert_close(value["blocks.1.hook_mlp_in"], value["blocks.1.hook_resid_mid"])


@pytest.mark.parametrize("name", ["blocks.1.ln2.hook_normalized", "blocks.1.hook_resid_mid"])
def test_places_beside_the_flow_are_read_only(bridge: Any, ids: Tensor, name: str) -> None:
    assert capture(bridge, [name], ids)[name].shape == (2, 8, 32)
    with pytest.raises(ConfigError, match="can be read but not replaced"):
        resolve(bridge, name).on_write(lambda value: value)


def test_a_site_that_never_fires_and_a_model_that_fails_leave_no_hook(
    bridge: Any, llama: nn.Module, ids: Tensor
) -> None:
    bridge(ids)
    before = hooks_of(bridge)
    with pytest.raises(SiteDidNotFireError, match=r"never reached 'model\.layers:out'"):
        capture(bridge, ["blocks.1.hook_resid_pre", "model.layers:out"], ids)
    with pytest.raises(IndexError):
        capture(llama, ["model.layers.1"], ids + 1000)
    assert hooks_of(bridge) == before
    assert hooks_of(llama) == 0
    with pytest.raises(ConfigError, match="output_hidden_states"):
        capture(llama, ["model.layers.1"], ids, output_hidden_states=True)
    with pytest.raises(ConfigError, match="at least one site"):
        capture(llama, [], ids)


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


def test_width_and_context(bridge: Any, llama: nn.Module) -> None:
    assert site_width(bridge, "blocks.1.hook_resid_pre") == 32
    assert site_width(bridge, "blocks.1.mlp.hook_post") == 48
    assert site_width(llama, "model.layers.1.mlp.down_proj:in") == 48
    assert max_context(bridge) == max_context(llama) == 16
    assert max_context(nn.Linear(1, 1)) is None


def test_load_model_from_a_folder(llama_folder: Path, llama: nn.Module, tokenizer: Any, ids: Tensor) -> None:
    model, own = load_model(ModelConfig(name=str(llama_folder), device="cpu"))
    assert own("w1 w5", add_special_tokens=False)["input_ids"] == [4, 8]
    assert own.bos_token_id == tokenizer.bos_token_id
    assert not model.training
    torch.testing.assert_close(logits(model, ids), logits(llama, ids), atol=1e-4, rtol=1e-4)
    half, _ = load_model(ModelConfig(name=str(llama_folder), device="cpu", dtype="bfloat16"))
    assert capture(half, ["blocks.1.hook_resid_pre"], ids)["blocks.1.hook_resid_pre"].dtype == torch.bfloat16


def test_load_model_takes_another_tokenizer(llama_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(llama_folder, bos_token="<eos>")
    other.save_pretrained(tmp_path)
    _, own = load_model(ModelConfig(name=str(llama_folder), tokenizer=str(tmp_path), device="cpu"))
    assert own.bos_token_id == 1


def test_load_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: expected"):
        load_model(ModelConfig())
    with pytest.raises(ConfigError, match="cannot read model"):
        load_model(ModelConfig(name=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "xpu:7"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.device: expected auto or one of cpu.*, found '{device}'"):
        load_model(ModelConfig(name=str(tmp_path), device=device))


def test_a_truncated_model_is_refused(llama_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama_folder, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"cannot read model .*model' or its tokenizer: \S"):
        load_model(ModelConfig(name=str(folder), device="cpu"))
