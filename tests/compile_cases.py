"""Trains with and without torch.compile and prints how far the weights are apart, for `training/test_compile.py`.

    python compile_cases.py BACKEND SPARSE_BELOW ARCHITECTURE...

A process of its own, without the run-time checks of shapes: dynamo cannot follow these.
"""

import copy
import json
import sys

import torch
from helpers import BATCH, batch, make_sae, relative, run_config
from torch._dynamo.utils import counters

from sae_kit.sae import SAE
from sae_kit.training.part import SAEInTraining


def main(backend: str, sparse_below: float, names: list[str]) -> None:
    for name in names:
        torch.compiler.reset()
        counters.clear()
        sae = make_sae(name)
        expected = steps(copy.deepcopy(sae), None, sparse_below)
        found = steps(copy.deepcopy(sae), backend, sparse_below)
        differences = [relative(found.get_parameter(key), value) for key, value in expected.named_parameters()]
        moved = relative(sae.W_dec, expected.W_dec)
        facts = {"difference": max(differences), "moved": moved, "breaks": len(counters["graph_break"])}
        sys.stdout.write(json.dumps({"name": name, "graphs": counters["frames"]["ok"], **facts}) + "\n")


def steps(sae: SAE, backend: str | None, sparse_below: float) -> SAE:
    train = {"compile": backend, "sparse_below": sparse_below}
    part = SAEInTraining(run_config(10, train=train), "sae", sae)
    for step in range(3):
        part.step(batch(sae, BATCH, seed=step), step * BATCH, 1.0 - step / 10)
    return sae


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), sys.argv[3:])
