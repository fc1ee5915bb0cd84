"""Rows that a user brings are mixed, trained on and resumed like activations."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kit import Batch, RunConfig, SAETrainer, TopKSAEConfig
from sae_kit.data.buffer import BufferConfig
from sae_kit.data.given import GivenRows
from sae_kit.data.mixing import Mixing
from sae_kit.data.store import ActivationsStore
from sae_kit.errors import ConfigError, DataError
from sae_kit.metadata import SAEMetadata


class Numbered:
    """Chunks of 7 rows [row, row, row]; knows where it stands."""

    def __init__(self, rows: int = 1000, spoilt: tuple[int, ...] = ()) -> None:
        self.rows, self.spoilt = rows, spoilt
        self.at = 0
        self.closed = False

    def __iter__(self) -> Iterator[Tensor]:
        while self.at < self.rows:
            chunk = torch.arange(self.at, min(self.at + 7, self.rows)).float()
            self.at += len(chunk)
            values = chunk[:, None].repeat(1, 3)
            values[[int(row) in self.spoilt for row in chunk], 1] = torch.nan
            yield values

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]

    def close(self) -> None:
        self.closed = True


def store(rows: Any, **buffer: Any) -> ActivationsStore:
    return ActivationsStore.from_rows(rows, BufferConfig(tokens=200, drop_last=False, **buffer), batch_tokens=16)


def test_every_row_once_mixed_and_finite() -> None:
    given = Numbered(spoilt=(0, 1, 2, 3, 4, 5, 6, 500))
    found = store(given)
    rows = torch.cat([batch["rows"] for batch in found])
    expected = [row for row in range(1000) if row not in given.spoilt]
    assert rows[:, 0].sort().values.tolist() == expected
    assert rows[:, 0].tolist() != expected
    assert found.counters["dropped_nonfinite"] == 8
    assert "clumping" not in found.counters, "nobody knows which rows are alike"
    found.close()
    assert given.closed


@pytest.mark.parametrize("prefetch", [0, 3])
def test_rows_with_a_state_resume(prefetch: int) -> None:
    spoilt = (3, 100, 900)
    straight = [batch["rows"] for batch in store(Numbered(spoilt=spoilt))]
    running = store(Numbered(spoilt=spoilt), prefetch=prefetch)
    for _ in range(23):
        next(running)
    resumed = store(Numbered(spoilt=spoilt))
    resumed.load_state_dict(running.state_dict())
    rest = [batch["rows"] for batch in resumed]
    assert resumed.counters["dropped_nonfinite"] == 3
    assert len(rest) == len(straight) - 23
    assert all(torch.equal(mine, yours) for mine, yours in zip(rest, straight[23:], strict=True))
    running.close()


def test_rows_without_a_state_train_and_do_not_resume() -> None:
    running = store(iter(Numbered()))
    next(running)
    with pytest.raises(ConfigError, match="generator cannot go on where another one stopped"):
        store(iter(Numbered())).load_state_dict(running.state_dict())


def test_graphs_of_rows_are_not_kept() -> None:
    weight = torch.ones(3, requires_grad=True)
    batch = next(store(rows * weight for rows in Numbered()))
    assert not batch["rows"].requires_grad


def test_less_than_a_batch_is_given_on_request_alone() -> None:
    (batch,) = store(Numbered(10))
    assert len(batch["rows"]) == 10
    with pytest.raises(DataError, match="there are 10 activations, fewer than one batch of 16"):
        next(ActivationsStore.from_rows(Numbered(10), batch_tokens=16))


def test_a_state_from_a_file_fills_the_buffer_where_rows_are_made() -> None:
    cfg = BufferConfig(tokens=200)
    running = Mixing(GivenRows(Numbered()), cfg, batch_tokens=16)
    running.fill()
    elsewhere = Mixing(GivenRows(Numbered()), cfg, batch_tokens=16, device=torch.device("meta"))
    elsewhere.load_state_dict(running.state_dict())
    assert elsewhere.peek(3)["rows"].device.type == "meta"


def test_inference_mode_may_come_and_go() -> None:
    rows = store(Numbered())
    with torch.inference_mode():
        found = [next(rows)["rows"]]
    found += [batch["rows"] for batch in rows]
    assert torch.cat(found)[:, 0].sort().values.tolist() == list(range(1000))


@pytest.mark.parametrize(
    "item", [torch.ones(3), {"a": torch.ones(3, 2), "b": torch.ones(4, 2)}, {}, {"a": torch.ones(2, 2, 2)}]
)
def test_what_are_no_rows_is_refused(item: Any) -> None:
    with pytest.raises(DataError, match="as many at every site"):
        next(store([item]))


def test_every_kind_of_item_trains() -> None:
    cfg = RunConfig.from_dict({"tokens": 160, "train": {"batch_tokens": 16}, "log": {"console": False}})
    x = torch.randn(10, 16, 8, generator=torch.Generator().manual_seed(0))
    sae = TopKSAEConfig(d_in=8, d_sae=32, k=4)
    at_site = TopKSAEConfig(d_in=8, d_sae=32, k=4, metadata=SAEMetadata(hook_name="a"))
    transcoder = TopKSAEConfig(d_in=8, out_shape=(8,), d_sae=32, k=4)
    of_tensors = SAETrainer(cfg, sae.build(), iter(x)).fit()
    of_sites = SAETrainer(cfg, at_site.build(), ({"a": rows, "b": -rows} for rows in x)).fit()
    of_pairs = SAETrainer(cfg, transcoder.build(), (Batch(rows, -rows) for rows in x)).fit()
    assert of_tensors.steps == of_sites.steps == of_pairs.steps == 10
    assert torch.equal(of_tensors.saes["sae"].W_dec, of_sites.saes["sae"].W_dec)
