"""The largest of very many numbers, exactly."""

import math

import pytest
import torch
from torch import Tensor

from sae_kit.ops import Largest, largest, largest_of_rows
from sae_kit.ops.selection import BLOCK, ROW_BLOCKS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def numbers(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, 50 * BLOCK, 50 * BLOCK + 7])
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


@pytest.mark.parametrize("k", [1, 5, 32, 130])
@pytest.mark.parametrize("width", [130, 256, 1000, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_of_rows_are_found(k: int, width: int, dtype: torch.dtype) -> None:
    """Also where they all lie in one block, where numbers are equal, and where some are none."""
    x = numbers(40 * width, seed=2).reshape(40, width).to(dtype)
    x[1, 32 : 32 + ROW_BLOCKS[0]] += 100
    x[2] = 0.0
    x[3, 5] = math.nan
    x[4] = -math.inf
    x[5, 7:] = -math.inf
    columns = largest_of_rows(x, k)
    assert columns.shape == (40, k)
    assert all(len(set(row)) == k for row in columns.tolist())
    found = x.gather(1, columns).sort(dim=1, descending=True).values
    torch.testing.assert_close(found, x.topk(k, dim=1).values, rtol=0, atol=0, equal_nan=True)


def test_of_no_rows_there_are_none() -> None:
    assert largest_of_rows(torch.zeros(0, 256, device=DEVICE), 3).shape == (0, 3)
