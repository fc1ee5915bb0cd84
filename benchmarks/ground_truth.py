"""Does each architecture find features that are known?

    python benchmarks/ground_truth.py [--architectures topk ...] [--seeds 0 1 2] [--tokens N] [--json]

256 unit directions in 64 dimensions (random, so their cosines have a spread of 1/8), each present in a row
independently with probability 1/32 and magnitude |N(1, 0.25²)|: 8 at a time on average, and no noise. Batches are drawn
without end, so no row is seen twice. SAEs have 512 latents, twice what the data needs; the seed decides directions,
rows and weights.

An SAE is scored on fresh rows, as many as make a latent dead (`dead_after_tokens`): a latent is dead if it is silent in
all of them. Max-cos is the largest cosine of a true direction with the decoder row of any living latent, averaged over
the 256; where codes have signs that of the cosine is left out.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae_kit import RunConfig, SAETrainer
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.training.part import dead_after

D_IN, D_SAE = 64, 512
N_FEATURES, PROBABILITY = 256, 1 / 32
MAGNITUDE_MEAN, MAGNITUDE_STD = 1.0, 0.25

RUN: dict[str, dict[str, Any]] = {
    "train": {"tokens": 2_000_000, "batch_tokens": 1024, "device": "cpu"},
    "optim": {"lr": 2e-3},
    "log": {"console": False},
}
"""The sections of a run; a recipe may replace fields of them."""

UNIT_JUMP = {  # with unit decoder rows a pre-activation has the length of what it adds, here 2.8 on average
    "architecture": "jumprelu",
    "decoder_norm_constraint": "unit",
    "jumprelu_init_threshold": 1.0,
    "jumprelu_bandwidth": 2.0,
    "jumprelu_ste_to_input": True,
}

BY_H = {"rescale_acts_by_decoder_norm": False}  # who is loud in both factors takes the places of all others

RECIPES: dict[str, dict[str, Any]] = {
    "standard": {"sae": {"l1_coefficient": 2.5}},
    "gated": {"sae": {"l1_coefficient": 2.0}, "optim": {"lr": 3e-3}, "train": {"tokens": 1_000_000}},
    "jumprelu": {"sae": {**UNIT_JUMP, "l0_coefficient": 0.4}},
    "jumprelu_quadratic": {
        "sae": {**UNIT_JUMP, "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 14.0, "l0_coefficient": 0.3}
    },
    "jumprelu_tanh": {
        "sae": {
            "architecture": "jumprelu",
            "jumprelu_sparsity_loss_mode": "tanh",
            "jumprelu_tanh_scale": 1.0,
            "jumprelu_init_threshold": 0.1,
            "jumprelu_bandwidth": 1.0,
            "l0_coefficient": 0.6,
            "aux_coefficient": 1 / 32,
        },
        "train": {"tokens": 1_000_000},
    },
    "topk": {"sae": {"k": 16}},
    "abstopk": {"sae": {"k": 16, **BY_H}},
    "batchtopk": {"sae": {"k": 16, **BY_H}, "train": {"tokens": 1_000_000}},
    "matryoshka_batchtopk": {
        "sae": {"k": 16, "matryoshka_widths": [256, 512], **BY_H},
        "train": {"tokens": 1_000_000},
    },
    "matching_pursuit": {"sae": {"residual_threshold": 2.0, "max_iterations": 20}, "train": {"tokens": 1_000_000}},
}
"""Name -> fields of the SAE, and of the run where it differs; a variant of an architecture says which it is."""


@dataclass(frozen=True)
class GroundTruth:
    """Sparse combinations of fixed unit directions."""

    directions: Float[Tensor, "features d_in"]

    @classmethod
    def random(cls, seed: int) -> "GroundTruth":
        return cls(F.normalize(torch.randn(N_FEATURES, D_IN, generator=generator(seed, "directions")), dim=1))

    def rows(self, number: int, draw: torch.Generator) -> Float[Tensor, "number d_in"]:
        """Fresh rows."""
        shape = (number, len(self.directions))
        present = torch.rand(shape, generator=draw) < PROBABILITY
        magnitudes = MAGNITUDE_MEAN + MAGNITUDE_STD * torch.randn(shape, generator=draw)
        return (present * magnitudes.abs()) @ self.directions

    def batches(self, size: int, draw: torch.Generator) -> Iterator[Float[Tensor, "size d_in"]]:
        """Fresh batches without end."""
        while True:
            yield self.rows(size, draw)


class Score(NamedTuple):
    """How an SAE represents known features."""

    max_cos: float
    l0: float
    dead: float
    explained_variance: float


@torch.no_grad()
def score(sae: SAE, truth: GroundTruth, number: int, draw: torch.Generator) -> Score:
    """The score of `sae` over `number` fresh rows."""
    fired = torch.zeros(sae.d_sae, dtype=torch.int64)
    missed, total, mean, signed = 0.0, 0.0, torch.zeros(sae.d_in), False
    for start in range(0, number, 8192):
        u = truth.rows(min(8192, number - start), draw)
        codes = sae.encode_sparse(u)
        signed |= bool((codes.values < 0).any())
        fired += codes.firing_counts()
        missed += (u - sae.decode(codes)).square().sum().item()
        total += u.square().sum().item()
        mean += u.sum(dim=0) / number
    alive = fired > 0
    cosines = truth.directions @ F.normalize(sae.W_dec[alive], dim=1).T
    cosines = cosines.abs() if signed else cosines
    return Score(
        max_cos=cosines.amax(dim=1).mean().item() if alive.any() else 0.0,
        l0=fired.sum().item() / number,
        dead=1 - alive.double().mean().item(),
        explained_variance=1 - missed / (total - number * mean.square().sum().item()),
    )


def run_config(name: str, tokens: int | None = None) -> RunConfig:
    """The run of a recipe, or a shorter one of `tokens` rows."""
    recipe = RECIPES[name]
    fixed = {"d_in": D_IN, "d_sae": D_SAE, "normalize_activations": "expected_average_only_in"}
    sections = {section: fields | recipe.get(section, {}) for section, fields in RUN.items()}
    if tokens is not None:
        sections["train"]["tokens"] = tokens
    return RunConfig.from_dict({"sae": {"architecture": name} | fixed | recipe["sae"], "hook": "rows", **sections})


def measure(name: str, seed: int, tokens: int | None = None) -> tuple[Score, float]:
    """Train by a recipe: the score, and the seconds of training."""
    cfg = run_config(name, tokens)
    truth = GroundTruth.random(seed)
    sae = cfg.saes["sae"].sae.build(seed)
    started = time.perf_counter()
    SAETrainer(cfg, sae, truth.batches(cfg.train.batch_tokens, generator(seed, "train")), callbacks=[]).fit()
    seconds = time.perf_counter() - started
    return score(sae, truth, dead_after(sae, cfg), generator(seed, "score")), seconds


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, help="rows to train on, instead of the recipe's")
    parser.add_argument("--json", action="store_true", help="one line of JSON per run instead of a table")
    args = parser.parse_args(arguments)
    if not args.json:
        print("| recipe | seed | max-cos | L0 | dead | explained variance | seconds |\n|---|--:|--:|--:|--:|--:|--:|")
    for name in args.architectures:
        for seed in args.seeds:
            found, seconds = measure(name, seed, args.tokens)
            if args.json:
                print(json.dumps({"recipe": name, "seed": seed, **found._asdict(), "seconds": seconds}), flush=True)
            else:
                print(
                    f"| {name} | {seed} | {found.max_cos:.3f} | {found.l0:.1f} | {found.dead:.1%} "
                    f"| {found.explained_variance:.3f} | {seconds:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
