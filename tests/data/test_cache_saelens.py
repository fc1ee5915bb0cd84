"""Caches that SAELens wrote are read through the same interface, and give what SAELens reads from them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sae_kit.data.cache import CacheReader, open_cache, write_cache
from sae_kit.errors import ConfigError, CorruptFileError, DataError

GOLDEN = Path(__file__).parent.parent / "golden" / "saelens_cache"
HOOK = "blocks.0.hook_mlp_out"


def saved(folder: Path, columns: dict[str, torch.Tensor], ids: torch.Tensor | None, dtype: str = "float32") -> Path:
    """A data set as SAELens' runner saves one, of any number of hooks."""
    from datasets import Array2D, Dataset, Features, Value
    from datasets import Sequence as ListOf

    features: dict[str, Any] = {name: Array2D(tuple(rows.shape[1:]), dtype) for name, rows in columns.items()}
    data: dict[str, Any] = {name: rows.numpy() for name, rows in columns.items()}
    if ids is not None:
        features["token_ids"], data["token_ids"] = ListOf(Value("int32"), length=ids.shape[1]), ids.int().numpy()
    Dataset.from_dict(data, features=Features(features)).save_to_disk(str(folder))
    return folder


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def test_what_saelens_reads_is_read() -> None:
    cache, expected = open_cache(GOLDEN / "cache"), load_file(GOLDEN / "expected.safetensors")
    assert (cache.rows, cache.widths, cache.context_size, cache.partial) == (120, {HOOK: 6}, 5, True)
    assert len(cache.shards) == 4
    contexts = list(cache.contexts(4))
    assert torch.equal(torch.cat([found.rows[HOOK] for found in contexts]), expected["acts"])
    assert torch.equal(torch.cat([found.tokens.ids for found in contexts]).flatten().int(), expected["token_ids"])
    assert all(torch.equal(found.kept, torch.arange(len(found.tokens) * 5)) for found in contexts)


@pytest.mark.parametrize("order", ["global", "blocks"])
def test_batches_are_shuffled_and_every_row_comes_once(order: Any) -> None:
    expected = load_file(GOLDEN / "expected.safetensors")["acts"]
    reader = CacheReader(GOLDEN / "cache", batch_tokens=16, order=order, epochs=2, open_shards=2)
    next(reader)
    resumed = CacheReader(GOLDEN / "cache", batch_tokens=16, order=order, epochs=2, open_shards=2)
    resumed.load_state_dict(reader.state_dict())
    rows = torch.cat([batch[HOOK] for batch in reader])
    assert torch.equal(rows, torch.cat([batch[HOOK] for batch in resumed]))
    whole = torch.cat([batch[HOOK] for batch in CacheReader(GOLDEN / "cache", batch_tokens=120, order=order)])
    assert not torch.equal(whole, expected)
    assert sorted(whole.tolist()) == sorted(expected.tolist())


def test_ids_above_256_are_left_out_as_integers() -> None:
    expected = load_file(GOLDEN / "expected.safetensors")
    ids = expected["token_ids"]
    excluded = [int(token) for token in ids.unique() if token > 256][:5]
    reader = CacheReader(GOLDEN / "cache", batch_tokens=10, excluded=excluded, drop_last=False)
    stays = ~torch.isin(ids, torch.tensor(excluded))
    assert 100 < reader.rows == int(stays.sum()) < 120
    rows = torch.cat([batch[HOOK] for batch in reader])
    assert sorted(rows.tolist()) == sorted(expected["acts"][stays].tolist())


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_several_hooks_and_widths(tmp_path: Path, dtype: str) -> None:
    draws = torch.Generator().manual_seed(0)
    columns = {name: torch.randn(30, 3, width, generator=draws) for name, width in (("a", 4), ("b", 7))}
    columns["b"][..., 0] = columns["a"][..., 0]
    ids = torch.arange(90).view(30, 3)
    folder = saved(tmp_path / "cache", columns, ids, dtype)
    kind = getattr(torch, dtype)
    batch = next(CacheReader(folder, batch_tokens=90))
    assert {site: (rows.dtype, rows.shape[1]) for site, rows in batch.items()} == {"a": (kind, 4), "b": (kind, 7)}
    assert torch.equal(batch["a"][:, 0], batch["b"][:, 0])
    assert list(next(CacheReader(folder, batch_tokens=8, sites=["b"]))) == ["b"]
    (found,) = open_cache(folder).contexts(30)
    for site, rows in columns.items():
        assert torch.equal(found.rows[site], rows.to(kind).flatten(0, 1))


def test_a_cache_of_theirs_becomes_one_of_ours(tmp_path: Path) -> None:
    """Contexts in the order of the text are what writing takes."""
    cache = open_cache(GOLDEN / "cache")

    class Copying:
        counters: dict[str, int | float] = {}  # noqa: RUF012
        provenance = dict(cache.provenance)  # noqa: RUF012

        def __init__(self) -> None:
            self._contexts = cache.contexts()

        def __next__(self) -> Any:
            return next(self._contexts)

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

        def close(self) -> None: ...

    assert write_cache(Copying(), tmp_path, tokens=120, dtype="float32").complete
    ours, theirs = (next(CacheReader(folder, batch_tokens=120)) for folder in (tmp_path, GOLDEN / "cache"))
    assert torch.equal(ours[HOOK], theirs[HOOK])


def test_caches_without_ids_are_read_but_not_filtered(tmp_path: Path) -> None:
    folder = saved(tmp_path / "cache", {"a": torch.randn(4, 3, 2)}, None)
    assert next(CacheReader(folder, batch_tokens=12))["a"].shape == (12, 2)
    for use in (lambda: CacheReader(folder, batch_tokens=4, excluded=[1]), lambda: list(open_cache(folder).contexts())):
        with pytest.raises(DataError, match=r"the SAELens cache in .* does not hold the ids of its text"):
            use()


def test_what_cannot_be_compared_is_said(caplog: pytest.LogCaptureFixture) -> None:
    CacheReader(GOLDEN / "cache", batch_tokens=4, expected={"model": {"name": "gpt2"}, "sites": [HOOK]})
    assert "does not say which model and text it is from" in caplog.text
    with pytest.raises(ConfigError, match="context_size: expected 128, found 5"):
        CacheReader(GOLDEN / "cache", batch_tokens=4, expected={"context_size": 128})


def test_data_sets_of_something_else_are_refused(tmp_path: Path) -> None:
    from datasets import Dataset

    Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(DataError, match=r"without activations: expected Array2D columns, found \['input_ids'\]"):
        open_cache(tmp_path / "rows")
    columns = {"a": torch.randn(4, 3, 2), "b": torch.randn(4, 5, 2)}
    with pytest.raises(DataError, match=r"expected contexts of one length, found \[3, 5\]"):
        open_cache(saved(tmp_path / "uneven", columns, None))
    with pytest.raises(DataError, match="is a data set without rows"):
        open_cache(saved(tmp_path / "empty", {"a": torch.randn(0, 3, 2)}, None))


def test_torn_files_are_named(copied: Path) -> None:
    path = copied / "data-00002-of-00004.arrow"
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], whole[:10], b""):
        path.write_bytes(raw)
        with pytest.raises(CorruptFileError, match=r"data-00002-of-00004.arrow cannot be read as Arrow"):
            open_cache(copied)
    path.unlink()
    with pytest.raises(CorruptFileError, match=r"data-00002-of-00004.arrow cannot be read as Arrow"):
        open_cache(copied)


def test_shapes_are_what_the_data_set_says(copied: Path) -> None:
    info = copied / "dataset_info.json"
    features = json.loads(info.read_text())
    features["features"][HOOK]["shape"] = [6, 5]
    info.write_text(json.dumps(features))
    with pytest.raises(CorruptFileError, match=r"expected arrays of \[6, 5\] throughout, as dataset_info.json says"):
        open_cache(copied)
    info.write_text("{")
    with pytest.raises(CorruptFileError, match=r"dataset_info.json is not valid JSON"):
        open_cache(copied)
