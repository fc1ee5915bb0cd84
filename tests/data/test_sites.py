"""Names are understood on every host before any forward, and those that cannot work are refused with what to do."""

from typing import Any

import pytest
import torch
from hosts import HAS_HOOKED, HEADS, Toy, bridge, hooked, ids, kinds, log_probabilities, on_hooked, plain, shared
from torch import Tensor, nn

from sae_kit.data.capture import capture, max_context
from sae_kit.data.sites import BoundSite, resolve, unwrapped
from sae_kit.errors import ConfigError, HookNotFoundError

Z, PATH_OF_Z = (
    "blocks.1.attn.hook_z",
    {"gpt2": "transformer.h.1.attn.c_proj", "llama": "model.layers.1.self_attn.o_proj"},
)
HOSTS = [(family, kind) for family in ("gpt2", "llama") for kind in kinds(family)]
every_host = pytest.mark.parametrize(("family", "kind"), HOSTS)


def must_not_run(*_: Any) -> None:
    pytest.fail("the model ran")


# ---- spellings -------------------------------------------------------------------------------------------------------


@every_host
def test_every_spelling_of_a_site_is_known(family: str, kind: str) -> None:
    host, stack = shared(kind, family), {"gpt2": "transformer.h", "llama": "model.layers"}[family]
    name, path = "blocks.1.hook_resid_post", f"{stack}.1"
    spellings = [name, path, f"{path}:out", (path, "out")]
    for spelling in spellings:
        site = resolve(host, spelling)
        assert {name, path} <= set(site.names)
        assert site.hf_name == path
        assert site.spelling == (spelling if isinstance(spelling, str) else f"{path}:out")
    canonical = {"plain": path, "bridge": "blocks.1.hook_out", "hooked": name}[kind]
    assert resolve(host, name).names[0] == canonical


def test_a_bridge_has_hook_points_and_the_modules_of_the_model_inside() -> None:
    assert resolve(shared("bridge", "llama"), "model.layers.1").site == ("model.layers.1", "out")
    assert resolve(shared("bridge", "llama"), "blocks.1.hook_out").site == ("blocks.1.hook_out", "hook")


@on_hooked
def test_paths_in_a_hooked_transformer_are_its_own_or_those_of_the_plain_model(family: str) -> None:
    host = shared("hooked", family)
    assert resolve(host, "blocks.1.attn:out").site == ("blocks.1.attn", "out")
    path = resolve(shared("plain", family), "blocks.1.hook_resid_post").hf_name
    assert resolve(host, str(path)).site == ("blocks.1.hook_resid_post", "hook")


@pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
def test_a_path_with_two_meanings_is_refused_where_the_kind_of_model_is_unknown() -> None:
    host = hooked("llama")
    host.cfg.original_architecture = None
    norm = "model.layers.1.post_attention_layernorm"
    with pytest.raises(HookNotFoundError, match=r"is blocks\.1\.hook_attn_out or blocks\.1\.ln2\.hook_out, depending"):
        resolve(host, norm)
    assert resolve(host, "model.layers.1:in").names[0] == "blocks.1.hook_resid_pre"
    assert resolve(host, "model.layers.1:in").hf_name is None


# ---- refusals --------------------------------------------------------------------------------------------------------


@every_host
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "blocks.1.hook_resid_prey",
            "hook 'blocks.1.hook_resid_prey' is not in this model. Did you mean 'blocks.1.hook_resid_pre'?",
        ),
        ("blocks.9.hook_resid_pre", "hook 'blocks.9.hook_resid_pre' is not in this model. Did you mean 'blocks."),
        ("{mlp}p", "hook '{mlp}p' is not in this model. Did you mean '{mlp}'?"),
        ("{mlp}:inn", "hook '{mlp}:inn' is not in this model."),
        ("", "hook '' is not in this model."),
        ("blocks.1.hook_mlp_in", "set_use_hook_mlp_in(True)"),
        ("blocks.1.hook_attn_in", "set_use_attn_in(True)"),
        ("blocks.1.hook_q_input", "set_use_split_qkv_input(True)"),
        ("blocks.1.attn.hook_result", "set_use_attn_result(True)"),
    ],
)
def test_unknown_and_sleeping_names_raise_before_any_forward(family: str, kind: str, name: str, message: str) -> None:
    host = shared(kind, family)
    mlp = {"gpt2": "transformer.h.1.mlp", "llama": "model.layers.1.mlp"}[family] if kind != "hooked" else "blocks.1.mlp"
    handle = host.register_forward_pre_hook(must_not_run)
    with pytest.raises(HookNotFoundError) as caught:
        capture(host, [name.format(mlp=mlp)], ids())
    handle.remove()
    assert message.format(mlp=mlp) in str(caught.value)
    assert isinstance(caught.value, KeyError)


@every_host
def test_places_beside_the_flow_are_read_only(family: str, kind: str) -> None:
    names = ["blocks.1.ln2.hook_normalized", *(["blocks.1.hook_resid_mid"] if kind != "hooked" else [])]
    for name in names:
        site = resolve(shared(kind, family), name)
        assert not site.writable
        with pytest.raises(ConfigError, match="can be read but not replaced"):
            site.on_write(lambda value: value)


def test_the_input_of_the_norm_can_be_written_by_its_own_name() -> None:
    """An edit there reaches the MLP alone, which is what the name of the module says, and `hook_resid_mid` does not."""
    for kind in ("plain", "bridge"):
        assert resolve(shared(kind, "llama"), "model.layers.1.post_attention_layernorm:in").writable
    assert resolve(shared("bridge", "olmo2"), "blocks.1.mlp.hook_in").writable
    assert not resolve(shared("bridge", "olmo2"), "blocks.1.hook_resid_mid").writable


def test_a_sleeping_name_wakes() -> None:
    for family, kind in HOSTS:
        if kind == "plain":
            continue
        host = {"bridge": bridge, "hooked": hooked}[kind](family)
        host.set_use_hook_mlp_in(True)
        before, middle = capture(host, ["blocks.1.hook_mlp_in", "blocks.1.hook_resid_mid"], ids()).values()
        torch.testing.assert_close(before, middle)


# ---- heads -----------------------------------------------------------------------------------------------------------


@every_host
@pytest.mark.parametrize("spelt", ["name", "path"])
def test_one_head_is_a_slice_of_all(family: str, kind: str, spelt: str) -> None:
    host = shared(kind, family)
    name = Z if spelt == "name" else f"{PATH_OF_Z[family]}:in"
    everything = capture(host, [name], ids())[name]
    per_head = everything.unflatten(-1, (HEADS, -1))
    sites = [resolve(host, name, head=head) for head in range(HEADS)]
    values = capture(host, [*sites, f"{name}[2]"], ids())
    assert list(values) == [f"{name}[{head}]" for head in range(HEADS)]
    for head in range(HEADS):
        assert torch.equal(values[f"{name}[{head}]"], per_head[..., head, :])
    assert f"{Z}[2]" in sites[2].names
    assert sites[2].hf_name == f"{PATH_OF_Z[family]}:in[2]"


@every_host
def test_writing_one_head_leaves_the_others(family: str, kind: str) -> None:
    host = shared(kind, family)
    site = resolve(host, f"{Z}[1]")
    clean = log_probabilities(host, ids())
    before = capture(host, [Z], ids())[Z].unflatten(-1, (HEADS, -1))
    handle = site.on_write(lambda value: value + 1)
    reading = capture(host, [Z], ids())[Z].unflatten(-1, (HEADS, -1))
    spliced = log_probabilities(host, ids())
    handle.remove()
    assert torch.equal(reading[..., 1, :], before[..., 1, :] + 1)
    others = [0, 2, 3]
    assert torch.equal(reading[..., others, :], before[..., others, :])
    assert (spliced - clean).abs().max() > 1e-3
    torch.testing.assert_close(log_probabilities(host, ids()), clean, atol=0, rtol=0)


def test_keys_and_values_have_heads_of_their_own_number() -> None:
    for kind in kinds("qwen2")[1:]:
        host = shared(kind, "qwen2")
        assert capture(host, ["blocks.1.attn.hook_k[1]"], ids())["blocks.1.attn.hook_k[1]"].shape == (2, 8, 8)
        with pytest.raises(ConfigError, match=r"'blocks\.1\.attn\.hook_k' has heads 0 to 1, found 2"):
            resolve(host, "blocks.1.attn.hook_k", head=2)


@every_host
def test_heads_that_are_not_there_are_refused(family: str, kind: str) -> None:
    with pytest.raises(ConfigError, match=r"has heads 0 to 3, found 4"):
        resolve(shared(kind, family), f"{Z}[4]")
    with pytest.raises(ConfigError, match=r"'blocks\.1\.hook_resid_pre' has no attention heads"):
        resolve(shared(kind, family), "blocks.1.hook_resid_pre[0]")
    assert resolve(shared(kind, family), f"{Z}[2]", head=2).head == 2
    with pytest.raises(ConfigError, match=r"hook_z\[2\]' names another head than head=1"):
        resolve(shared(kind, family), f"{Z}[2]", head=1)


def test_head_shaped_values_are_flat_to_the_function_and_keep_their_shape_in_the_model() -> None:
    for family, kind in HOSTS:
        host, seen = shared(kind, family), list[Tensor]()
        clean = log_probabilities(host, ids())
        site = resolve(host, Z)
        assert site.layout == "heads"
        handle = site.on_write(lambda value, seen=seen: seen.append(value) or value.clone())
        torch.testing.assert_close(log_probabilities(host, ids()), clean, atol=0, rtol=0)
        handle.remove()
        assert seen[0].shape == (2, 8, 32)


# ---- models in other models ------------------------------------------------------------------------------------------


class DataParallel(nn.Module):
    """As torch's wrappers are: one child, called `module`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Adapter(nn.Module):
    """As adapters are: the model two levels down."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model["model"](*args, **kwargs)


@pytest.mark.parametrize("kind", ["plain", "bridge"])
def test_wrappers_are_looked_through(kind: str) -> None:
    host = shared(kind, "llama")
    names = ["blocks.1.hook_resid_post", "model.layers.0.mlp:in"]
    expected = capture(host, names, ids())
    compiled: Any = torch.compile(host, backend="eager")
    prefixes = {DataParallel(host): "module.", Adapter(host): "base_model.model.", compiled: "_orig_mod."}
    for wrapper, prefix in prefixes.items():
        assert unwrapped(DataParallel(wrapper)) is host
        assert max_context(wrapper) == max_context(host)
        for name in names:
            assert resolve(wrapper, name).module is resolve(host, name).module
        if kind == "plain":
            assert resolve(wrapper, f"{prefix}model.layers.0.mlp:in").module is resolve(host, names[1]).module
        found = capture(wrapper, names, ids())
        assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_language_model_within_a_multimodal_one_has_the_same_names() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    language = plain("gemma3_text")
    image = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    cfg = Gemma3Config(
        text_config=language.config.to_dict(), vision_config={**image, "num_hidden_layers": len(language.model.layers)}
    )
    model: Any = Gemma3ForConditionalGeneration(cfg).eval()
    model.model.language_model.load_state_dict(language.model.state_dict())
    names = ["hook_embed", "blocks.1.hook_mlp_out", Z, "blocks.1.ln2.hook_normalized", f"{Z}[1]"]
    expected, found = capture(language, names, ids()), capture(model, names, ids())
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    assert resolve(model, "blocks.1.hook_resid_pre").hf_name == "model.language_model.layers.1:in"
    assert max_context(model) == 32


def test_two_lists_of_blocks_are_an_error_that_names_them() -> None:
    model = plain("llama")
    model.other = plain("llama").model
    with pytest.raises(HookNotFoundError, match=r"those of model\.layers or of other\.layers; use a module path"):
        resolve(model, "blocks.1.hook_resid_pre")
    assert resolve(model, "model.layers.1").names == ("model.layers.1", "model.layers.1:out")


def test_other_kinds_of_models_have_the_names_that_need_no_table() -> None:
    from transformers import OPTConfig, OPTForCausalLM

    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    model = OPTForCausalLM(
        OPTConfig(**shape, num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32)
    ).eval()
    names = {
        "blocks.1.hook_resid_pre": "model.decoder.layers.1:in",
        "blocks.1.hook_resid_post": "model.decoder.layers.1",
    }
    values = capture(model, [*names, *names.values(), "model.decoder.layers.0"], ids())
    for name, path in names.items():
        assert torch.equal(values[name], values[path])
    assert torch.equal(values["blocks.1.hook_resid_pre"], values["model.decoder.layers.0"])
    with pytest.raises(HookNotFoundError, match="of this kind of model are not known: use a module path"):
        resolve(model, "blocks.1.hook_mlp_out")


def test_a_module_of_any_kind_has_its_paths_alone() -> None:
    model = Toy()
    site = resolve(model, "layer:in")
    assert (site.names, site.hf_name) == (("layer:in",), "layer:in")
    with pytest.raises(HookNotFoundError, match="of this kind of model are not known: use a module path"):
        resolve(model, "blocks.0.hook_resid_pre")
    assert isinstance(site, BoundSite)
