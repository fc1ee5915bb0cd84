"""A tokenizer of words and a tiny random Llama, as an object and as a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

WORDS, WIDTH, CONTEXT = 61, 32, 16
BOS, EOS = 0, 1
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message.content }} {{ eos_token }} {% endfor %}"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Each word `w0` ... `w60` is one id: 3 + its number; ids 0-2 are BOS, EOS and PAD."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {name: i for i, name in enumerate(["<bos>", "<eos>", "<pad>", *(f"w{n}" for n in range(WORDS))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=CONTEXT
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def random_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS + 3,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        architectures=["LlamaForCausalLM"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager")  # as in a bridge
    return model


@pytest.fixture(scope="session")
def llama() -> nn.Module:
    return random_llama()


@pytest.fixture
def bridge() -> Any:
    """Function-scoped: tests switch hooks on and count what runs."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = random_llama()
    return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config, tokenizer=None)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory, llama: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, WORDS + 3, (2, 8), generator=torch.Generator().manual_seed(1))
