"""How fast a cache of activations is read in a global shuffle, against plain sequential reading of the same files.

    python benchmarks/cache_reading.py [--widths 768] [--dtypes float32 int8] [--batch 4096] [--json]
    python benchmarks/cache_reading.py --cold --megabytes 4096      # files that are not in the page cache

All read the whole cache, in turn, in one process; speeds are bytes of the files per second, medians.

*plain*: one file after another into memory that is there already, the least that any reader does. *batches*: the same
files in order, in pieces as large as a batch and each into memory of its own, as batches are. *read*: `CacheReader`,
every row at random. *given*: bytes of the batches that come of it, which are four times those of the files where int8
is turned into float32, else the same; *ratio* is given / plain. A batch of more than 32 MB is memory that the
allocator asks the system for anew each time, page by page: *batches* shows what that alone costs.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from timing import medians, parser, start

from sae_kit.data.batch import Harvested, State, TokenBatch
from sae_kit.data.cache import CacheReader, Manifest, write_cache
from sae_kit.data.cache.quantize import bytes_per_row
from sae_kit.seeding import generator

SHARDS, CONTEXT, CONTEXTS = 8, 256, 16
COLUMNS = ("width", "dtype", "MB", "plain, GB/s", "batches, GB/s", "read, GB/s", "given, GB/s", "ratio", "rows/s")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--widths", nargs="+", type=int, default=[128, 768, 4096])
    options.add_argument("--dtypes", nargs="+", default=["float32", "bf16", "int8"])
    options.add_argument("--batch", type=int, default=4096)
    options.add_argument("--megabytes", type=int, default=1024, help="size of the activations in float32")
    options.add_argument("--cold", action="store_true", help="drop the files from the page cache before each reading")
    options.add_argument("--folder", type=Path, help="where caches are written; default: a temporary folder")
    args = options.parse_args(arguments)
    start(args)
    if not args.json:
        print(f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}")
    for width in args.widths:
        for dtype in args.dtypes:
            with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                found = measure(Path(folder) / "cache", width, dtype, args)
            print(json.dumps(found) if args.json else table_row(found), flush=True)


class Rows(Iterator[Harvested]):
    """As many random rows as are asked for."""

    counters: dict[str, int | float] = {}  # noqa: RUF012
    provenance: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, width: int) -> None:
        self._ids = torch.zeros(CONTEXTS, CONTEXT, dtype=torch.int64)
        self._rows = torch.randn(self._ids.numel(), width, generator=generator(0, "benchmark"))

    def __next__(self) -> Harvested:
        return Harvested({"x": self._rows}, TokenBatch(self._ids), torch.arange(len(self._rows)))

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None: ...

    def close(self) -> None: ...


def measure(folder: Path, width: int, dtype: Any, args: argparse.Namespace) -> dict[str, Any]:
    rows = max(args.batch, args.megabytes * 10**6 // (4 * width)) // args.batch * args.batch
    manifest = write_cache(Rows(width), folder, tokens=rows, dtype=dtype, rows_per_shard=max(1, rows // SHARDS))
    size = rows * bytes_per_row(width, dtype)
    piece = args.batch * bytes_per_row(width, dtype)
    asked = torch.float32 if dtype == "int8" else None
    memory = torch.zeros(max(shard.bytes for shard in manifest.shards), dtype=torch.uint8)
    reader = None if args.cold else CacheReader(folder, batch_tokens=args.batch, epochs=10**6, dtype=asked)

    def read() -> None:
        batches = reader or CacheReader(folder, batch_tokens=args.batch, dtype=asked)
        for _ in range(rows // args.batch):
            next(batches)

    runs: dict[str, Callable[[], None]] = {
        "plain": lambda: whole_files(folder, manifest, memory),
        "batches": lambda: pieces(folder, manifest, piece),
        "read": read,
    }
    times = medians({name: timed(run, folder if args.cold else None) for name, run in runs.items()}, args.repeats)
    files = sum(shard.bytes for shard in manifest.shards)
    speeds = {name: (size if name == "read" else files) / seconds for name, seconds in times.items()}
    speeds["given"] = rows * width * (4 if dtype in ("float32", "int8") else 2) / times["read"]
    found: dict[str, Any] = {"width": width, "dtype": dtype, "batch": args.batch, "cold": args.cold, "bytes": size}
    return found | speeds | {"ratio": speeds["given"] / speeds["plain"], "rows_per_second": rows / times["read"]}


def whole_files(folder: Path, manifest: Manifest, memory: torch.Tensor) -> None:
    for shard in manifest.shards:
        with (folder / shard.file).open("rb", buffering=0) as file:
            while file.readinto(memory.numpy().data):
                pass


def pieces(folder: Path, manifest: Manifest, size: int) -> None:
    for shard in manifest.shards:
        with (folder / shard.file).open("rb", buffering=0) as file:
            while file.readinto(torch.empty(size, dtype=torch.uint8).numpy().data):
                pass


def timed(run: Callable[[], None], drop: Path | None) -> Callable[[], float]:
    def seconds() -> float:
        for path in drop.iterdir() if drop else ():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return seconds


def table_row(found: dict[str, Any]) -> str:
    speeds = [f"{found[name] / 1e9:.2f}" for name in ("plain", "batches", "read", "given")]
    values = [str(found["width"]), found["dtype"], f"{found['bytes'] / 1e6:.0f}", *speeds, f"{found['ratio']:.2f}"]
    values.append(f"{found['rows_per_second']:,.0f}")
    return f"| {' | '.join(values)} |"


if __name__ == "__main__":
    main()
