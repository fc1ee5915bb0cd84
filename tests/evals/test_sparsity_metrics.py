"""Sparsity metrics: counts are exact, signs do not matter, silent latents are found."""

import pytest
import torch
from torch import Tensor

from sae_kit.evals import EvalStep, Sparsity
from sae_kit.ops import SparseCodes

Y = torch.zeros(1, 2)


def measure(acts: Tensor, batch: int = 10**9) -> Sparsity:
    family = Sparsity(2, acts.shape[1])
    for part in acts.split(batch):
        family.update(EvalStep(Y, Y, SparseCodes.from_dense(part)))
    return family


def sparse_acts(tokens: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(tokens, 40, generator=generator)
    acts[acts.abs() < 1.5] = 0
    acts[:, 5:9] = 0
    return acts


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_equals_a_brute_force(batch: int) -> None:
    acts = sparse_acts()
    family = measure(acts, batch)
    found = family.compute()
    fired = (acts != 0).double()
    assert found["sparsity"] == pytest.approx(
        {"l0": float(fired.sum(1).mean()), "l1": float(acts.double().abs().sum(1).mean())}, rel=1e-12
    )
    assert found["misc_metrics"] == pytest.approx({"frac_alive": 0.9, "dead_latents": 4, "dead_resolution": 3 / 500})
    torch.testing.assert_close(family.features()["feature_density"], fired.mean(0))


def test_entries_of_value_zero_are_inactive() -> None:
    family = Sparsity(2, 4)
    values, indices = torch.tensor([[1.0, 0], [-2, 3]]), torch.tensor([[0, 1], [0, 2]])
    family.update(EvalStep(Y, Y, SparseCodes(values, indices, 4, (2,))))
    assert family.compute()["sparsity"] == {"l0": 1.5, "l1": 3}
    assert family.features()["feature_density"].tolist() == [1, 0, 0.5, 0]


def test_merging_is_seeing_both() -> None:
    acts = sparse_acts()
    part = measure(acts[:123])
    part.merge(measure(acts[123:], 50))
    assert part.firing_counts.equal(measure(acts).firing_counts)
    assert part.compute()["sparsity"] == pytest.approx(measure(acts).compute()["sparsity"], rel=1e-12)


def test_firings_beyond_float32_are_counted_exactly() -> None:
    family = Sparsity(2, 3)
    family.firing_counts[1] = 2**24
    family.n = 2**24
    family.update(EvalStep(Y, Y, SparseCodes.from_dense(torch.tensor([[0.0, 1, 0]]))))
    assert family.firing_counts.tolist() == [0, 2**24 + 1, 0]
    assert family.compute()["sparsity"]["l0"] == 1


def test_nothing_seen_is_undefined() -> None:
    found = Sparsity(2, 3).compute()
    assert {*found["sparsity"].values(), *found["misc_metrics"].values()} == {None}
