"""What latents respond to, in the terminal: their strongest contexts, coloured by activation."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from torch import Tensor, nn

from sae_kit.data.capture import capture
from sae_kit.ops import SparseCodes
from sae_kit.sae import SAE

ROWS_PER_FORWARD = 64
BEFORE, AFTER = 12, 5  # tokens shown around the strongest one
CONTEXTS = 4  # of each latent, from different rows
RAREST, MOST_FREQUENT = 3e-4, 1e-2  # share of tokens: a rarer latent proves nothing, a more frequent one is a mixture
WARM = "#f5b942"


class Context(NamedTuple):
    """A stretch of text around a strong activation of one latent."""

    ids: Int[Tensor, " tokens"]
    acts: Float[Tensor, " tokens"]


@dataclass(frozen=True)
class Latent:
    """One latent with its strongest contexts."""

    index: int
    density: float
    """share of the counted tokens on which it is on"""
    maximum: float
    contexts: list[Context]


class Activations(NamedTuple):
    """Codes of every token of some rows, row after row; those of tokens that do not count are off."""

    rows: Int[Tensor, "rows context"]
    counted: Bool[Tensor, "rows context"]
    codes: SparseCodes


@torch.no_grad()
def activations(sae: SAE, model: nn.Module, rows: Int[Tensor, "rows context"]) -> Activations:
    """Sparse codes of all tokens; ids that were excluded from training, such as BOS, do not count."""
    hook = sae.cfg.metadata.hook_name
    assert hook is not None
    excluded = sae.cfg.metadata.exclude_special_tokens
    ids = torch.tensor(excluded if isinstance(excluded, list) else [], dtype=rows.dtype)
    counted = torch.isin(rows, ids, invert=True)
    parts = [sae.encode_sparse(capture(model, [hook], part)[hook]) for part in rows.split(ROWS_PER_FORWARD)]
    values = torch.cat([part.values for part in parts]).cpu()
    indices = torch.cat([part.indices for part in parts]).cpu()
    values = values.where(counted.reshape(-1, 1), 0)
    return Activations(rows, counted, SparseCodes(values, indices, sae.d_sae, tuple(rows.shape)))


def choose_latents(found: Activations, number: int) -> list[int]:
    """Latents to show: of middling frequency, the strongest first, no two with their maximum on the same token."""
    codes = found.codes
    density = codes.firing_counts() / found.counted.sum()
    strongest = torch.zeros(codes.d_sae).scatter_reduce(0, codes.indices.flatten(), codes.values.flatten(), "amax")
    fits = (density >= RAREST) & (density <= MOST_FREQUENT)
    chosen: list[int] = []
    taken: set[int] = set()
    for index in torch.where(fits, strongest, -1.0).argsort(descending=True, stable=True).tolist():
        if len(chosen) == number or not fits[index]:
            break
        peak, _ = next(_peaks(found, index))
        token = int(found.rows[peak])
        if token not in taken:
            taken.add(token)
            chosen.append(index)
    return chosen


def describe(found: Activations, index: int) -> Latent:
    """A latent's density and its strongest contexts, from different rows and of different text."""
    contexts: list[Context] = []
    rows, texts = set[int](), set[tuple[int, ...]]()
    maximum = 0.0
    for (row, position), value in _peaks(found, index):
        maximum = max(maximum, value)
        context = _context(found, index, row, position)
        text = tuple(context.ids.tolist())
        if row not in rows and text not in texts:  # source code repeats itself
            rows.add(row)
            texts.add(text)
            contexts.append(context)
        if len(contexts) == CONTEXTS:
            break
    density = found.codes.firing_counts()[index] / found.counted.sum()
    return Latent(index, density.item(), maximum, contexts)


def _peaks(found: Activations, index: int) -> Iterator[tuple[tuple[int, int], float]]:
    """Where a latent is on, strongest first: (row, position), value."""
    codes = found.codes
    place, entry = ((codes.indices == index) & (codes.values > 0)).nonzero(as_tuple=True)
    values = codes.values[place, entry]
    for at in values.argsort(descending=True, stable=True).tolist():
        yield divmod(int(place[at]), found.rows.shape[1]), values[at].item()


def _context(found: Activations, index: int, row: int, position: int) -> Context:
    width = found.rows.shape[1]
    start, stop = max(position - BEFORE, 0), min(position + AFTER + 1, width)
    places = slice(row * width + start, row * width + stop)
    on = (found.codes.indices[places] == index) * found.codes.values[places]
    return Context(found.rows[row, start:stop], on.sum(dim=1))


def render(latents: list[Latent], tokenizer: Any, *, colour: bool = True) -> RenderableType:
    """Each latent as a heading and a line per context, the background as warm as the activation is strong.

    Without colour, tokens with more than half the latent's maximum stand in «guillemets».
    """
    parts: list[RenderableType] = []
    for latent in latents:
        parts.append(Text(f"latent {latent.index}   on {latent.density:.2%} of tokens", style="bold"))
        lines = (_line(context, latent.maximum, tokenizer, colour) for context in latent.contexts)
        parts += [Padding(line, (0, 0, 0, 2), expand=False) for line in lines]
    return Group(*parts)


def _line(context: Context, maximum: float, tokenizer: Any, colour: bool) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for token, act in zip(context.ids.tolist(), context.acts.tolist(), strict=True):
        text = re.sub(" {3,}", "  ", tokenizer.decode([token]).replace("\n", "⏎").replace("\t", "⇥"))
        if not colour and act > maximum / 2:
            text = f"«{text}»"
        line.append(text, style=_warmth(act / maximum) if act > 0 else "dim")
    return line


def _warmth(share: float) -> str:
    """Black on a background between the terminal's dark and full amber."""
    red, green, blue = (round(40 + (int(WARM[i : i + 2], 16) - 40) * share) for i in (1, 3, 5))
    return f"{'black' if share > 0.4 else 'white'} on #{red:02x}{green:02x}{blue:02x}"
