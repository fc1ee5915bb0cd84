"""A reader gives every row of a cache once per epoch, in an order that nothing but seed and epoch decide."""

import json
import random
import runpy
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harvests import SPECIAL, RandomHarvest, all_rows
from torch import Tensor

from sae_kit.data.buffer import BufferConfig
from sae_kit.data.cache import CacheReader, open_cache, write_cache
from sae_kit.data.cache.memory import SPARE, Column, Places, Recycled
from sae_kit.data.cache.ordering import Blocks, Permutation, Shuffled
from sae_kit.data.store import ActivationsStore
from sae_kit.errors import ConfigError, CorruptFileError, DataError, HookNotFoundError

ROWS = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("cache")
    write_cache(RandomHarvest(), found, tokens=ROWS, dtype="float32", rows_per_shard=60)
    return found


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return {site: rows[:ROWS] for site, rows in all_rows(RandomHarvest()).items()}


def numbers(reader: CacheReader) -> list[Tensor]:
    """Numbers of the rows in each batch."""
    return [batch["a"][:, 0].long() for batch in reader]


# ---- permutations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 17, 1000, 65_536, 65_537, 100_003])
def test_permutations_are_bijections(size: int) -> None:
    there = Permutation(size, seed=1)(np.arange(size))
    assert np.array_equal(np.sort(there), np.arange(size))
    if size > 16:
        assert not np.array_equal(there, np.arange(size))
        assert not np.array_equal(there, Permutation(size, seed=1, index=1)(np.arange(size)))
        assert not np.array_equal(there, Permutation(size, seed=2)(np.arange(size)))


@pytest.mark.parametrize("size", [2**31 + 11, 2**32 - 1, 2**32, 2**32 + 1, 3 * 10**12])
def test_permutations_of_sizes_that_no_memory_holds(size: int) -> None:
    positions = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    there = Permutation(size, seed=0)(positions)
    assert there.min() >= 0
    assert there.max() < size
    assert len(np.unique(there)) == len(there)
    # A random function would give about len²/(2 size) collisions; here there may be none at all.
    assert abs(there.mean() / size - 0.5) < 0.01


@pytest.mark.parametrize("size", [60, 1000, 4096, 50_000])
def test_permutations_look_random(size: int) -> None:
    """Where a row goes is uniform; it says nothing of its neighbour; and there is no trend."""
    cells = np.zeros((10, 10))
    seeds = max(200, 20_000 // size)
    neighbours = trend = 0.0
    for seed in range(seeds):
        there = Permutation(size, seed)(np.arange(size))
        np.add.at(cells, (np.arange(size) * 10 // size, there * 10 // size), 1)
        neighbours += np.corrcoef(there[:-1], there[1:])[0, 1]
        trend += np.corrcoef(np.arange(size), there)[0, 1]
    expected = cells.sum() / 100
    assert ((cells - expected) ** 2 / expected).sum() < 140  # chi-squared, 81 degrees of freedom, p = 5e-5
    assert abs(neighbours / seeds + 1 / size) < 4.5 / (seeds * size) ** 0.5  # without replacement: -1/size
    assert abs(trend / seeds) < 4.5 / (seeds * size) ** 0.5


def test_orders_do_not_depend_on_how_they_are_asked() -> None:
    whole = Shuffled(100_000, seed=0).numbers(2, 0, 100_000)
    order = Shuffled(100_000, seed=0)
    for start, stop in ((65_530, 65_540), (0, 5), (65_536, 100_000), (99_999, 100_000), (3, 3)):
        assert np.array_equal(order.numbers(2, start, stop), whole[start:stop])
    blocks = Blocks([5000, 1, 9000, 4096], open_shards=2, seed=0)
    whole = blocks.numbers(1, 0, 18_097)
    assert np.array_equal(np.sort(whole), np.arange(18_097))
    for start, stop in ((4095, 4097), (0, 18_097), (9000, 17_000), (18_096, 18_097), (7, 7)):
        assert np.array_equal(blocks.numbers(1, start, stop), whole[start:stop])


def test_blocks_come_from_a_few_shards_in_turn() -> None:
    sizes = [10_000] * 6
    seen = set()
    for epoch in range(30):
        found = Blocks(sizes, open_shards=3, seed=0).numbers(epoch, 0, 60_000)
        shards = (found // 10_000)[np.r_[True, np.diff(found) != 1]]
        assert len(set(shards[:3])) == 3
        assert set(shards[:9]) == set(shards[:3]), "three blocks each, in turn, before another shard is opened"
        seen.add(tuple(shards[:3]))
    assert len(seen) > 15


# ---- gathering -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("width", [1, 5, 128, 768])
def test_columns_gather_rows_of_tensors_anywhere(dtype: torch.dtype, width: int) -> None:
    draws = torch.Generator().manual_seed(0)
    parts = [
        torch.randint(-100, 100, (rows + 3, width), generator=draws).to(dtype)[offset : offset + rows]
        for rows, offset in ((1, 0), (40, 3), (7, 1), (1000, 2))
    ]
    shards = torch.randint(4, (3000,), generator=draws).numpy()
    places = (np.random.default_rng(0).random(3000) * np.array([len(part) for part in parts])[shards]).astype(np.int64)
    found = Column(parts).gather(shards, places)
    expected = torch.stack([parts[shard][place] for shard, place in zip(shards, places, strict=True)])
    assert torch.equal(found, expected)
    assert Column(parts).gather(shards[:0], places[:0]).shape == (0, width)


@pytest.mark.parametrize("lengths", [[1], [5, 1, 1, 1, 3], [100_000, 1, 1, 70_000, 2, 40_000], [30_000] * 40])
def test_numbers_lead_to_their_rows(lengths: list[int]) -> None:
    numbers = np.random.default_rng(0).permutation(sum(lengths))
    tensors, rows = Places(lengths)(numbers)
    starts = np.cumsum([0, *lengths])
    assert np.array_equal(starts[tensors] + rows, numbers)
    assert (rows >= 0).all()
    assert (rows < np.array(lengths)[tensors]).all()


def test_memory_is_used_again_when_nobody_holds_it() -> None:
    memory = Recycled((4, 3), torch.float32)
    first, second = memory.tensor(), memory.tensor()
    assert first.shape == (4, 3)
    places = {first.data_ptr(), second.data_ptr()}
    assert len(places) == 2
    weight = torch.ones(3, requires_grad=True)
    loss = (first[1:].fill_(2) * weight).sum()  # the graph holds a part of it
    del first, second
    assert {memory.tensor().data_ptr() for _ in range(5)} < places
    held = memory.tensor()
    assert memory.tensor().data_ptr() not in places
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6, 6, 6]
    del loss, held, weight
    assert memory.tensor().data_ptr() in places


def test_memory_that_many_batches_took_is_given_back() -> None:
    memory = Recycled((4, 3), torch.float32)
    many = [memory.tensor() for _ in range(20)]
    assert len({tensor.data_ptr() for tensor in many}) == 20
    kept, many = many[7], []
    kept.fill_(5)
    for _ in range(30):
        memory.tensor().zero_()
    assert len(memory._blocks) == SPARE + 1
    assert (kept == 5).all()


@pytest.mark.parametrize(
    "part",
    [
        lambda rows: rows[3:4],
        lambda rows: rows.detach().T,
        lambda rows: rows.unbind(0)[2],
        lambda rows: torch.nn.Parameter(rows),
        lambda rows: rows.numpy()[2:3],
        lambda rows: rows.numpy().view(np.uint8).reshape(-1)[::3],
        lambda rows: memoryview(rows.numpy()),
        lambda rows: rows.untyped_storage(),
        lambda rows: torch.empty(0).set_(rows),
        lambda rows: torch.from_dlpack(rows),
    ],
)
def test_whatever_is_left_of_a_batch_keeps_its_memory(part: Callable[[Tensor], Any]) -> None:
    memory = Recycled((4, 3), torch.float32)
    rows = memory.tensor()
    place, held = rows.data_ptr(), part(rows)
    del rows
    assert place not in {memory.tensor().data_ptr() for _ in range(5)}
    del held
    assert place in {memory.tensor().data_ptr() for _ in range(5)}


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["global", "blocks"])
@pytest.mark.parametrize("batch", [1, 7, 64, 500, 512])
def test_every_row_is_given_once_per_epoch(folder: Path, truth: dict[str, Tensor], order: Any, batch: int) -> None:
    reader = CacheReader(folder, batch_tokens=batch, order=order, epochs=3, seed=5, drop_last=False)
    batches = list(reader)
    assert [len(found["a"]) for found in batches[:-1]] == [batch] * (len(batches) - 1)
    together = {site: torch.cat([found[site] for found in batches]) for site in truth}
    given = together["a"][:, 0].long()
    for site, rows in together.items():
        assert torch.equal(rows, truth[site][given]), "sites stay together, rows are those that were written"
    epochs = given.split(ROWS)
    assert len(epochs) == 3
    assert all(torch.equal(epoch.sort().values, torch.arange(ROWS)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], torch.arange(ROWS))
    assert reader.counters == {"dropped_special": 0, "dropped_last": 0, "epochs": 3}


def test_the_last_incomplete_batch_is_counted(folder: Path) -> None:
    reader = CacheReader(folder, batch_tokens=64)
    assert len(list(reader)) == ROWS // 64
    assert reader.counters["dropped_last"] == ROWS % 64
    assert list(reader) == []
    assert reader.counters["dropped_last"] == ROWS % 64


def test_tokens_end_a_run(folder: Path) -> None:
    reader = CacheReader(folder, batch_tokens=64, tokens=200)
    assert len(list(reader)) == 3
    assert reader.counters["dropped_last"] == 0
    assert sum(map(len, numbers(CacheReader(folder, batch_tokens=64, tokens=1500, epochs=3)))) == 1472
    with pytest.raises(ConfigError, match=r"has 500 activations, 1,000 in 2 epochs, and 1,001.* cache.epochs to 3"):
        CacheReader(folder, batch_tokens=64, tokens=1001, epochs=2)
    with pytest.raises(ConfigError, match=r"cache.epochs to 2, or train on fewer tokens"):
        CacheReader(folder, batch_tokens=64, tokens=501)


def test_less_than_a_batch_is_said(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"expected at least one batch of 512 activations of the cache in .*found 500"
    ):
        CacheReader(folder, batch_tokens=512)
    with pytest.raises(ConfigError, match=r"expected at least one batch of 64 .*found 63"):
        CacheReader(folder, batch_tokens=64, tokens=63)


def test_the_global_order_mixes_contexts(tmp_path: Path) -> None:
    """Rows of one context share a batch no more often than any two rows, and there is no order in a batch."""
    write_cache(RandomHarvest(widths={"a": 1}, forwards=400, context=16), tmp_path, tokens=20_000, dtype="float32")
    batches = numbers(CacheReader(tmp_path, batch_tokens=100, seed=1))
    batch_of = torch.empty(20_000, dtype=torch.int64)
    correlations = []
    for index, found in enumerate(batches):
        batch_of[found] = index
        correlations.append(torch.corrcoef(torch.stack([torch.arange(100.0).double(), found.double()]))[0, 1])
    groups = batch_of.unfold(0, 12, 12)
    same = (groups[:, :, None] == groups[:, None, :]).sum() - groups.numel()
    pairs = len(groups) * 12 * 11
    expected = 99 / 19_999
    assert abs(float(same) / pairs - expected) < 5 * (expected / pairs * 2) ** 0.5
    assert abs(torch.stack(correlations).mean()) <= 3 / 20_000**0.5


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_resuming_at_any_moment_gives_the_same_batches(folder: Path, order: Any) -> None:
    def fresh() -> CacheReader:
        return CacheReader(folder, batch_tokens=48, order=order, epochs=4, seed=2)

    expected = numbers(fresh())
    moments = random.Random(0)
    for _ in range(10):
        reader, stop = fresh(), moments.randrange(len(expected))
        for _ in range(stop):
            next(reader)
        state = json.loads(json.dumps(reader.state_dict()))
        resumed = fresh()
        next(resumed)
        resumed.load_state_dict(state)
        found = numbers(resumed)
        assert len(found) == len(expected) - stop
        assert all(torch.equal(a, b) for a, b in zip(found, expected[stop:], strict=True))


def test_states_of_another_way_to_read_are_refused(folder: Path, tmp_path: Path) -> None:
    another = tmp_path / "as many rows, other ones"
    write_cache(RandomHarvest(seed=1), another, tokens=ROWS, dtype="float32", rows_per_shard=60)
    reader = CacheReader(folder, batch_tokens=48, order="blocks", seed=2)
    for other, message in (
        (
            CacheReader(folder, batch_tokens=48, seed=3),
            "order was blocks and is global; seed was 2 and is 3; open_shar",
        ),
        (CacheReader(folder, batch_tokens=48, order="blocks", seed=2, excluded=[301]), "rows was 500 and is"),
        (CacheReader(another, batch_tokens=48, order="blocks", seed=2), r"cache was [0-9a-f]{16} and is [0-9a-f]{16}$"),
    ):
        with pytest.raises(ConfigError, match=message):
            other.load_state_dict(reader.state_dict())


def test_peeking_consumes_nothing(folder: Path) -> None:
    for order in ("global", "blocks"):
        reader = CacheReader(folder, batch_tokens=48, order=order)
        for _ in range(3):
            seen = reader.peek(100)["a"][:, 0].long()
            assert torch.equal(seen[:48], next(reader)["a"][:, 0].long())
        assert len(reader.peek(1000)["b"]) == ROWS - 3 * 48


def test_sites_and_dtypes_are_chosen(folder: Path, truth: dict[str, Tensor], tmp_path: Path) -> None:
    reader = CacheReader(folder, batch_tokens=10, sites=["b"], dtype=torch.bfloat16)
    assert reader.widths == {"b": 4}
    assert {site: rows.dtype for site, rows in next(reader).items()} == {"b": torch.bfloat16}
    with pytest.raises(HookNotFoundError, match=r"'aa' is not in the cache in .*\. Did you mean 'a'\? It holds a, b"):
        CacheReader(folder, batch_tokens=10, sites=["aa"])
    cases: list[tuple[Any, torch.dtype, torch.dtype]] = [
        ("bf16", torch.float32, torch.bfloat16),
        ("int8", torch.bfloat16, torch.bfloat16),
        ("int8", torch.float32, torch.float32),
        ("fp16", torch.float32, torch.float16),
    ]
    for dtype, harvested, read in cases:
        place = tmp_path / f"{dtype}-{harvested}"
        write_cache(RandomHarvest(dtype=harvested, facts={"mode": dtype}), place, tokens=ROWS, dtype=dtype)
        batch = next(CacheReader(place, batch_tokens=ROWS))
        assert {rows.dtype for rows in batch.values()} == {read}
        at = next(CacheReader(folder, batch_tokens=ROWS))["a"][:, 0].long()  # the same seed, the same order
        torch.testing.assert_close(batch["b"].float(), truth["b"][at], atol=0.03, rtol=0.01)


def test_a_batch_is_the_callers_own(folder: Path, truth: dict[str, Tensor]) -> None:
    reader = CacheReader(folder, batch_tokens=ROWS, epochs=2)
    first = next(reader)
    at = first["a"][:, 0].long()
    first["b"].zero_()
    second = next(reader)
    assert torch.equal(second["b"], truth["b"][second["a"][:, 0].long()])
    assert torch.equal(first["a"], truth["a"][at])
    reader.close()
    reader.close()
    assert list(reader) == []
    assert torch.equal(first["a"], truth["a"][at])


def test_closing_gives_back_the_files(folder: Path) -> None:
    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(folder))

    if not Path("/proc/self/maps").exists():
        pytest.skip("this system does not say which files are mapped")
    before = mapped()
    reader = CacheReader(folder, batch_tokens=64)
    next(reader)
    assert mapped() > before
    reader.close()
    assert mapped() == before
    assert (reader.counters["dropped_special"], dict(reader.provenance)) == (0, RandomHarvest().provenance)


@pytest.mark.parametrize("drop_last", [True, False])
def test_blocks_are_mixed_and_every_row_that_is_left_out_is_counted(folder: Path, drop_last: bool) -> None:
    buffer = BufferConfig(tokens=130, drop_last=drop_last)
    store = ActivationsStore.from_cache(folder, buffer, batch_tokens=64, order="blocks", epochs=2)
    found = torch.cat([batch["a"][:, 0] for batch in store])
    assert store.counters["dropped_last"] == (2 * ROWS % 64 if drop_last else 0)
    assert len(found) + store.counters["dropped_last"] == 2 * ROWS
    with pytest.raises(DataError, match="500 activations, fewer than one batch of 512"):
        next(ActivationsStore.from_cache(folder, batch_tokens=512, order="blocks"))


def test_a_store_shows_as_much_of_a_cache_as_a_buffer_would_hold(folder: Path) -> None:
    store = ActivationsStore.from_cache(folder, BufferConfig(tokens=100, prefetch=2), batch_tokens=16)
    assert len(store.peek(1_000_000)["a"]) == 100
    batch = next(store)
    with pytest.raises(RuntimeError, match="before the first batch"):
        store.peek(16)
    assert torch.equal(batch["a"], CacheReader(folder, batch_tokens=16).peek(16)["a"])
    store.close()


def test_excluded_ids_are_compared_as_integers(tmp_path: Path) -> None:
    """Ids above 256 that bfloat16 cannot tell apart, in a cache of bfloat16."""
    write_cache(RandomHarvest(), tmp_path, tokens=ROWS, dtype="bf16", rows_per_shard=60)
    ids = torch.cat([found.tokens.ids.flatten()[found.kept] for found in open_cache(tmp_path).contexts()])
    stays = (ids != SPECIAL + 1) & (ids != SPECIAL - 1)
    assert 0 < int(stays.sum()) < ROWS
    for order in ("global", "blocks"):
        excluded = [SPECIAL + 1, SPECIAL - 1]
        reader = CacheReader(tmp_path, batch_tokens=32, order=order, excluded=excluded, epochs=2, drop_last=False)
        assert reader.rows == int(stays.sum())
        assert reader.counters["dropped_special"] == ROWS - reader.rows
        expected = torch.cat([found.rows["b"] for found in open_cache(tmp_path).contexts()])[stays]
        rows = torch.cat([batch["b"] for batch in reader])
        twice = Counter(map(tuple, expected.tolist() * 2))
        assert Counter(map(tuple, rows.tolist())) == twice
    with pytest.raises(DataError, match="has no activation whose id is not excluded"):
        CacheReader(tmp_path, batch_tokens=32, excluded=range(SPECIAL - 3, SPECIAL + 4))


def test_provenance_is_compared(folder: Path) -> None:
    harvest = RandomHarvest()
    reader = CacheReader(folder, batch_tokens=8, expected={**harvest.provenance, "sites": ["b"]}, sites=["b"])
    assert reader.provenance == harvest.provenance
    with pytest.raises(ConfigError, match=r"the cache in .*model.name: expected 'gpt2', found 'random'"):
        CacheReader(folder, batch_tokens=8, expected={"model": {"name": "gpt2", "seed": 0}})


def test_mistakes_are_found_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected batches and open shards of at least 1, found 0 and 4"):
        CacheReader(folder, batch_tokens=0)
    with pytest.raises(ConfigError, match="expected some of the sites a, b, found none"):
        CacheReader(folder, batch_tokens=8, sites=[])
    with pytest.raises(ConfigError, match=r"cache\.epochs: expected at least 1 or None, found 0"):
        CacheReader(folder, batch_tokens=8, epochs=0)
    with pytest.raises(FileNotFoundError, match=r"no cache of activations in .*found nothing"):
        CacheReader(tmp_path, batch_tokens=8)
    with pytest.raises(FileNotFoundError, match="found no such folder"):
        CacheReader(tmp_path / "not" / "there", batch_tokens=8)


def test_a_shard_torn_within_its_size_is_named(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "r00-000002.safetensors"
    broken.write_bytes(b"\xff" * broken.stat().st_size)
    with pytest.raises(CorruptFileError, match=r"r00-000002.safetensors cannot be read as safetensors.*write"):
        CacheReader(tmp_path, batch_tokens=8)


# ---- speed -----------------------------------------------------------------------------------------------------------


def test_reading_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(benchmarks))
    threads = torch.get_num_threads()
    main: Callable[[list[str]], None] = runpy.run_path(str(benchmarks / "cache_reading.py"))["main"]
    options = ["--widths", "32", "--megabytes", "2", "--batch", "512", "--repeats", "1", "--threads", "1"]
    try:
        main([*options, "--json"])
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        main(options)
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("timing", None)
    assert [row["dtype"] for row in found] == ["float32", "bf16", "int8"]
    for row in found:
        assert row["ratio"] == pytest.approx(row["given"] / row["plain"])
        expected = 32 * 4 / 36 if row["dtype"] == "int8" else 1  # 32 numbers and a scale become 32 of four bytes
        assert row["given"] / row["read"] == pytest.approx(expected)
        assert min(row["read"], row["plain"], row["batches"]) > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 3
    assert len({line.count("|") for line in table}) == 1
