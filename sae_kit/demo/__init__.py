"""The embedded default: a small language model trained on the Python standard library, and that text.

Nothing is downloaded: the model ships with the package, the text comes with the interpreter.
"""

from pathlib import Path
from typing import Any

from sae_kit.demo.corpus import Corpus, corpus

MODEL_FOLDER = Path(__file__).parent / "model"
"""The model and its tokenizer in Hugging Face format."""

__all__ = ["MODEL_FOLDER", "Corpus", "corpus", "load_model", "load_tokenizer"]


def load_model(device: str = "auto") -> Any:
    """The demo's language model as a TransformerBridge, in eval mode: 4 layers, d_model 128, context 256."""
    from sae_kit.data.models import ModelConfig
    from sae_kit.data.models import load_model as load

    return load(ModelConfig(name="demo", host="bridge", device=device))[0]


def load_tokenizer() -> Any:
    """The demo's byte-level BPE tokenizer of 2,048 tokens."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_FOLDER)
