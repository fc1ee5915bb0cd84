"""What the activation stream costs beyond the language model that it reads.

    python benchmarks/stream.py [--models 6x384 demo] [--batch 4096] [--json]

*Throughput*: tokens per second of `ActivationsStore`, everything included (documents, tokenizer, packing, filters,
mixing, batches), as a share of the bare model on as many rows: one hook in the middle, stopped there, nothing
kept. Both take turns in one process. With prefetching the store works ahead in a thread; as nobody trains meanwhile,
that shows what the thread itself costs. 6x384 is a random Llama that reads the demo's text with the demo's tokenizer.

*Buffer*: putting rows in and taking batches out, as a share of the speed of `copy_` of the same bytes (each row is
copied twice, so one half is the most there can be); and what the process holds for a buffer, in units of its rows.
"""

import itertools
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import clock, medians, parser, start
from torch import nn

from sae_kit.data.buffer import BufferConfig, MixingBuffer
from sae_kit.data.capture import capture
from sae_kit.data.models import ModelConfig, load_model
from sae_kit.data.sites import resolve
from sae_kit.data.sources import Source
from sae_kit.data.store import TOKENS_PER_FORWARD, ActivationsStore
from sae_kit.data.tokens import DataConfig
from sae_kit.seeding import generator

CONTEXT = 256
BUFFERS = ((131_072, 384), (131_072, 1024))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=9)
    options.add_argument("--models", nargs="*", default=["6x384", "demo"], help="layers x width, or demo")
    options.add_argument("--batch", type=int, default=4096)
    options.add_argument("--forwards", type=int, default=2, help="forwards of the model in each turn")
    options.add_argument("--buffers", nargs="*", default=[f"{c}x{w}" for c, w in BUFFERS], help="rows x width")
    args = options.parse_args(arguments)
    device = start(args)
    report = _lines if args.json else _table
    rows = [_throughput(name, args, device) for name in args.models]
    report("throughput", rows)
    report("buffer", [_buffer(size, args, device) for size in args.buffers])


def _throughput(name: str, args: Any, device: torch.device) -> dict[str, Any]:
    demo, tokenizer = load_model(ModelConfig(name="demo", device=str(device)))
    model, site = (demo, "blocks.2.hook_resid_pre") if name == "demo" else _random_model(name, len(tokenizer), device)
    bound = resolve(model, site)
    rows = TOKENS_PER_FORWARD // CONTEXT
    ids = torch.randint(3, len(tokenizer), (rows, CONTEXT), device=device)
    stores = {f"prefetch {ahead}": _store(model, site, tokenizer, args, ahead) for ahead in (0, 2)}
    clocks: dict[str, Callable[[], float]] = {
        "bare": clock(lambda: [capture(model, [bound], ids) for _ in range(args.forwards)], device)
    }
    for way, store in stores.items():
        store.fill()
        next(store)
        clocks[way] = _until_forwards(store, args.forwards, device)
    seconds = medians(clocks, args.repeats)
    for store in stores.values():
        store.close()
    tokens = args.forwards * rows * CONTEXT
    return {
        "model": name,
        "bare, tokens/s": round(tokens / seconds["bare"]),
        **{way: seconds["bare"] / seconds[way] for way in stores},
    }


def _store(model: nn.Module, site: str, tokenizer: Any, args: Any, ahead: int) -> ActivationsStore:
    data = DataConfig(sources=(Source(path="demo"),), context_size=CONTEXT)
    buffer = BufferConfig(tokens=16 * args.batch, prefetch=ahead)
    return ActivationsStore.from_config(
        model, data, buffer, sites=[site], tokenizer=tokenizer, train_tokens=None, batch_tokens=args.batch
    )


def _until_forwards(store: ActivationsStore, forwards: int, device: torch.device) -> Callable[[], float]:
    """Seconds for the batches between two forwards of the model, `forwards` of them apart.

    A turn begins and ends just after one, so it holds as many forwards, and all rows that they give leave in batches.
    """

    def turn() -> None:
        end = _fed(store) + forwards * TOKENS_PER_FORWARD
        while _fed(store) < end:
            next(store)
        store.pause()  # a thread that works ahead would go on in the turns of others

    return clock(turn, device)


def _fed(store: ActivationsStore) -> int:
    return int(store.counters["lm_tokens"])


def _random_model(shape: str, vocabulary: int, device: torch.device) -> tuple[nn.Module, str]:
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width = map(int, shape.split("x"))
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
    )
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    return model.to(device), f"model.layers.{layers // 2}:in"


def _buffer(size: str, args: Any, device: torch.device) -> dict[str, Any]:
    capacity, width = map(int, size.split("x"))
    batch = min(args.batch, capacity // 8)
    buffer = MixingBuffer(
        capacity, {"site": width}, dtype=torch.float32, generator=generator(0, "buffer"), device=device
    )
    rows = torch.randn(batch, width, device=device)
    while buffer.free:
        buffer.put({"site": rows})
    source = torch.randn(capacity // batch, batch, width, device=device)
    target = torch.ones_like(source)  # its pages are there before they are timed
    turns = itertools.cycle(zip(source, target, strict=True))

    def copy() -> None:
        """Of rows that no cache holds, as the buffer's are."""
        found, place = next(turns)
        place.copy_(found)

    def through() -> None:
        buffer.take(batch)
        buffer.put({"site": rows})

    clocks = {"copy": clock(copy, device), "through": clock(through, device)}
    seconds = medians(clocks, 5 * args.repeats)
    return {
        "rows x width": size,
        "batch": batch,
        "put + take, of copy_": seconds["copy"] / seconds["through"],
        "memory, of its rows": _memory(capacity, width),
    }


def _memory(capacity: int, width: int) -> float:
    """What a process of its own holds for a buffer at most, filled and drawn from, as a multiple of its rows."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (capacity, width)) / (capacity * width * 4)


def _peak(capacity: int, width: int) -> int:
    batch = capacity // 64
    torch.set_num_threads(1)
    rows = torch.randn(batch, width)
    small = MixingBuffer(4 * batch, {"site": width}, dtype=torch.float32, generator=generator(0, "buffer"))
    _turn_over(small, rows)  # what the first use allocates besides
    del small
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    buffer = MixingBuffer(capacity, {"site": width}, dtype=torch.float32, generator=generator(0, "buffer"))
    _turn_over(buffer, rows)
    return _status("VmHWM") - before


def _turn_over(buffer: MixingBuffer, rows: torch.Tensor) -> None:
    while buffer.free:
        buffer.put({"site": rows})
    for _ in range(64):
        held = buffer.take(len(rows))
        buffer.put({"site": rows})
        assert len(held["site"]) == len(rows)


def _status(name: str) -> int:
    """A line of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _lines(_: str, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


def _table(_: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    print(f"\n| {' | '.join(rows[0])} |\n|---|{'--:|' * (len(rows[0]) - 1)}")
    for row in rows:
        numbers = (f"{value:.3f}" if isinstance(value, float) else f"{value:,}" for value in list(row.values())[1:])
        print(f"| {' | '.join((next(iter(row.values())), *numbers))} |", flush=True)


if __name__ == "__main__":
    main()
