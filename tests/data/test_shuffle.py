"""How well the whole stream mixes a corpus in which every token says which document it is from."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sae_kit.data.buffer import BufferConfig
from sae_kit.data.sources import Source
from sae_kit.data.store import ActivationsStore
from sae_kit.data.tokens import DataConfig

CONTEXT = 128


class Labels(nn.Module):
    """A model whose activations are the ids, exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        return self.embed(ids[..., None].float())


def labelled(tokens: int) -> list[list[int]]:
    """Documents of 20 to 900 tokens whose ids are the numbers of the tokens in the corpus."""
    lengths = np.random.default_rng(0).integers(20, 900, tokens // 20)
    ends = np.cumsum(lengths)
    ends = ends[ends <= tokens]
    return [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist(), strict=False)]


def batches(tokenizer: Any, documents: Any, capacity: int, batch: int, **options: Any) -> ActivationsStore:
    marks: dict[str, Any] = dict.fromkeys(("row_start", "separator", "doc_start"))
    buffer = options.pop("buffer", {})
    data = DataConfig(**{"context_size": CONTEXT, "holdout": 0.0, "exclude": "none", **marks, **options})
    return ActivationsStore.from_config(
        Labels(),
        data,
        BufferConfig(tokens=capacity, norm_filter=None, drop_last=False, **buffer),
        sites=["embed"],
        tokenizer=tokenizer,
        documents=documents,
        train_tokens=None,
        batch_tokens=batch,
    )


@pytest.mark.parametrize(("capacity", "batch"), [(8_192, 1_024), (8_192, 256), (131_072, 8_192)])
def test_window_order_and_clumping(tokenizer: Any, capacity: int, batch: int) -> None:
    tokens = 10 * capacity
    store = batches(tokenizer, iter(labelled(tokens)), capacity, batch)
    clumping: list[float] = []
    correlations: list[float] = []
    batch_of = np.full(tokens, -1)
    number = 0
    for number, found in enumerate(store):
        ids = found["embed"][:, 0].long().numpy()
        assert (batch_of[ids] == -1).all(), "no token twice"
        batch_of[ids] = number
        if len(ids) == batch:
            correlations.append(float(np.corrcoef(np.arange(batch), ids)[0, 1]))
        if number * batch == 8 * capacity:  # before the buffer drains
            clumping.append(float(store.counters["clumping"]))
        if number * batch >= 9 * capacity:
            break
    store.close()
    assert number > 0
    steady = batch_of[capacity : 7 * capacity].reshape(-1, CONTEXT)
    assert (steady >= 0).mean() > 0.99
    same = sum(count * (count - 1) for row in steady for count in Counter(row.tolist()).values())
    p = same / (len(steady) * CONTEXT * (CONTEXT - 1))
    window = 2 * capacity - batch
    assert 0.9 * window <= batch / p <= 1.1 * window
    assert abs(np.mean(correlations)) <= 3 / tokens**0.5
    assert clumping[0] == pytest.approx(1 + (CONTEXT - 1) * p, rel=0.1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_row_once_an_epoch_and_every_other_one_counted(
    tokenizer: Any, tmp_path: Path, shuffle: bool, prefetch: int
) -> None:
    documents, epochs = labelled(20_000), 3
    for name, part in (("a", documents[:15]), ("b", documents[15:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"tokens": ids}) for ids in part))
    store = batches(
        tokenizer,
        None,
        2_000,
        128,
        sources=(Source(path=str(tmp_path), epochs=epochs),),
        shuffle=shuffle,
        exclude=tuple(range(500, 900)),
        seq_slice=(3, None, None),
        buffer={"prefetch": prefetch},
    )
    ids = torch.cat([batch["embed"][:, 0].long() for batch in store])
    counters = store.counters
    times = Counter(ids.tolist())
    total = sum(map(len, documents))
    assert max(times.values()) == epochs
    assert not any(500 <= number < 900 for number in times)
    left_out = {reason: count for reason, count in counters.items() if reason.startswith("dropped_") and count}
    assert left_out["dropped_special"] == pytest.approx(epochs * 400, abs=CONTEXT)
    assert left_out["dropped_slice"] > 0
    assert counters["lm_tokens"] == len(ids) + left_out["dropped_special"] + left_out["dropped_slice"]
    assert len(ids) + sum(left_out.values()) + counters["tail_ids"] == epochs * total, left_out
    store.close()
