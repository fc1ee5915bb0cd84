"""Does training on sparse codes go where training on dense ones goes?

    python benchmarks/curves.py [--architectures topk] [--steps 300] [--seeds 0 1 2] [--dtype float32] [--lr 2e-4]

Each seed trains twice on the same rows from the same weights: with sparse codes throughout, whatever their density, and
on dense ones (products of full matrices, gradients by autograd alone; for SAEs that always train on sparse codes see
`tests/dense.py`). Data and recipes are those of
`ground_truth.py`; a seed decides weights and rows, the known directions are the same for all.

`first` is the largest relative difference of loss between the two in the first 50 steps of any seed, `after` the mean
distance over the steps that follow, to be held against `seeds`, the mean distance between dense runs of two seeds. Sums
in another order differ in the last bit. In float32 that is enough for two latents of nearly equal strength to change
places some time, sooner where the rate is high, and from there two runs drift apart, however exact; in float64 it is
not, so what is left is the difference of the two paths.
"""

import dataclasses
import json
import runpy
from collections.abc import Sequence
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import torch
from ground_truth import RECIPES, GroundTruth, run_config
from timing import parser, start
from torch import Tensor

from sae_kit import SAEConfig, SAETrainer
from sae_kit.seeding import generator
from sae_kit.training.callbacks import Callback

densely = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "dense.py"))["densely"]

ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "gated")
DTYPES = ("float32", "float64")


class Distance(NamedTuple):
    """How far the two paths are from each other, relative to the loss."""

    early: float
    after: float
    seeds: float


class Losses(Callback):
    """The loss of each step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, trainer: SAETrainer, metrics: object) -> None:
        assert isinstance(metrics, dict)
        self.values.append(metrics["losses/overall_loss"])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__)
    options.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), choices=list(RECIPES), metavar="NAME"
    )
    options.add_argument("--steps", type=int, default=300)
    options.add_argument("--early", type=int, default=50, help="steps that count as the first")
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--lr", type=float, help="learning rate, instead of the recipe's")
    options.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=DTYPES)
    args = options.parse_args(arguments)
    start(args)
    if not args.json:
        print(f"| architecture | dtype | first {args.early} | after | seeds |\n|---|---|--:|--:|--:|")
    for name, dtype in product(args.architectures, args.dtype):
        settings = {"name": name, "steps": args.steps, "dtype": dtype, "lr": args.lr}
        sparse = torch.stack([curve(seed=seed, dense=False, **settings) for seed in args.seeds])
        dense = torch.stack([curve(seed=seed, dense=True, **settings) for seed in args.seeds])
        found = distance(sparse, dense, args.early)
        if args.json:
            losses = {"sparse": sparse.tolist(), "dense": dense.tolist()}
            print(json.dumps({"architecture": name, "dtype": dtype, **found._asdict(), **losses}), flush=True)
        else:
            print(f"| {name} | {dtype} | {found.early:.1e} | {found.after:.1e} | {found.seeds:.1e} |", flush=True)


def distance(sparse: Tensor, dense: Tensor, early: int) -> Distance:
    """Of curves [seeds, steps], before step `early` and from there on."""
    apart = (sparse - dense).abs() / dense
    later = dense[:, early:]
    seeds = [(later[a] - later[b]).abs() / later[a] for a, b in combinations(range(len(dense)), 2)]
    mean = torch.stack(seeds).mean().item() if seeds else float("nan")
    return Distance(apart[:, :early].max().item(), apart[:, early:].mean().item(), mean)


def curve(*, name: str, seed: int, steps: int, dtype: str, lr: float | None, dense: bool) -> Tensor:
    """The loss of each step [steps]."""
    cfg = run_config(name)
    rows = cfg.train.batch_tokens
    train = dataclasses.replace(cfg.train, tokens=steps * rows, sparse_below=0.0 if dense else 1.0)
    optim = cfg.optim if lr is None else dataclasses.replace(cfg.optim, lr=lr)
    cfg = dataclasses.replace(cfg, train=train, optim=optim, log=dataclasses.replace(cfg.log, every_tokens=rows))
    fields = cfg.saes["sae"].sae.to_dict() | {"dtype": dtype}
    sae = SAEConfig.from_dict(fields).build(seed)
    if dense:
        densely(sae)
    losses = Losses()
    batches = GroundTruth.random(0).batches(rows, generator(seed, "train"))
    SAETrainer(cfg, sae, batches, callbacks=[losses]).fit()
    return torch.tensor(losses.values, dtype=torch.float64)


if __name__ == "__main__":
    main()
