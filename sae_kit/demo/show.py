"""What latents respond to, in the terminal: their strongest contexts, coloured by activation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sae_kit.data.capture import capture
from sae_kit.sae import SAE

ROWS = 256  # contexts searched
BEFORE, AFTER = 10, 4  # tokens shown around the strongest one
CONTEXTS = 4
LATENTS = 10


class Context(NamedTuple):
    """A stretch of text around a strong activation of one latent."""

    ids: Int[Tensor, " tokens"]
    acts: Float[Tensor, " tokens"]


class Latent(NamedTuple):
    """One latent with its strongest contexts."""

    index: int
    density: float
    """share of tokens on which it is on"""
    contexts: list[Context]


def strongest_contexts(sae: SAE, model: nn.Module, tokenizer: Any, documents: Sequence[str]) -> list[Latent]:
    """Ten latents with their strongest contexts in `documents`, from the rarest to the most frequent."""
    raise NotImplementedError


def table_of_contexts(latents: Sequence[Latent], tokenizer: Any, console: Console) -> Table:
    raise NotImplementedError
