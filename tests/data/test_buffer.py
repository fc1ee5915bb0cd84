"""The buffer gives each row exactly once, unrelated rows together, from memory that it allocates once."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kit.data.buffer import BufferConfig, MixingBuffer
from sae_kit.errors import ConfigError, ShapeError
from sae_kit.seeding import generator


def make(capacity: int, seed: int = 0, widths: dict[str, int] | None = None, **options: Any) -> MixingBuffer:
    return MixingBuffer(
        capacity, widths or {"a": 1}, dtype=torch.float32, generator=generator(seed, "buffer"), **options
    )


def stream(buffer: MixingBuffer, rows: int, batch: int, chunk: int) -> Iterator[Tensor]:
    """Batches of row numbers, the buffer kept as full as it can be, as the store does it."""
    entered = 0
    while True:
        while buffer.free and entered < rows:
            end = min(entered + min(chunk - entered % chunk, buffer.free), rows)
            buffer.put({"a": torch.arange(entered, end, dtype=torch.float32)[:, None]})
            entered = end
        if not buffer.count:
            return
        yield buffer.take(min(batch, buffer.count))["a"][:, 0].long()


@pytest.mark.parametrize(("capacity", "batch", "chunk"), [(64, 8, 5), (64, 64, 64), (100, 7, 33), (8, 3, 100)])
def test_every_row_leaves_exactly_once(capacity: int, batch: int, chunk: int) -> None:
    out = torch.cat(list(stream(make(capacity), 1000, batch, chunk)))
    assert torch.equal(out.sort().values, torch.arange(1000))
    assert not torch.equal(out, torch.arange(1000))


def test_sites_stay_together() -> None:
    buffer = make(32, widths={"a": 1, "b": 3})
    for start in range(0, 200, 8):
        rows = torch.arange(start, start + 8, dtype=torch.float32)
        while buffer.free < 8:
            out = buffer.take(8)
            assert torch.equal(out["b"], out["a"].expand(8, 3) + 0.5)
        buffer.put({"a": rows[:, None], "b": rows[:, None].expand(8, 3) + 0.5})


def test_mixing_window_and_order_within_a_batch() -> None:
    capacity, batch, context, rows = 1024, 64, 32, 60_000
    together = pairs = 0
    correlations = []
    batch_of = torch.empty(rows, dtype=torch.int64)
    for i, out in enumerate(stream(make(capacity), rows, batch, chunk=128)):
        batch_of[out] = i
        if len(out) == batch:
            correlations.append(torch.corrcoef(torch.stack([torch.arange(batch).double(), out.double()]))[0, 1])
    # Contexts that entered while the buffer was in its steady state.
    for members in batch_of[capacity : rows - 2 * capacity].split(context)[:-1]:
        same = members[:, None] == members[None, :]
        together += int(same.sum()) - context
        pairs += context * (context - 1)
    window = batch / (together / pairs)
    assert 0.9 * (2 * capacity - batch) <= window <= 1.1 * (2 * capacity - batch)
    assert abs(torch.stack(correlations).mean()) <= 3 / rows**0.5


def test_draws_are_uniform() -> None:
    counts = torch.zeros(40)
    for seed in range(1500):
        buffer = make(40, seed)
        buffer.put({"a": torch.arange(40.0)[:, None]})
        counts[buffer.take(4)["a"][:, 0].long()] += 1
    expected = 1500 * 4 / 40
    assert ((counts - expected) ** 2 / expected).sum() < 72  # chi-squared, 39 degrees of freedom, p = 0.001


def test_seed_decides_the_order() -> None:
    first, again, other = (torch.cat(list(stream(make(64, seed), 500, 8, 16))) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unshuffled_rows_leave_in_the_order_of_arrival() -> None:
    for capacity, batch in ((16, 16), (16, 5)):
        out = torch.cat(list(stream(make(capacity, shuffle=False), 100, batch, 7)))
        assert torch.equal(out, torch.arange(100))


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that exist at a time and were made under this mode; `peak` is their maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                self.users[key] = self.users.get(key, 0) + 1
                self.sizes[key] = storage.nbytes()
                weakref.finalize(tensor, self.drop, key)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out

    def drop(self, key: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key], self.sizes[key]


def test_memory_is_the_payload_and_a_tenth() -> None:
    capacity, batch, width = 8192, 128, 64
    chunk = torch.ones(batch, width)
    with LiveBytes() as live:
        buffer = make(capacity, widths={"a": width})
        for _ in range(capacity // batch):
            buffer.put({"a": chunk})
        for _ in range(100):
            batch_held = buffer.take(batch)  # while the next is made, as a trainer does
            buffer.put({"a": chunk})
            assert len(batch_held["a"]) == batch
    payload = capacity * width * 4
    assert payload <= live.peak <= 1.1 * payload


def test_a_batch_stays_what_it_was() -> None:
    buffer = make(16)
    buffer.put({"a": torch.arange(16.0)[:, None]})
    first = buffer.take(8)["a"]
    kept = first.clone()
    buffer.put({"a": torch.full((8, 1), -1.0)})
    buffer.take(8)
    assert torch.equal(first, kept)


def test_peek_shows_the_first_rows_and_removes_nothing() -> None:
    buffer = make(16)
    buffer.put({"a": torch.arange(10.0)[:, None]})
    assert torch.equal(buffer.peek(4)["a"][:, 0], torch.arange(4.0))
    assert len(buffer.peek(100)["a"]) == buffer.count == 10
    buffer.take(1)
    with pytest.raises(RuntimeError, match="before the first batch"):
        buffer.peek(4)


def test_stored_precision() -> None:
    buffer = MixingBuffer(
        4, {"a": 1, "b": 1}, dtype={"a": torch.bfloat16, "b": torch.float32}, generator=generator(0, "buffer")
    )
    buffer.put({"a": torch.ones(4, 1), "b": torch.ones(4, 1)})
    out = buffer.take(4)
    assert (out["a"].dtype, out["b"].dtype) == (torch.bfloat16, torch.float32)


def test_what_does_not_fit_is_refused() -> None:
    buffer = make(4, widths={"a": 2})
    with pytest.raises(ShapeError, match="5 rows do not fit: 4 of 4 slots are free"):
        buffer.put({"a": torch.ones(5, 2)})
    with pytest.raises(ShapeError, match=r"expected \(3, 2\) at 'a', found \(3, 7\)"):
        buffer.put({"a": torch.ones(3, 7)})
    with pytest.raises(ShapeError, match=r"expected rows of \['a'\], found \['b'\]"):
        buffer.put({"b": torch.ones(3, 2)})
    with pytest.raises(ShapeError, match="expected to take 1 to 0 rows"):
        buffer.take(1)


def test_capacity_follows_the_config_and_the_run() -> None:
    assert BufferConfig().capacity(4096) == 128 * 4096
    assert BufferConfig().capacity(4096, 10_000_000) == 128 * 4096
    assert BufferConfig().capacity(4096, 20_000) == 16_384, "a short run does not fill a whole buffer first"
    assert BufferConfig(tokens=10_000).capacity(4096) == 10_000
    assert BufferConfig(mix="none").capacity(4096, 20_000) == 4096
    with pytest.raises(ConfigError, match="at least two batches of 4,096, found 5,000"):
        BufferConfig(tokens=5000).capacity(4096)
    with pytest.raises(ConfigError, match="at least one batch of 4,096 tokens, found 100"):
        BufferConfig().capacity(4096, 100)
    with pytest.raises(ConfigError, match="tokens: expected a positive number"):
        BufferConfig(tokens=0)
