"""Which latents the demo shows, and how: activations written by hand, then those of the demo's own model."""

from collections.abc import Mapping

import pytest
import torch
from rich.color_triplet import ColorTriplet
from rich.console import Console
from rich.segment import Segment
from torch import Tensor

from sae_kit import SAEMetadata, TopKSAEConfig
from sae_kit.data.capture import capture
from sae_kit.demo import load_model
from sae_kit.demo.show import (
    AFTER,
    BEFORE,
    CONTEXTS,
    WARM,
    Activations,
    Context,
    Latent,
    activations,
    choose_latents,
    describe,
    render,
)
from sae_kit.ops import SparseCodes

Peaks = Mapping[tuple[int, int], float]


def by_hand(rows: Tensor, on: list[Peaks], counted: Tensor | None = None) -> Activations:
    """Activations in which latent i is on where `on[i]` says: {(row, position): value}."""
    dense = torch.zeros(*rows.shape, len(on))
    for index, peaks in enumerate(on):
        for place, value in peaks.items():
            dense[(*place, index)] = value
    values, indices = dense.reshape(-1, len(on)).topk(2)  # entries of value 0 fill up where fewer are on
    codes = SparseCodes(values, indices, len(on), tuple(rows.shape))
    return Activations(rows, torch.ones_like(rows, dtype=torch.bool) if counted is None else counted, codes)


def some_latents() -> Activations:
    """4,000 tokens, all different but for two, and latents of each kind; at most one is on at a time."""
    rows = torch.arange(4_000).reshape(40, 100)
    rows[7, 30] = rows[3, 30]
    once = {(0, 0): 9.0}
    often = {(row, position): 8.0 for row in range(5) for position in range(10, 20)}
    strong, copy = {(3, 30): 5.0, (3, 31): 1.0}, {(7, 30): 4.0, (8, 31): 1.0}
    middling = {(row, 40): 3.0 for row in range(20)}
    weak = {(0, 50): 1.0, (1, 50): 2.0}
    return by_hand(rows, [once, often, weak, middling, copy, strong])


def test_latents_are_of_middling_frequency_strongest_first_each_with_a_peak_token_of_its_own() -> None:
    found = some_latents()
    assert found.codes.firing_counts().tolist() == [1, 50, 2, 20, 2, 2]
    assert choose_latents(found, 10) == [5, 3, 2]
    assert choose_latents(found, 2) == [5, 3]


def test_frequency_is_a_share_of_the_tokens_that_count() -> None:
    found = some_latents()
    few = torch.zeros_like(found.counted)
    few[:, :44] = few[:, 50] = True
    assert choose_latents(found._replace(counted=few), 10) == [0, 5, 2], (
        "of 1,800 tokens, 20 are many and 1 is not rare"
    )


def test_contexts_are_of_different_rows_and_different_text() -> None:
    rows = torch.arange(180).reshape(6, 30)
    rows[1] = rows[0]
    counted = torch.ones(6, 30, dtype=torch.bool)
    counted[:, 0] = False
    peaks = {
        (0, 14): 9.0,
        (0, 21): 8.0,
        (1, 14): 7.0,
        (2, 1): 6.0,
        (3, 29): 5.0,
        (3, 27): 1.5,
        (4, 9): 4.0,
        (5, 9): 3.0,
    }
    latent = describe(by_hand(rows, [{}, peaks, {}], counted), 1)
    assert (latent.index, latent.maximum) == (1, 9.0)
    assert latent.density == pytest.approx(8 / 174)
    assert len(latent.contexts) == CONTEXTS == 4
    stretches = [(0, 14 - BEFORE, 15 + AFTER), (2, 0, 2 + AFTER), (3, 29 - BEFORE, 30), (4, 0, 10 + AFTER)]
    for context, (row, start, stop) in zip(latent.contexts, stretches, strict=True):
        assert context.ids.tolist() == rows[row, start:stop].tolist()
        assert context.acts.tolist() == [peaks.get((row, position), 0.0) for position in range(start, stop)]


def test_a_latent_is_on_only_where_its_value_is_positive() -> None:
    rows = torch.arange(60).reshape(6, 10)
    found = by_hand(rows, [{(2, 4): 1.0}, {}])
    assert [context.acts.max() for context in describe(found, 0).contexts] == [1.0]
    assert describe(found, 1) == Latent(index=1, density=0.0, maximum=0.0, contexts=[])


class Words:
    """A tokenizer of four tokens."""

    def decode(self, ids: list[int]) -> str:
        return "".join(["def", "\n", "\tx", "        return"][i] for i in ids)


def segments(latents: list[Latent]) -> list[Segment]:
    return [segment for segment in Console(width=80).render(render(latents, Words())) if segment.text.strip()]


def test_the_background_is_warmest_at_the_peak_and_spaces_are_signs() -> None:
    context = Context(torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 2.0, 0.5, 1.0]))
    heading, *line = segments([Latent(index=7, density=0.0042, maximum=2.0, contexts=[context])])
    assert heading.text == "latent 7   on 0.42% of tokens"
    assert [segment.text for segment in line] == ["def", "⏎", "⇥x", "  return"]
    colours: list[ColorTriplet | None] = []
    for segment in line:
        assert segment.style is not None
        background = segment.style.bgcolor
        colours.append(None if background is None else background.get_truecolor())
    off, peak, faint, half = colours
    assert off is None
    assert peak is not None
    assert faint is not None
    assert half is not None
    assert peak.hex == WARM
    assert faint.red < half.red < peak.red
    assert faint.green < half.green < peak.green


def test_without_colour_the_strong_tokens_are_marked() -> None:
    context = Context(torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 2.0, 0.5, 1.5]))
    latent = Latent(index=7, density=0.0042, maximum=2.0, contexts=[context])
    console = Console(width=80, color_system=None)
    with console.capture() as captured:
        console.print(render([latent], Words(), colour=False))
    assert captured.get().splitlines()[1] == "  def«⏎»⇥x«  return»"


def test_warmth_is_relative_to_the_latent_not_to_the_line() -> None:
    strong, weak = (Context(torch.tensor([0]), torch.tensor([value])) for value in (4.0, 2.0))
    _, first, second = segments([Latent(index=0, density=0.01, maximum=4.0, contexts=[strong, weak])])
    assert first.style != second.style


def test_ids_that_training_excluded_neither_count_nor_peak() -> None:
    rows = torch.randint(1, 2_048, (70, 8), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = 0  # BOS begins each row
    rows[::2, 5] = 0  # ... and separates documents
    model, hook = load_model(device="cpu"), "blocks.2.hook_resid_pre"
    everywhere = TopKSAEConfig(d_in=128, d_sae=64, k=4, metadata=SAEMetadata(hook_name=hook)).build()
    trained = TopKSAEConfig(
        d_in=128, d_sae=64, k=4, metadata=SAEMetadata(hook_name=hook, exclude_special_tokens=[0])
    ).build()

    found = activations(trained, model, rows)
    torch.testing.assert_close(found.counted, rows != 0)
    assert int(found.counted.sum()) == 70 * 8 - 70 - 35
    with torch.no_grad():
        expected = trained.encode(capture(model, [hook], rows)[hook]) * (rows != 0)[:, :, None]
    torch.testing.assert_close(found.codes.to_dense(), expected, rtol=1e-3, atol=1e-4)

    def strongest(found: Activations) -> set[int]:
        shown = (describe(found, index) for index in range(64))
        return {int(context.ids[context.acts.argmax()]) for latent in shown for context in latent.contexts}

    assert 0 not in strongest(found)
    assert 0 in strongest(activations(everywhere, model, rows)), "BOS is strong, so that leaving it out shows"
