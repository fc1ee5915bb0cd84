"""The store gives every activation that it should, once, mixed, and nothing that it should not."""

import copy
import threading
import time
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from sae_kit.data.buffer import BufferConfig
from sae_kit.data.capture import capture
from sae_kit.data.mixing import Mixing
from sae_kit.data.models import ModelConfig
from sae_kit.data.store import ActivationsStore
from sae_kit.data.tokens import DataConfig, TokenStream
from sae_kit.errors import ConfigError, DataError, HookNotFoundError, NonFiniteError, ShapeError

SITES = ("model.layers.1:in", "model.layers.2")
CONTEXT, BATCH = 16, 32
DATA = DataConfig(context_size=CONTEXT, holdout=0.0, shuffle=False, rows_per_forward=4)


def texts(count: int, length: int = 40) -> list[str]:
    numbers = torch.randint(0, 61, (count, length), generator=torch.Generator().manual_seed(0)).tolist()
    return [" ".join(f"w{n}" for n in row) for row in numbers]


def make(model: nn.Module, tokenizer: Any, documents: Any, data: DataConfig = DATA, **options: Any) -> ActivationsStore:
    defaults = {"sites": SITES, "train_tokens": None, "batch_tokens": BATCH, "buffer": BufferConfig(tokens=256)}
    settings: dict[str, Any] = {**defaults, **options}
    return ActivationsStore.from_config(model, data, tokenizer=tokenizer, documents=documents, **settings)


def capacity_of(store: ActivationsStore) -> int:
    assert isinstance(store.mixed, Mixing)
    return store.mixed.capacity


def reference(model: nn.Module, tokenizer: Any, documents: Any, site: str = SITES[0]) -> Tensor:
    """All rows of all positions but those of special ids, in order."""
    ids = TokenStream.from_config(DATA, tokenizer, documents=documents).take(10_000).ids
    return capture(model, [site], ids)[site][ids > 2]


def sort(rows: Tensor) -> Tensor:
    return rows[rows[:, 0].argsort()]


def test_every_activation_once_and_mixed(llama: nn.Module, tokenizer: Any) -> None:
    documents = texts(60)
    store = make(llama, tokenizer, iter(documents), buffer=BufferConfig(tokens=256, drop_last=False))
    batches = list(store)
    expected = reference(llama, tokenizer, iter(documents))
    got = torch.cat([batch[SITES[0]] for batch in batches])
    assert [len(b[SITES[0]]) for b in batches[:-1]] == [BATCH] * (len(batches) - 1)
    torch.testing.assert_close(sort(got), sort(expected), atol=1e-5, rtol=1e-5)
    assert not torch.equal(got, expected)
    counters = store.counters
    assert counters["lm_tokens"] == len(expected) + counters["dropped_special"]
    assert counters["dropped_special"] > 100
    assert counters["dropped_nonfinite"] == counters["dropped_last"] == 0
    assert next(store, None) is None


def test_sites_of_a_batch_are_the_same_tokens(llama: nn.Module, tokenizer: Any) -> None:
    documents = texts(20)
    batch = next(make(llama, tokenizer, iter(documents)))
    first, second = (reference(llama, tokenizer, iter(documents), site) for site in SITES)
    rows = torch.cdist(batch[SITES[0]], first).argmin(1)
    torch.testing.assert_close(batch[SITES[1]], second[rows], atol=1e-5, rtol=1e-5)


def test_unmixed_batches_are_in_the_order_of_the_text(llama: nn.Module, tokenizer: Any) -> None:
    documents = texts(20)
    store = make(llama, tokenizer, iter(documents), buffer=BufferConfig(mix="none"))
    got = torch.cat([batch[SITES[0]] for batch in store])
    expected = reference(llama, tokenizer, iter(documents))
    torch.testing.assert_close(got, expected[: len(got)], atol=1e-5, rtol=1e-5)
    assert len(expected) - len(got) == store.counters["dropped_last"] < BATCH


def test_a_budget_harvests_what_it_needs_and_no_more(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, texts(60), train_tokens=5 * BATCH + 7, buffer=None)
    assert capacity_of(store) == 5 * BATCH
    assert len(list(store)) == 5
    forward = 4 * CONTEXT
    needed = 5 * BATCH + store.counters["dropped_special"]
    assert needed <= store.counters["lm_tokens"] <= needed + forward


def test_a_budget_is_exact_where_neither_batch_nor_forward_divides_the_buffer(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, iter(texts(50)), train_tokens=160, batch_tokens=16, buffer=BufferConfig(tokens=33))
    assert capacity_of(store) == 33
    batches = [len(batch[SITES[0]]) for batch in store]
    assert batches == [16] * 10
    assert store.counters["dropped_last"] == 0


def test_full_before_the_first_batch_and_kept_full(llama: nn.Module, tokenizer: Any) -> None:
    forwards: list[int] = []
    handle = llama.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        store = make(llama, tokenizer, texts(60), buffer=BufferConfig(tokens=8 * BATCH))
        assert not forwards
        store.fill()
        filled = len(forwards)
        assert store.counters["lm_tokens"] == filled * 4 * CONTEXT >= 8 * BATCH
        store.fill()
        next(store)
        assert len(forwards) == filled
        for _ in range(8):
            next(store)
        assert len(forwards) > filled
    finally:
        handle.remove()


def test_peek_shows_the_first_activations_and_changes_nothing(llama: nn.Module, tokenizer: Any) -> None:
    documents = texts(20)
    store, other = make(llama, tokenizer, documents), make(llama, tokenizer, documents)
    seen = store.peek(50)[SITES[0]].clone()
    torch.testing.assert_close(seen, reference(llama, tokenizer, iter(documents))[:50], atol=1e-5, rtol=1e-5)
    for _ in range(5):
        assert torch.equal(next(store)[SITES[0]], next(other)[SITES[0]])
    with pytest.raises(RuntimeError):
        store.peek(1)


def test_the_buffer_may_be_filled_and_seen_while_batches_are_made_ahead(llama: nn.Module, tokenizer: Any) -> None:
    def rows(prefetch: int) -> Tensor:
        buffer = BufferConfig(tokens=256, prefetch=prefetch, drop_last=False)
        store = make(llama, tokenizer, iter(texts(60)), buffer=buffer)
        found = []
        for batch in store:
            found.append(batch[SITES[0]])
            store.fill()
            if len(found) < 10:
                with pytest.raises(RuntimeError, match="before the first batch"):
                    store.peek(1)
        return sort(torch.cat(found))

    assert torch.equal(rows(2), rows(0))


def test_a_stream_that_is_dropped_ends_its_thread(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, texts(60), buffer=BufferConfig(tokens=256, prefetch=2))
    next(store)
    (thread,) = (found for found in threading.enumerate() if found.name == "sae_kit-prefetch")
    del store
    thread.join(5)
    assert not thread.is_alive()


def test_a_paused_stream_leaves_the_model_alone(llama: nn.Module, tokenizer: Any) -> None:
    forwards: list[int] = []
    handle = llama.register_forward_pre_hook(lambda *_: forwards.append(1))
    try:
        store = make(llama, tokenizer, texts(60), buffer=BufferConfig(tokens=256, prefetch=20))
        next(store)
        store.pause()
        number = len(forwards)
        time.sleep(0.05)
        assert len(forwards) == number
        for _ in range(30):
            next(store)
        assert len(forwards) > number
        store.close()
    finally:
        handle.remove()


def test_seed_decides_the_batches(llama: nn.Module, tokenizer: Any) -> None:
    first, again, other = (next(make(llama, tokenizer, texts(20), seed=seed))[SITES[0]] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_exclusion_by_ids_or_not_at_all(llama: nn.Module, tokenizer: Any) -> None:
    cases: list[tuple[Literal["none"] | tuple[int, ...], int | None]] = [("none", 0), ((0, 5), None)]
    for exclude, dropped in cases:
        data = DataConfig(context_size=CONTEXT, holdout=0.0, exclude=exclude)
        store = make(llama, tokenizer, iter(texts(20)), data)
        store.fill()
        stream = TokenStream.from_config(data, tokenizer, documents=texts(20))
        ids = stream.take(int(store.counters["lm_tokens"]) // CONTEXT).ids
        expected = int(((ids == 0) | (ids == 5)).sum()) if dropped is None else dropped
        assert store.counters["dropped_special"] == expected


@pytest.mark.parametrize("endless", [True, False])
def test_a_text_without_one_eligible_id_is_refused(llama: nn.Module, tokenizer: Any, endless: bool) -> None:
    data = DataConfig(context_size=4, holdout=0.0, exclude=(0, 4), rows_per_forward=2)
    documents = ["w1 w1 w1 w1"] * 9
    with pytest.raises(DataError, match=r"all \d+ ids of the text are excluded from training; see data\.exclude"):
        make(llama, tokenizer, documents if endless else iter(documents), data).fill()


def test_a_forward_without_eligible_ids_is_passed_over_and_counted(llama: nn.Module, tokenizer: Any) -> None:
    data = DataConfig(context_size=4, holdout=0.0, exclude=(0, 4), rows_per_forward=2, shuffle=False)
    documents = ["w1 w1 w1 w1"] * 20 + ["w2 w3 w2 w3"] * 40
    store = make(llama, tokenizer, iter(documents), data, batch_tokens=8, buffer=BufferConfig(tokens=16))
    rows = sum(len(batch[SITES[0]]) for batch in store)
    counters = store.counters
    assert counters["dropped_special"] > 20 * 4
    assert rows + counters["dropped_last"] + counters["dropped_special"] == counters["lm_tokens"]
    assert rows > 0


def test_a_text_that_gave_rows_goes_on_though_a_pass_begins_without(llama: nn.Module, tokenizer: Any) -> None:
    data = DataConfig(context_size=4, holdout=0.0, exclude=(0, 4), rows_per_forward=2, shuffle=False)
    documents = ["w1 w1 w1 w1"] * 20 + ["w2 w3 w2 w3"] * 20

    def endless() -> ActivationsStore:
        return make(llama, tokenizer, documents, data, batch_tokens=8, buffer=BufferConfig(mix="none"))

    running = endless()
    for _ in range(30):
        next(running)
        resumed = endless()
        resumed.load_state_dict(running.state_dict())
        assert len(next(resumed)[SITES[0]]) == 8
    assert running.counters["dropped_special"] > 2 * 20 * 4


def test_more_contexts_than_numbers_of_32_bits(llama: nn.Module, tokenizer: Any) -> None:
    store, other = make(llama, tokenizer, texts(60)), make(llama, tokenizer, texts(60))
    assert isinstance(store.mixed, Mixing)
    store.mixed._contexts = 2**31 - 3
    for _ in range(10):
        assert torch.equal(next(store)[SITES[0]], next(other)[SITES[0]])
    assert store.mixed._contexts > 2**31
    assert store.counters["clumping"] == other.counters["clumping"] > 1


def test_the_share_and_the_skipped_documents_are_known(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, iter([None, *texts(20), ""]), DataConfig(holdout=0.25, context_size=CONTEXT))
    assert [source["holdout"] for source in store.provenance["tokens"]["sources"]] == [0.25]
    assert len(list(store)) > 0
    assert store.counters["skipped_documents"] == 2


def test_rows_that_are_not_finite_are_dropped_at_every_site(bridge: Any, tokenizer: Any) -> None:
    def spoil(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, 3, 5] = torch.inf
        value[:, 4, 0] = torch.nan
        return value

    bridge.add_hook("blocks.2.hook_resid_post", spoil, is_permanent=True)
    names = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
    store = make(bridge, tokenizer, iter(texts(20)), sites=names, buffer=BufferConfig(drop_last=False))
    batches = list(store)
    assert all(value.isfinite().all() for batch in batches for value in batch.values())
    rows = store.counters["lm_tokens"] // CONTEXT
    assert rows < store.counters["dropped_nonfinite"] <= 2 * rows  # some of these positions are special
    bridge.add_hook("blocks.2.hook_resid_post", lambda value, hook: value * torch.nan)
    with pytest.raises(NonFiniteError, match=r"model\.dtype"):
        make(bridge, tokenizer, texts(20), sites=names).fill()


def test_precision_of_the_stored_activations(llama_folder: Path, llama: nn.Module, tokenizer: Any) -> None:
    half = make(llama, tokenizer, texts(20), buffer=BufferConfig(dtype="bfloat16"))
    assert next(half)[SITES[0]].dtype == torch.bfloat16
    cfg = ModelConfig(name=str(llama_folder), dtype="bfloat16", device="cpu")
    store = ActivationsStore.from_config(
        cfg, DATA, sites=["blocks.1.hook_resid_pre"], train_tokens=64, batch_tokens=32, documents=texts(20)
    )
    batches = list(store)
    assert len(batches) == 2
    assert batches[0]["blocks.1.hook_resid_pre"].dtype == torch.bfloat16


def test_what_cannot_start_does_not(llama: nn.Module, tokenizer: Any) -> None:
    documents = texts(20)
    with pytest.raises(HookNotFoundError, match=r"Did you mean 'model\.layers\.1'"):
        make(llama, tokenizer, documents, sites=["model.layers.1x"])
    with pytest.raises(ConfigError, match="expected at most 16, the model's maximum, found 17"):
        make(llama, tokenizer, documents, DataConfig(context_size=17))
    with pytest.raises(ConfigError, match="tokenizer"):
        make(llama, None, documents)
    with pytest.raises(ConfigError, match="at least one batch"):
        make(llama, tokenizer, documents, train_tokens=BATCH - 1)
    with pytest.raises(DataError, match="activations, fewer than one batch of 100,000"):
        make(llama, tokenizer, iter(documents), batch_tokens=100_000, buffer=None).fill()
    with pytest.raises(ShapeError, match=r"expected \[4, 16, width\] at 'model.layers.0.self_attn', found"):
        make(Transposed(llama), tokenizer, documents, sites=["model.layers.0.self_attn"]).fill()


class Transposed(nn.Module):
    """A model whose activations are [position, row, width]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.model = inner.get_submodule("model")

    def forward(self, ids: Tensor) -> Any:
        return self.model(ids.T)


def test_context_is_the_models_own_by_default(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, texts(20), DataConfig(holdout=0.0))
    assert store.provenance["tokens"]["packing"]["context_size"] == 16


def test_a_text_that_ends_early_is_said(llama: nn.Module, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = make(llama, tokenizer, iter(texts(5)), train_tokens=10_000)
    total = len(reference(llama, tokenizer, iter(texts(5))))
    assert len(list(store)) == total // BATCH
    assert f"the data end after {total} of 9984 activations" in caplog.text


def test_closed_is_the_end(llama: nn.Module, tokenizer: Any) -> None:
    store = make(llama, tokenizer, texts(20))
    next(store)
    store.close()
    store.close()
    assert list(store) == []
    assert store.peek(4) == {}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("where", ["auto", "cpu"])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_wherever_model_and_buffer_are(
    llama: nn.Module, tokenizer: Any, device: str, where: str, prefetch: int
) -> None:
    """The same rows in the same order as on the CPU; and a stop on the way changes nothing."""
    documents, model = texts(60), copy.deepcopy(llama).to(device)
    expected = list(make(llama, tokenizer, iter(documents)))
    store = make(model, tokenizer, documents, buffer=BufferConfig(tokens=256, device=where, prefetch=prefetch))
    batches = [next(store) for _ in range(5)]
    state = copy.deepcopy(store.state_dict())
    batches += [next(store) for _ in range(5)]
    again = make(model, tokenizer, documents, buffer=BufferConfig(tokens=256, device=where, prefetch=prefetch))
    again.load_state_dict(state)
    resumed = [next(again) for _ in range(5)]
    for batch, other in zip(batches, expected, strict=False):
        assert batch[SITES[0]].device.type == (device if where == "auto" else where)
        for site in SITES:
            torch.testing.assert_close(batch[site].cpu(), other[site], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a[site], b[site]) for a, b in zip(resumed, batches[5:], strict=True) for site in SITES)
    store.close()
    again.close()


def test_a_device_that_is_not_there_is_named(llama: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"buffer\.device: expected auto or one of cpu"):
        make(llama, tokenizer, texts(60), buffer=BufferConfig(tokens=256, device="tpu")).fill()
