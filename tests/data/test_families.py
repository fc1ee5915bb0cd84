"""A TransformerLens name means one value, and one edit, in plain models and in hosts of TransformerLens."""

import itertools

import pytest
import torch
from hosts import FAMILIES, LAYERS, ids, kinds, log_probabilities, on_hooked, shared
from torch import Tensor, nn

from sae_kit.data import families
from sae_kit.data.capture import capture
from sae_kit.data.sites import resolve
from sae_kit.errors import ConfigError, HookNotFoundError

NAMES = [
    (family, name)
    for family in FAMILIES
    for name in ("hook_embed", *(f"blocks.1.{name}" for name in families.FAMILIES[family].places))
]
every_name = pytest.mark.parametrize(("family", "name"), NAMES)


def is_writable(name: str) -> bool:
    return name.removeprefix("blocks.1.") not in families.READ_ONLY


def edited(host: nn.Module, spelling: str, edit: str) -> Tensor:
    """Log-probabilities with an edit at a site, which has to show, and to be gone afterwards."""
    clean = log_probabilities(host, ids())
    fn = torch.zeros_like if edit == "zero" else lambda value: 0.5 * value + 0.1
    handle = resolve(host, spelling).on_write(fn)
    found = log_probabilities(host, ids())
    handle.remove()
    assert (found - clean).abs().max() > 1e-3
    assert torch.equal(log_probabilities(host, ids()), clean)
    return found


def test_the_table_has_the_families_that_are_tested() -> None:
    assert tuple(families.FAMILIES) == FAMILIES


@every_name
def test_one_value_on_every_host_and_under_both_names(family: str, name: str) -> None:
    model = shared("plain", family)
    expected = capture(model, [name], ids())[name]
    assert expected.ndim == 3
    path = resolve(model, name).hf_name
    assert (path is None) == (name.removeprefix("blocks.1.") in families.DERIVED)
    for kind, spelling in itertools.product(kinds(family), (name, path) if path else (name,)):
        host = shared(kind, family)
        found = capture(host, [spelling], ids())[spelling]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert resolve(host, spelling).hf_name == path


@every_name
def test_one_effect_of_an_edit_on_every_host_and_under_both_names(family: str, name: str) -> None:
    model = shared("plain", family)
    if not is_writable(name):
        for kind in ("plain", "bridge"):
            site = resolve(shared(kind, family), name)
            with pytest.raises(ConfigError, match=r"can be read but not replaced"):
                site.on_write(torch.zeros_like)
        return
    path = str(resolve(model, name).hf_name)
    for edit in ("half", "zero"):
        expected = edited(model, name, edit)
        for kind, spelling in itertools.product(kinds(family), (name, path)):
            torch.testing.assert_close(edited(shared(kind, family), spelling, edit), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("gpt_neox", ["hook_resid_mid"]),
        ("phi3", ["mlp.hook_pre"]),
        ("olmo2", ["ln2.hook_out", "ln1.hook_normalized", "ln2.hook_normalized"]),
    ],
)
def test_names_without_a_place_are_refused(family: str, missing: list[str]) -> None:
    for name in missing:
        with pytest.raises(HookNotFoundError, match=rf"'blocks\.1\.{name}' is not in this model\. Did you mean"):
            resolve(shared("plain", family), f"blocks.1.{name}")
        if name.endswith("normalized"):
            with pytest.raises(HookNotFoundError, match=r"is not in this model|is another value in this model"):
                resolve(shared("bridge", family), f"blocks.1.{name}")


def test_a_norm_is_recomputed_in_float32_whatever_the_model_is_in() -> None:
    x = (10 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    for norm in (nn.LayerNorm(64), nn.RMSNorm(64, eps=1e-6)):
        found = families.normalized(norm, x)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, families.normalized(norm, x.float()).bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_of_attention_and_mlp_are_what_is_added_to_the_stream(family: str) -> None:
    names = ["hook_resid_pre", "hook_attn_out", "hook_mlp_out", "hook_resid_post"]
    before, attention, mlp, after = capture(shared("plain", family), [f"blocks.1.{n}" for n in names], ids()).values()
    torch.testing.assert_close(before + attention + mlp, after)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_place_knows_all_its_names(family: str) -> None:
    layout = families.layout_of(shared("plain", family))
    assert layout is not None
    assert len(list(layout.all_names())) == 1 + LAYERS * len(layout.family.places)
    for name in layout.all_names():
        place = layout.place(name)
        assert place is not None
        inside = name.split(".", 2)[-1]
        assert inside in families.DERIVED or name in layout.names(place)
    assert layout.names(families.Place("lm_head", "out")) == []
    assert layout.place("blocks.1.hook_nothing") is None


def test_a_class_of_models_says_its_kind() -> None:
    assert len(families.layouts_of_architecture(None)) == len(FAMILIES)
    assert families.layouts_of_architecture("Qwen2MoeForCausalLM") == []
    for architecture in ("Gemma3ForCausalLM", "GPTNeoXForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"):
        (layout,) = families.layouts_of_architecture(architecture)
        assert layout.model_type.replace("_", "").removesuffix("text") == architecture.lower().partition("for")[
            0
        ].removesuffix("lmheadmodel")


@on_hooked
def test_a_hooked_transformer_has_names_for_what_it_has_no_hook_points_for(family: str) -> None:
    host = shared("hooked", family)
    assert "blocks.1.mlp.hook_in" not in host.hook_dict
    for module, name in (("blocks.1.mlp:in", "blocks.1.mlp.hook_in"), ("blocks.1.ln2:out", "blocks.1.ln2.hook_out")):
        values = capture(host, [module, name], ids())
        assert torch.equal(values[module], values[name])
        assert {module, name} <= set(resolve(host, module).names)
        torch.testing.assert_close(
            capture(shared("plain", family), [module], ids())[module], values[module], atol=1e-4, rtol=1e-4
        )
