"""What many SAEs in one run cost, beside as many runs one after the other.

    python benchmarks/sweep.py [--batch 4096] [--steps 24] [--json]

Two sweeps of twelve on the demo model (TopK, 16x, k 32): three hooks × four learning rates, and twelve of one shape at
the middle hook (three learning rates × four seeds). All runs are open at once and take turns, a few steps each: both
sides meet the same machine, and start-up and evaluation are left out of both. `share` is the time of the sweep over
the sum of the single runs; `harvest` and `step` are what a single run's step waits for its rows and computes on them.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timing import parser, start

from sae_kit.training.config import RunConfig
from sae_kit.training.inputs import open_inputs
from sae_kit.training.run import build_saes
from sae_kit.training.trainer import SAETrainer

HOOKS = [f"blocks.{layer}.hook_resid_pre" for layer in (1, 2, 3)]
RATES = (1e-3, 2e-3, 4e-3, 8e-3)


def sweeps() -> dict[str, dict[str, dict[str, Any]]]:
    """Entries by name, of each sweep."""
    sae = {"architecture": "topk", "d_sae": 2048, "k": 32}
    hooks = {f"{hook[7]}-{rate}": {"hook": hook, "lr": rate, "sae": sae} for hook in HOOKS for rate in RATES}
    one = {
        f"{rate}-{seed}": {"hook": HOOKS[1], "lr": rate, "seed": seed, "sae": sae}
        for rate in RATES[:3]
        for seed in range(4)
    }
    return {"3 hooks x 4": hooks, "12 of one shape": one}


class Run:
    """A run that is trained a few steps at a time."""

    def __init__(self, entries: Mapping[str, Any], batch: int) -> None:
        cfg = RunConfig.from_dict(
            {
                "model": "demo",
                "dataset": "demo",
                "saes": dict(entries),
                "train": {"tokens": 2**40, "batch_tokens": batch},
                "buffer": {"tokens": 2**16, "norm_estimate_tokens": 2**15},  # its first filling is start-up
                "schedule": {"warm_up_tokens": 0},
                "log": {"console": False},
            }
        )
        inputs, _ = open_inputs(cfg, None, None, None)
        self.store = inputs.open()
        self.trainer = SAETrainer(cfg, build_saes(cfg, inputs), self.store, callbacks=[])
        self.stream = self.trainer._with_statistics()  # what `fit` does, cut into pieces
        self.waited = 0.0

    def train(self, steps: int) -> float:
        """Seconds of so many steps."""
        started, self.waited = time.perf_counter(), 0.0
        for _ in range(steps):
            asked = time.perf_counter()
            rows = next(self.stream)
            self.waited += time.perf_counter() - asked
            self.trainer.step(rows)
        seconds = time.perf_counter() - started
        self.store.pause()  # nothing is to be read ahead while others are timed
        return seconds


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repeats=5)
    options.add_argument("--batch", type=int, default=4096)
    options.add_argument("--steps", type=int, default=12, help="steps of a turn")
    args = options.parse_args(arguments)
    start(args)
    if not args.json:
        print("| sweep | batch | in one run, ms a step | one by one, ms | share | harvest, ms | step, ms |")
        print("|---|--:|--:|--:|--:|--:|--:|")
    for name, entries in sweeps().items():
        found = {"sweep": name, "batch": args.batch} | measure(entries, args)
        print(json.dumps(found) if args.json else table_row(found), flush=True)


def measure(entries: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Medians over rounds in which everything has its turn."""
    together, alone = Run(entries, args.batch), [Run({name: entry}, args.batch) for name, entry in entries.items()]
    for run in (together, *alone):
        run.train(2)
    shares, both = [], []
    harvest, one_by_one = [], []
    for _ in range(args.repeats):
        both.append(together.train(args.steps) / args.steps)
        one_by_one.append(sum(run.train(args.steps) for run in alone) / args.steps)
        harvest.append(sum(run.waited for run in alone) / args.steps / len(alone))
        shares.append(both[-1] / one_by_one[-1])
    for run in (together, *alone):
        run.store.close()
    single = statistics.median(one_by_one) / len(alone)
    return {
        "in_one_run": statistics.median(both),
        "one_by_one": statistics.median(one_by_one),
        "share": statistics.median(shares),
        "harvest": statistics.median(harvest),
        "step": single - statistics.median(harvest),
    }


def table_row(found: Mapping[str, Any]) -> str:
    times = [f"{found[name] * 1e3:.1f}" for name in ("in_one_run", "one_by_one", "harvest", "step")]
    return f"| {found['sweep']} | {found['batch']:,} | {times[0]} | {times[1]} | {found['share']:.2f} | {times[2]} | {times[3]} |"


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
