"""Does training on sparse codes go where training on dense ones goes?

    python benchmarks/curves.py [--architectures topk] [--steps 300] [--seeds 0 1 2] [--dtype float32] [--lr 2e-4]

Each seed trains three times on the same rows from the same weights:

- sparse: with sparse codes throughout, whatever their density;
- dense: products of full matrices, gradients by autograd alone (for SAEs that always train on sparse codes see
  `tests/dense.py`);
- shuffled: dense, with the rows of every batch in another order, the same for all batches. Losses are means over rows:
  only the order of sums is another, so what lies between it and dense is rounding alone.

Columns are relative differences of loss. `first`: the largest in the first 50 steps of any seed; `then`: the mean over
the steps that follow. `seeds`: the mean over those steps between dense runs of two seeds.

In float32 the last bit is enough for an entry to cross its threshold, or two of nearly equal strength to change places,
some time, sooner where the rate is high, and from there two runs drift apart, however exact. That is rare, and any of
the three runs may be the one that it happens to: the paths do the same if, over several seeds, sparse is about as far
from dense as shuffled is. In float64, where it hardly ever happens, both are about 1e-14 or less. Data and recipes are
those of `ground_truth.py`; a seed decides weights and rows, known directions are the same.
"""

import dataclasses
import json
import runpy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import torch
from ground_truth import RECIPES, GroundTruth, run_config
from timing import parser, start
from torch import Tensor

from sae_kit import SAE, SAEConfig, SAETrainer
from sae_kit.ops import Codes, SparseCodes
from sae_kit.seeding import generator
from sae_kit.training.callbacks import Callback

densely = runpy.run_path(str(Path(__file__).parents[1] / "tests" / "dense.py"))["densely"]

ARCHITECTURES = ("topk", "batchtopk", "matryoshka_batchtopk", "standard", "jumprelu", "gated")
DTYPES = ("float32", "float64")


PATHS = ("sparse", "dense", "shuffled")


class Distance(NamedTuple):
    """How far curves are from those of the dense path, relative to the loss."""

    first: float
    then: float


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
        first, then = (f"{when}: sparse-dense | shuffled-dense" for when in (f"first {args.early}", "then"))
        print(f"| architecture | dtype | {first} | {then} | seeds |\n|---|---|--:|--:|--:|--:|--:|")
    for name, dtype in product(args.architectures, args.dtype):
        settings = {"name": name, "steps": args.steps, "dtype": dtype, "lr": args.lr}
        curves = {path: torch.stack([curve(path, seed=seed, **settings) for seed in args.seeds]) for path in PATHS}
        sparse, shuffled = (distance(curves[path], curves["dense"], args.early) for path in ("sparse", "shuffled"))
        seeds = between_seeds(curves["dense"][:, args.early :])
        if args.json:
            found = {"sparse": sparse._asdict(), "shuffled": shuffled._asdict(), "seeds": seeds}
            losses = {path: values.tolist() for path, values in curves.items()}
            print(json.dumps({"architecture": name, "dtype": dtype, **found, "losses": losses}), flush=True)
        else:
            figures = (sparse.first, shuffled.first, sparse.then, shuffled.then, seeds)
            print(f"| {name} | {dtype} | {' | '.join(f'{figure:.1e}' for figure in figures)} |", flush=True)


def distance(curves: Tensor, dense: Tensor, early: int) -> Distance:
    """Of curves [seeds, steps], before step `early` and from there on."""
    apart = (curves - dense).abs() / dense
    return Distance(apart[:, :early].max().item(), apart[:, early:].mean().item())


def between_seeds(dense: Tensor) -> float:
    """The mean distance between two of the curves [seeds, steps]; NaN if there is one alone."""
    apart = [(dense[a] - dense[b]).abs() / dense[a] for a, b in combinations(range(len(dense)), 2)]
    return torch.stack(apart).mean().item() if apart else float("nan")


def curve(path: str, *, name: str, seed: int, steps: int, dtype: str, lr: float | None) -> Tensor:
    """The loss of each step [steps] on one of the paths."""
    cfg = run_config(name)
    rows = cfg.train.batch_tokens
    sparse_below = 1.0 if path == "sparse" else 0.0
    train = dataclasses.replace(cfg.train, tokens=steps * rows, sparse_below=sparse_below)
    optim = cfg.optim if lr is None else dataclasses.replace(cfg.optim, lr=lr)
    cfg = dataclasses.replace(cfg, train=train, optim=optim, log=dataclasses.replace(cfg.log, every_tokens=rows))
    fields = cfg.saes["sae"].sae.to_dict() | {"dtype": dtype}
    sae = SAEConfig.from_dict(fields).build(seed)
    if path != "sparse":
        densely(sae)
    batches = GroundTruth.random(0).batches(rows, generator(seed, "train"))
    if path == "shuffled":
        order = torch.randperm(rows, generator=generator(0, "order"))
        batches = (batch[order] for batch in batches)
    losses = Losses()
    with as_expected(sae, SparseCodes if path == "sparse" else Tensor):
        SAETrainer(cfg, sae, batches, callbacks=[losses]).fit()
    return torch.tensor(losses.values, dtype=torch.float64)


@contextmanager
def as_expected(sae: SAE, kind: type) -> Generator[None]:
    """Refuse codes of another form: a path that is not taken would agree with the other for sure."""
    reconstruct = sae.reconstruct

    def checked(codes: Codes) -> Tensor:
        assert isinstance(codes, kind), f"expected codes of {kind.__name__}, found {type(codes).__name__}"
        return reconstruct(codes)

    sae.reconstruct = checked
    yield
    sae.reconstruct = reconstruct


if __name__ == "__main__":
    main()
