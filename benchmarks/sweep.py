"""What many SAEs in one run cost, beside as many runs one after the other.

    python benchmarks/sweep.py [--batch 4096] [--steps 12] [--json]

Two sweeps of twelve on the demo model (TopK, 16x, k 32): three hooks × four learning rates, and twelve of one shape at
the middle hook (four learning rates × three seeds). All runs are open at once and take turns, a few steps each: both
sides meet the same machine, and start-up, with the first filling of buffers, and evaluation are left out of both.
`share` is the time of the sweep over that of the single runs, and `waits` what a step of a single run waits for its
rows. With `--prefetch 0` nothing is harvested while an SAE is trained, and the wait is all of the harvesting.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timing import parser, start

from sae_kit.data.models import ModelConfig, load_model
from sae_kit.data.store import ActivationsStore
from sae_kit.training.building import build_saes
from sae_kit.training.config import RunConfig
from sae_kit.training.inputs import open_inputs
from sae_kit.training.trainer import SAETrainer

HOOKS = [f"blocks.{layer}.hook_resid_pre" for layer in (1, 2, 3)]
RATES = (1e-3, 2e-3, 4e-3, 8e-3)
SEEDS = (0, 1, 2)


def sweeps(settings: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Entries by name, of each sweep."""
    rates = RATES[:settings]
    sae = {"architecture": "topk", "d_sae": 2048, "k": 32}
    hooks = [{"hook": hook, "lr": rate, "sae": sae} for hook in HOOKS for rate in rates]
    one = [{"hook": HOOKS[1], "lr": rate, "seed": seed, "sae": sae} for rate in rates for seed in SEEDS]
    return {
        f"3 hooks x {settings}": {f"sae_{i}": entry for i, entry in enumerate(hooks)},
        f"{len(one)} of one shape": {f"sae_{i}": entry for i, entry in enumerate(one)},
    }


class Waits:
    """A stream that knows how long it was waited for."""

    def __init__(self, store: ActivationsStore) -> None:
        self.store, self.seconds = store, 0.0

    def peek(self, rows: int) -> Any:
        return self.store.peek(rows)

    def __iter__(self) -> Iterator[Any]:
        stream = iter(self.store)
        while True:
            asked = time.perf_counter()
            rows = next(stream)
            self.seconds += time.perf_counter() - asked
            yield rows


class Run:
    """A run that is trained a few steps at a time."""

    def __init__(self, entries: Mapping[str, Any], args: argparse.Namespace, model: Any, tokenizer: Any) -> None:
        cfg = RunConfig.from_dict(
            {
                "dataset": "demo",
                "saes": dict(entries),
                "train": {"tokens": 2**40, "batch_tokens": args.batch},
                "buffer": {"tokens": args.buffer, "norm_estimate_tokens": args.buffer // 2, "prefetch": args.prefetch},
                "log": {"console": False},
            }
        )
        inputs, _ = open_inputs(cfg, model, tokenizer, None)
        self.waits = Waits(inputs.open())
        self.trainer = SAETrainer(cfg, build_saes(cfg, inputs), self.waits, callbacks=[])
        self.batch = args.batch
        self.train(2)

    def train(self, steps: int) -> float:
        """Seconds of so many steps; nothing is read ahead while others have their turn."""
        self.waits.seconds = 0.0
        started = time.perf_counter()
        self.trainer.fit(steps * self.batch)
        seconds = time.perf_counter() - started
        self.waits.store.pause()
        return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--batch", type=int, default=4096)
    options.add_argument("--steps", type=int, default=12, help="steps of a turn: as many rows as whole forwards give")
    options.add_argument("--buffer", type=int, default=2**16, help="rows that are mixed")
    options.add_argument("--prefetch", type=int, default=2, help="batches that are read ahead")
    options.add_argument("--settings", type=int, default=4, help="learning rates")
    args = options.parse_args(arguments)
    start(args)
    if not args.json:
        print("| sweep | in one run, ms a step | one by one, ms | share | waits, ms | step, ms |")
        print("|---|--:|--:|--:|--:|--:|")
    for name, entries in sweeps(args.settings).items():
        found = {"sweep": name, "batch": args.batch} | measure(entries, args)
        print(json.dumps(found) if args.json else table_row(found), flush=True)


def measure(entries: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds in which everything has its turn."""
    host = load_model(ModelConfig(name="demo"))
    together, alone = Run(entries, args, *host), [Run({name: entry}, args, *host) for name, entry in entries.items()]
    rounds: list[dict[str, float]] = []
    for _ in range(args.repeats):
        found = {"in_one_run": together.train(args.steps) / args.steps}
        found["one_by_one"] = sum(run.train(args.steps) for run in alone) / args.steps
        found["share"] = found["in_one_run"] / found["one_by_one"]
        found["waits"] = sum(run.waits.seconds for run in alone) / args.steps / len(alone)
        found["step"] = found["one_by_one"] / len(alone) - found["waits"]
        rounds.append(found)
    for run in (together, *alone):
        run.waits.store.close()
    return {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}


def table_row(found: Mapping[str, Any]) -> str:
    both, single, waits, step = (f"{found[name] * 1e3:.1f}" for name in ("in_one_run", "one_by_one", "waits", "step"))
    return f"| {found['sweep']} | {both} | {single} | {found['share']:.2f} | {waits} | {step} |"


if __name__ == "__main__":
    main()
