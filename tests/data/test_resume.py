"""A stream interrupted anywhere goes on elsewhere with the same batches, by way of a real file."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_token_state import files
from texts import uneven
from torch import Tensor, nn

from sae_kit.data.batch import State
from sae_kit.data.buffer import BufferConfig
from sae_kit.data.cache.files import read_state, write_shard
from sae_kit.data.sources import Source
from sae_kit.data.store import ActivationsStore
from sae_kit.data.tokens import DataConfig
from sae_kit.errors import ConfigError

SITES = ("model.layers.1:in", "model.layers.2")
BATCH, FOLLOWING = 32, 100


class Make:
    """Stores of one run: two streamed sources of several files, mixed 2 to 1, cut in the middle of documents."""

    def __init__(self, model: nn.Module, tokenizer: Any, sources: tuple[Source, ...], **options: Any) -> None:
        self.model, self.tokenizer, self.sources = model, tokenizer, sources
        self.train_tokens, self.data, self.buffer = options.pop("train_tokens", None), options, {}

    def __call__(self, **changes: Any) -> ActivationsStore:
        buffer = {"tokens": 500, "norm_filter": 1.2, "prefetch": 2, **self.buffer, **changes}
        data = {"context_size": 16, "holdout": 0.0, "tokenize_batch": 7, "rows_per_forward": 5, **self.data}
        return ActivationsStore.from_config(
            self.model,
            DataConfig(sources=self.sources, **data),
            BufferConfig(**buffer),
            sites=SITES,
            tokenizer=self.tokenizer,
            train_tokens=self.train_tokens,
            batch_tokens=BATCH,
            seed=5,
        )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, ...]:
    folder = tmp_path_factory.mktemp("text")
    one, two = files(folder / "one", "json", uneven(150), 5), files(folder / "two", "parquet", uneven(60)[::-1], 3)
    return Source(path=one, weight=2.0), Source(path=two)


def take(store: ActivationsStore, number: int) -> list[dict[str, Tensor]]:
    return [batch for _, batch in zip(range(number), store, strict=False)]


def through_a_file(state: State, path: Path) -> State:
    """Written and read: JSON and safetensors."""
    write_shard(path, {}, state)
    return read_state(path)


def assert_equal(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    assert len(found) == len(expected)
    for mine, yours in zip(found, expected, strict=True):
        assert mine.keys() == yours.keys()
        assert all(torch.equal(mine[site], yours[site]) for site in mine)


def test_ten_random_points(llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...], tmp_path: Path) -> None:
    make = Make(llama, tokenizer, sources)
    straight = make()
    points = sorted(random.Random(1).sample(range(1, 200), 10))
    batches, counters = [], []
    for _ in range(points[-1] + FOLLOWING):
        batches.append(next(straight))
        counters.append(dict(straight.counters))
    straight.close()
    running = make()
    at = 0
    for point in points:
        take(running, point - at)
        at = point
        saved = through_a_file(running.state_dict(), tmp_path / "state.safetensors")
        resumed = make(prefetch=point % 4)
        resumed.load_state_dict(saved)
        assert resumed.counters == counters[point - 1]
        assert_equal(take(resumed, FOLLOWING), batches[point : point + FOLLOWING])
        assert resumed.counters == counters[point + FOLLOWING - 1]
        resumed.close()
    running.close()
    assert counters[-1]["dropped_norm"] > 0
    assert counters[-1]["clumping"] > 1


def test_while_the_buffer_drains_and_at_the_end(
    llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...], tmp_path: Path
) -> None:
    once = tuple(Source(path=source.path, epochs=1) for source in sources)
    make = Make(llama, tokenizer, once)
    batches = take(straight := make(), 1000)
    last = dict(straight.counters)
    assert last["dropped_last"] > 0
    full = 500 // BATCH
    for point in (len(batches) - full, len(batches) - full // 2, len(batches) - 1, len(batches)):
        running = make()
        take(running, point)
        resumed = make(prefetch=0)
        resumed.load_state_dict(through_a_file(running.state_dict(), tmp_path / "state.safetensors"))
        assert_equal(take(resumed, 1000), batches[point:])
        assert resumed.counters == last
        running.close()


def test_before_the_first_batch(llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...], tmp_path: Path) -> None:
    make = Make(llama, tokenizer, sources)
    straight, peeked, resumed = make(), make(), make()
    peeked.peek(10)
    resumed.load_state_dict(through_a_file(peeked.state_dict(), tmp_path / "state.safetensors"))
    batches = take(straight, 20)
    for site, rows in resumed.peek(10).items():
        assert torch.equal(rows, peeked.peek(10)[site])
    assert_equal(take(resumed, 20), batches)
    for store in (straight, peeked, resumed):
        store.close()


def test_nothing_is_read_again(llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...]) -> None:
    """Resuming costs the forwards that follow, and none of those before."""
    make = Make(llama, tokenizer, sources)
    running, resumed = make(prefetch=0), make(prefetch=0)
    take(running, 150)
    forwards: list[int] = []
    handle = llama.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        resumed.load_state_dict(running.state_dict())
        take(resumed, 4)
    finally:
        handle.remove()
    assert len(forwards) <= 4


@pytest.mark.parametrize(
    ("change", "said"),
    [({"tokens": 600}, "buffer.tokens: the saved stream has 500, this one 600"), ({"mix": "none"}, r"buffer\.")],
)
def test_other_settings_are_refused(
    llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...], change: dict[str, Any], said: str
) -> None:
    make = Make(llama, tokenizer, sources)
    running = make(prefetch=0)
    take(running, 3)
    with pytest.raises(ConfigError, match=said):
        make(**change).load_state_dict(running.state_dict())
    for data, said in (
        ({"exclude": "none"}, r"filters\.excluded_ids: expected \[\], found \[0"),
        ({"seq_slice": (1, None, None)}, r"filters\.seq_slice"),
        ({"rows_per_forward": 4}, "rows_per_forward: expected 4, found 5"),
    ):
        with pytest.raises(ConfigError, match=f"the saved stream was made with other settings: {said}"):
            Make(llama, tokenizer, sources, **data)().load_state_dict(running.state_dict())
    with pytest.raises(ConfigError, match=r"filters\.norm_filter: expected 3\.0, found 1\.2"):
        make(norm_filter=3.0).load_state_dict(running.state_dict())
    other = Make(llama, tokenizer, sources[:1])(prefetch=0)
    with pytest.raises(ConfigError, match="made with other settings: sources"):
        other.load_state_dict(running.state_dict())
    half = make(dtype="bfloat16", prefetch=0)
    expected = take(make(dtype="bfloat16", prefetch=0), 3)
    with pytest.raises(ConfigError, match="bfloat16"):
        half.load_state_dict(running.state_dict())
    assert_equal(take(half, 3), expected)  # as if it had not been tried


def test_set_back_to_the_beginning(llama: nn.Module, tokenizer: Any, sources: tuple[Source, ...]) -> None:
    store = Make(llama, tokenizer, sources)()
    beginning = store.state_dict()
    batches = take(store, 10)
    store.load_state_dict(beginning)
    assert_equal(take(store, 10), batches)
    store.close()
