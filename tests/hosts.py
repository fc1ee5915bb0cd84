"""Small random hosts: ten families as plain models, as bridges and as HookedTransformers, and a model by hand."""

import functools
import importlib
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest
import torch
from helpers import D_IN, D_SAE, make_sae
from torch import Tensor, nn

from sae_kit import StandardSAEConfig
from sae_kit.metadata import SAEMetadata
from sae_kit.sae import SAE

VOCABULARY, LAYERS, HEADS = 61, 3, 4


FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3", "olmo2")
BLOCKS = dict.fromkeys(FAMILIES, "model.layers") | {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}
"""Where a plain model has its blocks."""


def plain(family: str) -> Any:
    """A random Hugging Face model of width D_IN, in eval mode; `family` is its `model_type`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    shape |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_size": D_IN}
    shape |= {"max_position_embeddings": 32}
    if family != "gpt2":
        shape["intermediate_size"] = 48
    if family not in ("gpt2", "gpt_neox"):
        shape["num_key_value_heads"] = HEADS if family in ("llama", "phi3") else 2
    if family.startswith(("gemma", "qwen3", "mistral")):
        shape["head_dim"] = D_IN // HEADS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), attn_implementation="eager")
        with torch.no_grad():  # gains of 1 and biases of 0 would hide on which side of them a value is
            for parameter in (p for p in model.parameters() if p.ndim == 1):
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def bridge(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The same as a TransformerBridge."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = plain(family).to(dtype)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)


HAS_HOOKED = version("transformer-lens").startswith("3.")
"""TransformerLens 4 has no HookedTransformer."""

HOOKED = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi3") if HAS_HOOKED else ()
"""Families that TransformerLens converts to a HookedTransformer from a config; the others it knows by name alone."""

on_hooked = pytest.mark.parametrize(
    "family", HOOKED or [pytest.param("", marks=pytest.mark.skip(reason="TransformerLens 4 has no HookedTransformer"))]
)


def hooked(family: str) -> Any:
    """The same as a HookedTransformer with raw weights."""
    HookedTransformer = importlib.import_module("transformer_lens").HookedTransformer
    loading = importlib.import_module("transformer_lens.loading_from_pretrained")
    model = plain(family)
    model.config.n_ctx = model.config.max_position_embeddings  # of gpt2; today's configs leave it out
    with tempfile.TemporaryDirectory(prefix="host") as folder:
        model.save_pretrained(folder)
        config = loading.get_pretrained_model_config(folder, hf_cfg=model.config.to_dict(), device="cpu")
        weights = loading.get_pretrained_state_dict(folder, config, model)
    config.tokenizer_name = None
    host = HookedTransformer(config, move_to_device=False)
    raw = {"fold_ln": False, "center_writing_weights": False, "center_unembed": False, "fold_value_biases": False}
    host.load_and_process_state_dict(weights, **raw)
    return host.eval()


def folded(family: str) -> Any:
    """The same as a bridge with processed weights."""
    host = bridge(family)
    host.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=True, center_unembed=True, fold_value_biases=True
    )
    return host


def native(_: str) -> Any:
    """A bridge around a random model of TransformerLens's own, which has the places of a gpt2."""
    from transformer_lens.config import TransformerBridgeConfig

    boot = importlib.import_module("transformer_lens.model_bridge").TransformerBridge.boot_native
    shape: dict[str, Any] = {
        "d_model": D_IN,
        "d_head": D_IN // HEADS,
        "n_heads": HEADS,
        "n_layers": LAYERS,
        "d_mlp": 48,
    }
    cfg = TransformerBridgeConfig(
        **shape, n_ctx=32, d_vocab=VOCABULARY, act_fn="gelu", architecture="TransformerLensNative", seed=0
    )
    with torch.random.fork_rng():
        return boot(cfg).eval()


MAKERS: dict[str, Callable[[str], Any]] = {
    "plain": plain,
    "bridge": bridge,
    "hooked": hooked,
    "folded": folded,
    "native": native,
}


@functools.cache
def shared(kind: str, family: str) -> Any:
    """A host that tests only read, or leave as it was; `kind` is a name in MAKERS."""
    return MAKERS[kind](family).requires_grad_(False)


def kinds(family: str) -> list[str]:
    """The hosts that there are of a family."""
    return ["plain", "bridge", *(["hooked"] if family in HOOKED else [])]


def log_probabilities(host: nn.Module, tokens: Tensor) -> Tensor:
    """[rows, context, vocabulary], of any host."""
    out = host(tokens)
    return (out if isinstance(out, Tensor) else out.logits).log_softmax(-1)


def ids(rows: int = 2, context: int = 8, seed: int = 1) -> Tensor:
    """Token ids [rows, context], each row with a 0 in front."""
    drawn = torch.randint(2, VOCABULARY, (rows, context), generator=torch.Generator().manual_seed(seed))
    drawn[:, 0] = 0
    return drawn


class Toy(nn.Module):
    """Each position for itself: embedding, one layer, logits. What stands at one position cannot reach another."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, D_IN)
            self.layer = nn.Linear(D_IN, D_IN)
            self.head = nn.Linear(D_IN, VOCABULARY)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(ids)
        return self.head(torch.tanh(self.layer(x)) + x)


def identity_sae(hook_name: str | None = None, **fields: Any) -> SAE:
    """relu(x) − relu(−x): an SAE that reproduces its input exactly."""
    cfg = StandardSAEConfig(d_in=D_IN, d_sae=2 * D_IN, metadata=SAEMetadata(hook_name=hook_name), **fields)
    sae = cfg.build()
    with torch.no_grad():
        eye = torch.eye(D_IN, dtype=sae.dtype)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def zero_sae(hook_name: str | None = None) -> SAE:
    """An SAE whose output is zero."""
    sae = StandardSAEConfig(d_in=D_IN, d_sae=D_SAE, metadata=SAEMetadata(hook_name=hook_name)).build()
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


def sae_at(site: str | None, name: str = "topk", **fields: Any) -> SAE:
    """A random SAE whose metadata names `site`."""
    return make_sae(name, metadata=SAEMetadata(hook_name=site), **fields)


def differ(one: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ by more than rounding."""
    return float((one - other).detach().abs().max()) > 1e-3


def fail(*_: Any, **__: Any) -> None:
    """A hook that breaks the forward."""
    raise RuntimeError("on purpose")
