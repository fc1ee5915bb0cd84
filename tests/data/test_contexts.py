"""Whole contexts: every row once, in order, with the text that it is from; exact lengths; stopping and going on."""

import pytest
import torch
from harvests import RandomHarvest, all_rows

from sae_kit.data.contexts import WholeContexts, split_contexts
from sae_kit.data.mixing import BufferConfig, Mixing
from sae_kit.data.store import ActivationsStore
from sae_kit.errors import ConfigError, DataError


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {site: torch.cat([batch[site] for batch in batches]) for site in batches[0]}


@pytest.mark.parametrize("forwards", [1, 3])
def test_every_row_comes_once_in_the_order_of_the_text(forwards: int) -> None:
    batches = list(WholeContexts(RandomHarvest(forwards=10), forwards=forwards))
    assert len(batches) == -(-10 // forwards)
    torch.testing.assert_close(joined(batches), all_rows(RandomHarvest(forwards=10)), rtol=0, atol=0)


def test_the_text_of_the_batch_in_hand_is_known() -> None:
    contexts = WholeContexts(RandomHarvest(padded=True), forwards=2)
    batch = next(contexts)
    next(again := RandomHarvest(padded=True))
    second = next(again)
    assert torch.equal(contexts.current[1].tokens.ids, second.tokens.ids)
    assert torch.equal(contexts.current[1].kept, second.kept)
    torch.testing.assert_close(batch["a"][-len(second.kept) :], second.rows["a"])


def test_exactly_as_many_rows_as_wanted_are_given() -> None:
    contexts = WholeContexts(RandomHarvest(), forwards=2, train_tokens=100)
    batches = list(contexts)
    assert torch.equal(joined(batches)["a"][:, 0], torch.arange(100.0))
    assert contexts.current == []
    contexts = WholeContexts(RandomHarvest(), forwards=2, train_tokens=100)
    for batch in contexts:
        assert len(batch["a"]) == sum(len(each.kept) for each in contexts.current)


def test_peeking_removes_nothing() -> None:
    contexts = WholeContexts(RandomHarvest(), forwards=2)
    seen = contexts.peek(7)["a"]
    assert len(contexts.peek(10_000)["a"]) < 2 * 4 * 8
    batch = next(contexts)
    assert torch.equal(batch["a"][:7], seen)
    assert torch.equal(next(contexts)["a"][:1, 0], torch.tensor([float(len(batch["a"]))]))


@pytest.mark.parametrize(("peeks", "taken"), [(True, 0), (False, 0), (True, 3)])
def test_it_goes_on_where_it_stopped(peeks: bool, taken: int) -> None:
    def stream() -> ActivationsStore:
        return ActivationsStore(WholeContexts(RandomHarvest(padded=True), forwards=2, train_tokens=300))

    straight = stream()
    if peeks:
        straight.peek(5)
    for _ in range(taken):
        next(straight)
    state = straight.state_dict()
    other = stream()
    other.load_state_dict(state)
    assert other.counters == straight.counters
    torch.testing.assert_close(joined(list(other)), joined(list(straight)), rtol=0, atol=0)


def test_a_state_of_other_batches_is_refused() -> None:
    contexts = WholeContexts(RandomHarvest(), forwards=2)
    with pytest.raises(ConfigError, match="batches of 2 forwards, this one of 3"):
        WholeContexts(RandomHarvest(), forwards=3).load_state_dict(contexts.state_dict())
    mixed = Mixing(RandomHarvest(), BufferConfig(tokens=64), batch_tokens=32)
    with pytest.raises(ConfigError, match="batches of mixed rows, not of whole forwards"):
        contexts.load_state_dict(mixed.state_dict())


def test_text_that_ends(caplog: pytest.LogCaptureFixture) -> None:
    assert len(list(WholeContexts(RandomHarvest(forwards=3), forwards=2, train_tokens=1000))) == 2
    assert caplog.text.count(" of 1000 activations") == 1
    with pytest.raises(DataError, match="expected at least one context, found none"):
        next(WholeContexts(RandomHarvest(forwards=0)))


@pytest.mark.parametrize(
    ("batch_tokens", "context", "rows", "expected"),
    [(4096, 128, None, (1, 32)), (4096, 128, 20, (2, 16)), (16_384, 128, None, (4, 32)), (128, 128, 9, (1, 1))],
)
def test_a_batch_is_divided_into_forwards(
    batch_tokens: int, context: int, rows: int | None, expected: tuple[int, int]
) -> None:
    assert split_contexts(batch_tokens, context, rows) == expected
    assert expected[0] * expected[1] * context <= batch_tokens


def test_a_batch_holds_a_context() -> None:
    with pytest.raises(ConfigError, match=r"at least one of 256 ids \(data.context_size\), found 128"):
        split_contexts(128, 256)
