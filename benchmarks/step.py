"""What one training step costs, in encoder products.

    python benchmarks/step.py [--sizes 768x12288] [--batch 2048] [--repeats 9] [--json]

The encoder's forward product x·W_enc is the part that no architecture avoids, so it is the unit: it is timed in turn
with the steps, in the same process, and ratios of medians are printed. A step is everything: forward, losses, backward,
clipping, optimizer, constraints, statistics.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from sae_kit import list_architectures
from sae_kit.data.batch import Batch
from sae_kit.training.config import RunConfig
from sae_kit.training.trainer import SAEInTraining


class Cost(NamedTuple):
    """Median time of one call, alone and in encoder products."""

    name: str
    seconds: float
    products: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["256x4096", "512x8192"], help="d_in x d_sae")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one line of JSON per size and architecture")
    args = parser.parse_args()
    for size in args.sizes:
        d_in, d_sae = (int(part) for part in size.split("x"))
        for cost in measure(d_in, d_sae, args.batch, args.repeats):
            if args.json:
                print(json.dumps({"size": size, "batch": args.batch, **cost._asdict()}))
            else:
                print(f"{size:>12}  {cost.name:<20} {cost.seconds * 1e3:8.1f} ms  {cost.products:5.1f} products")


def measure(d_in: int, d_sae: int, batch: int, repeats: int) -> list[Cost]:
    """Medians over interleaved repeats; the first is the unit itself."""
    x = torch.randn(batch, d_in)
    weights = torch.randn(d_in, d_sae)
    work: dict[str, Callable[[], object]] = {"product": lambda: x @ weights}
    trainable = {name: found for name, found in list_architectures().items() if found.sae.trainable}
    for name, architecture in trainable.items():
        cfg = RunConfig.from_dict({"tokens": 10**9, "train": {"batch_tokens": batch}})
        part = SAEInTraining(cfg, name, architecture.config(d_in=d_in, d_sae=d_sae).build())
        work[name] = lambda part=part: part.step(Batch(x, x), 0, 1.0)
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return [Cost(name, seconds, seconds / medians["product"]) for name, seconds in medians.items()]


if __name__ == "__main__":
    main()
