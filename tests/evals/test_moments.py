"""Accumulators: exact whatever the offset, the scale and the cut into batches."""

import pytest
import torch

from sae_kit.evals import Moments, Sums

TOKENS, WIDTH = 20_000, 64


def gaussians() -> torch.Tensor:
    return torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


def moments_of(rows: torch.Tensor, batch: int) -> Moments:
    moments = Moments(rows.shape[1])
    for part in rows.split(batch):
        moments.update(part)
    return moments


@pytest.mark.parametrize("shift", [0.0, 3_000.0])
def test_moments_equal_their_definition(shift: float) -> None:
    rows = gaussians() + shift
    moments = moments_of(rows, 1_024)
    wide = rows.double()
    assert moments.n == TOKENS
    torch.testing.assert_close(moments.mean, wide.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.m2, (wide - wide.mean(0)).square().sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("batch", [37, TOKENS])
def test_moments_do_not_depend_on_batches_or_their_order(batch: int) -> None:
    rows = gaussians() + 30
    one, other = moments_of(rows, 1_024), moments_of(rows.flip(0), batch)
    torch.testing.assert_close(other.m2, one.m2, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.mean, one.mean, rtol=1e-12, atol=0)


def test_merging_is_seeing_both_and_nothing_changes_nothing() -> None:
    rows = gaussians()
    whole, part = moments_of(rows, TOKENS), moments_of(rows[:7_000], 500)
    part.merge(moments_of(rows[7_000:], 900))
    part.merge(Moments(WIDTH))
    part.update(rows[:0])
    assert part.n == whole.n
    torch.testing.assert_close(part.m2, whole.m2, rtol=1e-12, atol=0)
    torch.testing.assert_close(part.mean, whole.mean, rtol=0, atol=1e-14)


def test_sums_are_float64_and_merge() -> None:
    a, b = Sums("x", "ones"), Sums("x", "ones")
    small = torch.full((1_000,), 0.1)
    for _ in range(50):
        a.add(x=small, ones=small > 0)
    b.add(x=torch.tensor(2.0**24), ones=torch.ones(3))
    a.merge(b)
    expected = 50_000 * float(torch.tensor(0.1).double()) + 2**24
    assert a.totals() == pytest.approx({"x": expected, "ones": 50_003}, rel=1e-14)


def test_a_sum_needs_every_name() -> None:
    with pytest.raises(KeyError, match="ones"):
        Sums("x", "ones").add(x=torch.ones(1))
