"""The largest of very many numbers, exactly."""

import math

import pytest
import torch
from torch import Tensor

from sae_kit.ops import Largest, LargestOfRows, largest
from sae_kit.ops.selection import BLOCK, MAXIMA

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("n", [1, BLOCK - 1, 50 * BLOCK, 50 * BLOCK + 7])
@pytest.mark.parametrize("wanted", [1, 20, 49, 50, 51, 2_000])
def test_the_largest_are_found(n: int, wanted: int) -> None:
    x = numbers(n)
    found = largest(x, wanted)
    assert set(found.tolist()) == set(x.topk(min(wanted, n)).indices.tolist())


def test_they_may_all_lie_in_one_block() -> None:
    x = numbers(100 * BLOCK)
    x[3 * BLOCK : 4 * BLOCK] += 100
    assert set(largest(x, BLOCK).tolist()) == set(range(3 * BLOCK, 4 * BLOCK))


def test_of_equal_numbers_there_are_not_more_than_wanted() -> None:
    x = torch.zeros(100 * BLOCK, device=DEVICE)
    x[-5:] = 1
    found = largest(x, 12)
    assert len(found) == len(set(found.tolist())) == 12
    assert set(range(len(x) - 5, len(x))) <= set(found.tolist())


def test_a_bound_leaves_out_what_is_smaller() -> None:
    x = numbers(100 * BLOCK)
    bound = torch.tensor(2.5, device=DEVICE)
    found = largest(x, 90, bound)
    above = set((x >= bound).nonzero().squeeze(1).tolist())
    assert 0 < len(above) < 90
    assert above <= set(found.tolist())
    if DEVICE == "cpu":
        assert set(found.tolist()) == above


@pytest.mark.parametrize("wanted", [3, 200])
def test_what_is_not_a_number_is_found(wanted: int) -> None:
    x = numbers(100 * BLOCK)
    x[777] = math.nan
    assert 777 in largest(x, wanted).tolist()
    assert len(largest(torch.full_like(x, math.nan), wanted)) == wanted


@pytest.mark.parametrize("wanted", [1, 10, 300, 10**6])
@pytest.mark.parametrize("width", [1, 7, 128, 500])
def test_parts_give_what_the_whole_gives(wanted: int, width: int) -> None:
    """With the keys that go with the numbers, however the whole is cut."""
    whole = numbers(20 * 500, seed=1).reshape(20, 500)
    kept = Largest(wanted)
    for first in range(0, 500, width):
        kept.add(whole[:, first : first + width], first, 500)
    expected = whole.flatten().topk(min(wanted, whole.numel())).indices
    found, keys = kept.result()
    assert set(keys.tolist()) == set(expected.tolist())
    assert torch.equal(found, whole.flatten()[keys])


@pytest.mark.parametrize("rising", [False, True])
@pytest.mark.parametrize("k", [1, 10, 130])
@pytest.mark.parametrize("width", [1, 7, 128, 500])
def test_parts_give_what_whole_rows_give(k: int, width: int, rising: bool) -> None:
    """Also where every part beats those before it, and where one does not fill k."""
    whole = numbers(20 * 500, seed=2).reshape(20, 500) - 10  # below 0, so that what fills up rows could be seen
    whole = whole.sort(dim=1).values if rising else whole
    kept = LargestOfRows(k)
    for first in range(0, 500, width):
        kept.add(whole[:, first : first + width], first)
    found, columns = kept.result()
    assert torch.equal(columns.sort(dim=1).values, whole.topk(k, dim=1).indices.sort(dim=1).values)
    assert torch.equal(found, whole.gather(1, columns))


def test_rows_keep_what_is_not_a_number() -> None:
    whole = numbers(4 * 60, seed=3).reshape(4, 60)
    whole[1, 5] = whole[2, 55] = math.nan
    kept = LargestOfRows(6)
    for first in range(0, 60, 20):
        kept.add(whole[:, first : first + 20], first)
    found, columns = kept.result()
    assert 5 in columns[1]
    assert 55 in columns[2]
    assert found.isnan().sum() == 2


def test_of_no_rows_nothing_is_kept() -> None:
    kept = LargestOfRows(3)
    for first in (0, 5):
        kept.add(torch.zeros(0, 5, device=DEVICE), first)
    assert kept.result()[0].shape == (0, 3)


@pytest.mark.parametrize("width", [20, 300, 1200])
def test_rows_may_be_compared_by_another_number(width: int) -> None:
    """Kept is the number itself, of either sign."""
    whole = numbers(30 * 1200, seed=5).reshape(30, 1200)
    kept = LargestOfRows(9, torch.abs)
    for first in range(0, 1200, width):
        kept.add(whole[:, first : first + width], first)
    found, columns = kept.result()
    assert torch.equal(columns.sort(dim=1).values, whole.abs().topk(9, dim=1).indices.sort(dim=1).values)
    assert torch.equal(found, whole.gather(1, columns))
    assert (found < 0).any()


@pytest.mark.parametrize("k", [1, 5, 32])
@pytest.mark.parametrize("width", [256, 1000, 2048])
def test_the_largest_of_long_rows_are_found_among_maxima_of_blocks(k: int, width: int) -> None:
    """Also where they all lie in one block, where numbers are equal, and where some are none."""
    x = numbers(40 * width, seed=2).reshape(40, width)
    blocks = MAXIMA * k
    x[1, 3::blocks] += 100  # one block holds them
    x[2] = 0.0
    x[3, 5] = math.nan
    x[4] = -math.inf
    kept = LargestOfRows(k)
    kept.add(x, 0)
    found, columns = kept.result()
    expected = x.topk(k, dim=1).values
    torch.testing.assert_close(found.sort(dim=1, descending=True).values, expected, rtol=0, atol=0, equal_nan=True)
    assert all(len(set(row)) == k for row in columns.tolist())
    torch.testing.assert_close(x.gather(1, columns), found, rtol=0, atol=0, equal_nan=True)
