"""Models come from their name as the host that their sites need, with a tokenizer of their own."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hosts import HAS_HOOKED, log_probabilities
from torch import Tensor, nn

from sae_kit import config as trees
from sae_kit.data.capture import capture
from sae_kit.data.models import Compatibility, ModelConfig, load_model, model_path
from sae_kit.data.sites import resolve
from sae_kit.errors import ConfigError, HookNotFoundError

SITE, NORM = "blocks.1.hook_resid_pre", "blocks.1.ln2.hook_out"
GAIN = torch.linspace(0.5, 2.0, 32)
HOSTS = {"hf": "LlamaForCausalLM", "bridge": "TransformerBridge", "hooked": "HookedTransformer"}
only_hooked = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
ALL_HOSTS = pytest.mark.parametrize("host", ["hf", "bridge", pytest.param("hooked", marks=only_hooked)])


@pytest.fixture(scope="module")
def folder(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in a folder whose name TransformerLens 3 takes for no other model's."""
    folder = tmp_path_factory.mktemp("host") / "tiny"
    shutil.copytree(llama_folder, folder)
    return folder


def loaded(folder: Path, sites: Any = (), **fields: Any) -> tuple[Any, Any]:
    return load_model(ModelConfig(name=str(folder), device="cpu", **fields), sites)


@ALL_HOSTS
def test_every_host_has_the_same_weights_and_an_untouched_tokenizer(
    folder: Path, llama: nn.Module, tokenizer: Any, ids: Tensor, host: Any
) -> None:
    model, own = loaded(folder, host=host)
    assert type(model).__name__ == HOSTS[host]
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(log_probabilities(model, ids), log_probabilities(llama, ids), atol=1e-4, rtol=0)
    assert own("w1 w5", add_special_tokens=False)["input_ids"] == [4, 8]
    assert (own.bos_token, own.pad_token, own.padding_side) == (
        tokenizer.bos_token,
        tokenizer.pad_token,
        tokenizer.padding_side,
    )
    assert own is not getattr(model, "tokenizer", None)


@ALL_HOSTS
def test_every_host_in_another_precision(folder: Path, ids: Tensor, host: Any) -> None:
    model, _ = loaded(folder, host=host, dtype="bfloat16")
    assert capture(model, [SITE], ids)[SITE].dtype == torch.bfloat16


def test_a_transformer_lens_host_reads_text(folder: Path) -> None:
    for host in ("bridge", "hooked") if HAS_HOOKED else ("bridge",):
        model, _ = loaded(folder, host=host)
        assert model.to_tokens("w1 w5").tolist() == [[0, 4, 8]]


def test_auto_is_a_plain_model_if_that_has_every_site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    read: list[Any] = []
    whole = LlamaForCausalLM.from_pretrained.__func__
    monkeypatch.setattr(
        LlamaForCausalLM,
        "from_pretrained",
        classmethod(lambda cls, *args, **kwargs: read.append(args) or whole(cls, *args, **kwargs)),
    )
    canonical = "blocks.1.mlp.gate.hook_out"
    for sites, kind in (
        ((), "LlamaForCausalLM"),
        ((SITE, "model.layers.2", "blocks.0.attn.hook_z[1]"), "LlamaForCausalLM"),
        ((SITE, canonical), "TransformerBridge"),
    ):
        read.clear()
        model, _ = loaded(folder, sites)
        assert type(model).__name__ == kind
        assert len(read) == 1, "weights are read once, whatever the host"
        assert all(resolve(model, site) for site in sites)
    model, _ = loaded(folder, ["blocks.1.hook_nothing"])
    with pytest.raises(HookNotFoundError, match=r"'blocks\.1\.hook_nothing' is not in this model\. Did you mean"):
        resolve(model, "blocks.1.hook_nothing")


def test_a_name_that_no_host_has_is_said_where_there_is_no_bridge(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, BioGptConfig

    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    AutoModelForCausalLM.from_config(BioGptConfig(**shape, intermediate_size=48)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path)
    assert type(loaded(tmp_path, ["biogpt.layers.1"])[0]).__name__ == "BioGptForCausalLM"
    with pytest.raises(
        HookNotFoundError, match=r"'biogpt\.layers\.1\.fcc1' is not in .* mean 'biogpt\.layers\.1\.fc1'"
    ):
        loaded(tmp_path, ["biogpt.layers.1.fcc1"])
    with pytest.raises(ConfigError, match=r"cannot read model .*: Could not determine supported architecture"):
        loaded(tmp_path, host="bridge")


@pytest.fixture(scope="module")
def scaled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with gains other than 1."""
    scaled = tmp_path_factory.mktemp("host") / "scaled"
    model, tokenizer = loaded(folder)
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.copy_(GAIN)
    for part in (model, tokenizer):
        part.save_pretrained(scaled)
    return scaled


@pytest.mark.parametrize("host", ["auto", "bridge", pytest.param("hooked", marks=only_hooked)])
@pytest.mark.parametrize(
    "compat", [None, Compatibility(), Compatibility(center_unembed=True), Compatibility(fold_ln=True)]
)
def test_weights_are_processed_as_asked(scaled: Path, ids: Tensor, host: Any, compat: Compatibility | None) -> None:
    plain, _ = loaded(scaled)
    model, _ = loaded(scaled, host=host, compat=compat)
    assert hasattr(model, "hook_dict") == (host != "auto" or compat is not None)
    expected, found = capture(plain, [SITE, NORM], ids), capture(model, [SITE, NORM], ids)
    gain = GAIN if compat is not None and compat.fold_ln else torch.ones(32)
    torch.testing.assert_close(found[NORM] * gain, expected[NORM], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[SITE], expected[SITE], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_probabilities(model, ids), log_probabilities(plain, ids), atol=1e-4, rtol=0)


def test_arguments_of_from_pretrained_reach_it(folder: Path) -> None:
    model, _ = loaded(folder, attn_implementation="eager", kwargs={"num_hidden_layers": 2})
    assert model.config._attn_implementation == "eager"
    assert len(model.model.layers) == 2
    bridge, _ = loaded(folder, host="bridge")
    assert bridge.original_model.config._attn_implementation == "eager"
    bridge, _ = loaded(folder, host="bridge", attn_implementation="sdpa")
    assert bridge.original_model.config._attn_implementation == "sdpa"
    assert loaded(folder)[0].config._attn_implementation == "sdpa"


def test_whose_code_and_which_revision_are_said_to_whoever_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        cls = getattr(transformers, name)

        def read(*words: Any, real: Any = cls.from_pretrained, **named: Any) -> Any:
            asked.append((named["revision"], named["trust_remote_code"]))
            return real(*words, **{**named, "revision": None, "trust_remote_code": False})

        monkeypatch.setattr(cls, "from_pretrained", read)
    loaded(folder)
    loaded(folder, revision="v2", trust_remote_code=True)
    assert asked == [(None, False)] * 2 + [("v2", True)] * 2


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Compatibility)])
def test_every_way_to_process_weights_is_said_to_the_bridge(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    asked: list[dict[str, bool]] = []
    monkeypatch.setattr(TransformerBridge, "enable_compatibility_mode", lambda bridge, **flags: asked.append(flags))
    loaded(folder, compat=Compatibility(**{name: True}))
    (flags,) = asked
    assert [flag for flag, on in flags.items() if on] == [name]


def test_the_reader_of_a_config_runs_the_model_as_it_says(folder: Path, ids: Tensor) -> None:
    cfg = ModelConfig(name=str(folder), device="cpu", autocast=True, forward_kwargs={"logits_to_keep": 1})
    reader = cfg.reader(load_model(cfg)[0])
    assert reader(ids).logits.shape == (2, 1, 64)
    assert reader.capture(["model.layers.0.mlp"], ids)["model.layers.0.mlp"].dtype == torch.bfloat16


def test_another_tokenizer(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(folder, bos_token="<eos>")
    other.save_pretrained(tmp_path)
    for host in ("hf", "bridge", "hooked") if HAS_HOOKED else ("hf", "bridge"):
        model, own = loaded(folder, tokenizer=str(tmp_path), host=host)
        assert own.bos_token_id == 1
        assert host == "hf" or model.tokenizer.bos_token_id == 1


def test_the_demo_model_is_one_of_them() -> None:
    assert model_path("gpt2") == "gpt2"
    assert (Path(model_path("demo")) / "model.safetensors").exists()
    assert type(load_model(ModelConfig(name="demo", device="cpu"))[0]).__name__ == "LlamaForCausalLM"


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.name: expected"):
        load_model(ModelConfig())
    with pytest.raises(ConfigError, match="cannot read model"):
        loaded(tmp_path)


@pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")
def test_a_host_that_this_transformer_lens_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"TransformerLens 4 has no HookedTransformer: choose \"bridge\""):
        loaded(tmp_path, host="hooked")


@only_hooked
def test_a_model_that_cannot_become_a_hooked_transformer(tmp_path: Path) -> None:
    from hosts import plain

    plain("olmo2").save_pretrained(tmp_path / "tiny")
    with pytest.raises(ConfigError, match=r"cannot (make a HookedTransformer of|read model) "):
        loaded(tmp_path / "tiny", host="hooked")


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
        loaded(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"host": "hf", "compat": {"fold_ln": True}}, "model.compat: weights of a plain Hugging Face model are not"),
        ({"forward_kwargs": {"output_hidden_states": True}}, "model.forward_kwargs: output_hidden_states cannot be"),
        ({"kwargs": {"dtype": "float16"}}, "model.kwargs: dtype cannot be given here, but by the fields beside it"),
        (
            {"host": "hooked", "attn_implementation": "sdpa"},
            "model.attn_implementation: a HookedTransformer has its own",
        ),
        ({"host": "bridges"}, "model.host: expected one of 'auto', 'hf', 'bridge', 'hooked', found 'bridges'"),
        ({"compat": {"fold": True}}, "unknown key 'model.compat.fold'"),
    ],
)
def test_impossible_configs_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trees.structure(ModelConfig, fields, "model")
    assert message in str(caught.value)


def test_a_config_is_plain_data_and_back() -> None:
    cfg = ModelConfig(name="x", host="bridge", compat=Compatibility(fold_ln=True), kwargs={"subfolder": "a"})
    assert trees.structure(ModelConfig, trees.unstructure(cfg)) == cfg
