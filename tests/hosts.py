"""Small random hosts for tests that splice: two families as plain models and as bridges, and a model by hand."""

from typing import Any

import torch
from helpers import D_IN, D_SAE, make_sae
from torch import Tensor, nn

from sae_kit import StandardSAEConfig
from sae_kit.metadata import SAEMetadata
from sae_kit.sae import SAE

VOCABULARY, LAYERS = 61, 3


def plain(family: str) -> Any:
    """A random Hugging Face model of width D_IN, in eval mode."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "gpt2":
            return GPT2LMHeadModel(GPT2Config(n_embd=D_IN, n_layer=LAYERS, n_head=4, n_positions=32, **shape)).eval()
        config = LlamaConfig(
            hidden_size=D_IN,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
            **shape,
        )
        return LlamaForCausalLM(config).eval()


def bridge(family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    """The same as a TransformerBridge."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = plain(family).to(dtype)
    return build_bridge_from_module(model, type(model).__name__, hf_config=model.config, tokenizer=None)


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
