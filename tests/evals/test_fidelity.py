"""Cross-entropy and KL: definitions, orientation of the scores, masks and chunks."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kit.data.batch import TokenBatch
from sae_kit.data.filters import RowFilter
from sae_kit.evals import Fidelity, FidelityStep, fidelity
from sae_kit.evals.fidelity import Positions

VOCABULARY = 11


def positions_of(rows: Tensor, excluded: Iterable[int]) -> Positions:
    return Positions(rows, RowFilter([], excluded=tuple(excluded)).positions(TokenBatch(rows)))


def step(n: int = 1, m: int = 1, **sums: float) -> FidelityStep:
    names = ("ce_clean", "ce_ablated", "ce_spliced", "kl_ablated", "kl_spliced")
    return FidelityStep(n, m, **{name: torch.tensor(sums.get(name, 0.0), dtype=torch.float64) for name in names})


def computed(*steps: FidelityStep) -> dict[str, float | None]:
    family = Fidelity(2, 2)
    for one in steps:
        family.update(one)
    return {key: value for group in family.compute().values() for key, value in group.items()}


def test_worked_scores() -> None:
    found = computed(step(ce_clean=3.0, ce_spliced=3.5, ce_ablated=8.0, kl_spliced=0.2, kl_ablated=4.0))
    assert found["ce_loss_score"] == pytest.approx(0.9)
    assert found["kl_div_score"] == pytest.approx(0.95)


@pytest.mark.parametrize(("spliced", "kl", "score"), [(3.0, 0.0, 1.0), (8.0, 4.0, 0.0), (13.0, 8.0, -1.0)])
def test_one_is_good_and_zero_is_the_ablation(spliced: float, kl: float, score: float) -> None:
    found = computed(step(ce_clean=3, ce_spliced=spliced, ce_ablated=8, kl_spliced=kl, kl_ablated=4))
    assert found["ce_loss_score"] == pytest.approx(score)
    assert found["kl_div_score"] == pytest.approx(score)


def test_scores_are_of_means_and_merging_adds() -> None:
    one = step(10, 20, ce_clean=30, ce_spliced=40, ce_ablated=90, kl_spliced=4, kl_ablated=40)
    two = step(30, 30, ce_clean=60, ce_spliced=65, ce_ablated=70, kl_spliced=1, kl_ablated=5)
    found = computed(one, two)
    assert found["ce_loss_with_sae"] == pytest.approx(105 / 40)
    assert found["kl_div_with_sae"] == pytest.approx(5 / 50)
    assert found["ce_loss_score"] == pytest.approx((160 - 105) / (160 - 90))
    family, other = Fidelity(2, 2), Fidelity(2, 2)
    family.update(one)
    other.update(two)
    family.merge(other)
    assert {k: v for group in family.compute().values() for k, v in group.items()} == found


def test_an_ablation_without_effect_gives_no_score() -> None:
    found = computed(step(ce_clean=3, ce_spliced=3, ce_ablated=3 + 1e-7))
    assert found["ce_loss_score"] is None
    assert found["kl_div_score"] is None
    assert found["ce_loss_without_sae"] == 3


def rows_and_logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, VOCABULARY, (5, 9), generator=generator)
    clean, patched = torch.randn(2, 5, 9, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype)
    return rows, clean, patched


@pytest.mark.parametrize("chunk", [1, 4, 1_024])
def test_equals_a_brute_force(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "POSITIONS_PER_CHUNK", chunk)
    rows, clean, patched = rows_and_logits(torch.float64)
    positions = positions_of(rows, (3, 7))
    ce, kl = positions.losses(patched, clean)
    p, q = clean.log_softmax(-1), patched.log_softmax(-1)
    n_ce = n_kl = 0
    expected_ce = expected_kl = 0.0
    for b, t in [(b, t) for b in range(5) for t in range(9) if int(rows[b, t]) not in (3, 7)]:
        expected_kl += float((p[b, t].exp() * (p[b, t] - q[b, t])).sum())
        n_kl += 1
        if t < 8:
            expected_ce -= float(q[b, t, rows[b, t + 1]])
            n_ce += 1
    assert (positions.n_targets, positions.number) == (n_ce, n_kl)
    assert float(ce) == pytest.approx(expected_ce, rel=1e-12)
    assert float(kl) == pytest.approx(expected_kl, rel=1e-12)


def test_what_stands_at_excluded_positions_does_not_matter() -> None:
    rows, clean, patched = rows_and_logits()
    positions = positions_of(rows, (3,))
    before = positions.losses(patched, clean)
    clean[rows == 3], patched[rows == 3] = float("nan"), 1e30
    assert positions.losses(patched, clean) == before


def test_equal_logits_diverge_by_nothing_even_where_ids_are_forbidden() -> None:
    rows, clean, _ = rows_and_logits()
    clean[..., 2] = float("-inf")
    rows[rows == 2] = 1
    ce, kl = positions_of(rows, ()).losses(clean, clean.clone())
    assert float(kl) == 0
    assert torch.isfinite(ce)


def test_half_precision_logits_are_widened_first() -> None:
    rows, clean, patched = rows_and_logits(torch.bfloat16)
    positions = positions_of(rows, ())
    narrow, wide = positions.losses(patched, clean), positions.losses(patched.float(), clean.float())
    assert narrow == wide


def test_a_batch_without_eligible_positions_adds_nothing() -> None:
    rows, clean, patched = rows_and_logits()
    ce: Any
    ce, kl = positions_of(rows, range(VOCABULARY)).losses(patched, clean)
    assert (float(ce), float(kl)) == (0, 0)


def test_fewer_positions_are_those_chosen_among_them() -> None:
    rows, clean, patched = rows_and_logits()
    every = positions_of(rows, (3,))
    fewer = every.only(torch.arange(0, every.number, 2))
    assert torch.equal(fewer.index, every.index[::2])
    values = torch.randn(*rows.shape, 4)
    assert torch.equal(fewer.select(values), every.select(values)[::2])
    assert torch.equal(fewer.mask.flatten().nonzero().squeeze(1), fewer.index)
    rest = every.only(torch.arange(1, every.number, 2))
    torch.testing.assert_close(
        torch.stack(every.losses(patched, clean)),
        torch.stack(fewer.losses(patched, clean)) + torch.stack(rest.losses(patched, clean)),
    )
