"""How well the whole stream mixes a corpus in which every token says where it is from."""

import json
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_docs import ROOT

from sae_kit.data.buffer import BufferConfig
from sae_kit.data.sources import Source
from sae_kit.data.store import ActivationsStore
from sae_kit.data.tokens import DataConfig

CONTEXT = 128


@pytest.fixture(scope="module")
def script() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return runpy.run_path(str(ROOT / "benchmarks" / "shuffle.py"))


@pytest.mark.parametrize(("capacity", "batch"), [(8_192, 1_024), (8_192, 256), (131_072, 8_192)])
def test_window_order_and_clumping(script: Any, capacity: int, batch: int) -> None:
    found = script["measure"](capacity, batch)
    assert 0.9 <= found["window"] <= 1.1
    assert found["order"] <= 3
    assert found["clumping"] == pytest.approx(found["of p"], rel=0.1)
    assert found["once"]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_every_row_once_an_epoch_and_every_other_one_counted(
    script: Any, tokenizer: Any, tmp_path: Path, shuffle: bool, prefetch: int
) -> None:
    documents, epochs = script["labelled"](20_000), 3
    for name, part in (("a", documents[:15]), ("b", documents[15:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"tokens": ids}) for ids in part))
    source = Source(path=str(tmp_path), epochs=epochs)
    settings = {**script["NO_MARKS"], "exclude": tuple(range(500, 900)), "seq_slice": (3, None, None)}
    store = ActivationsStore.from_config(
        script["Labels"](),
        DataConfig(sources=(source,), context_size=CONTEXT, shuffle=shuffle, **settings),
        BufferConfig(tokens=2_000, norm_filter=None, drop_last=False, prefetch=prefetch),
        sites=["embed"],
        tokenizer=tokenizer,
        train_tokens=None,
        batch_tokens=128,
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
