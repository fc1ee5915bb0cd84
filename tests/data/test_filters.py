"""Each row that is dropped is dropped for the first reason that applies, and counted once."""

import pytest
import torch
from torch import Tensor

from sae_kit.data.batch import TokenBatch
from sae_kit.data.filters import MEDIAN_ROWS, RowFilter, RunningMedian
from sae_kit.errors import ConfigError, NonFiniteError


def rows(number: int, norm: float = 1.0, seed: int = 0, width: int = 8) -> Tensor:
    """Rows of norms around `norm`."""
    drawn = torch.randn(number, width, generator=torch.Generator().manual_seed(seed))
    return norm * drawn / width**0.5


def test_padding_then_special_then_slice() -> None:
    ids = torch.tensor([[0, 5, 6, 7, 8, 9], [0, 5, 0, 7, 0, 0]])
    filters = RowFilter(["a"], excluded=(0, 9), seq_slice=(1, -1, None))
    kept = filters.positions(TokenBatch(ids, torch.tensor([6, 4])))
    assert kept.tolist() == [1, 2, 3, 4, 7, 9]
    assert filters.dropped == {"pad": 2, "special": 4, "slice": 0, "nonfinite": 0, "norm": 0}
    filters = RowFilter(["a"], seq_slice=(None, None, 2))
    assert filters.positions(TokenBatch(ids)).tolist() == [0, 2, 4, 6, 8, 10]
    assert filters.dropped["slice"] == 6


def test_padding_is_known_from_lengths_alone() -> None:
    ids = torch.tensor([[3, 1, 4, 1, 1, 1]])  # 1 ends documents, and fills the row
    filters = RowFilter(["a"])
    assert filters.positions(TokenBatch(ids, torch.tensor([4]))).tolist() == [0, 1, 2, 3]


def test_sinks_are_dropped_at_any_site_and_the_first_forward_has_a_median_too() -> None:
    filters = RowFilter(["a", "b"], norm_filter=10.0)
    a, b = rows(200), rows(200, 5.0, seed=1)
    a[3] *= 400
    b[7] *= 100
    kept = filters.usable({"a": a, "b": b})
    assert kept is not None
    assert kept.tolist() == [i for i in range(200) if i not in (3, 7)]
    assert filters.dropped["norm"] == 2
    assert filters.medians == {
        "a": pytest.approx(float(a.norm(dim=1).median())),
        "b": pytest.approx(float(b.norm(dim=1).median())),
    }
    assert filters.max_ratios["a"] == pytest.approx(float(a[3].norm() / a.norm(dim=1).median()))
    assert filters.usable({"a": rows(50, seed=2), "b": rows(50, 5.0, seed=3)}) is None


def test_rows_that_are_not_finite_count_before_long_ones() -> None:
    filters = RowFilter(["a", "b"], norm_filter=10.0)
    a, b = rows(100), rows(100, seed=1)
    a[0, 2], a[1] = torch.inf, 1e4
    b[1, 0] = torch.nan
    b[2] *= 1e5
    kept = filters.usable({"a": a, "b": b})
    assert kept is not None
    assert kept.tolist() == list(range(3, 100))
    assert (filters.dropped["nonfinite"], filters.dropped["norm"]) == (2, 1)
    with pytest.raises(NonFiniteError, match=r"at a, b; try another model\.dtype"):
        filters.usable({"a": a * torch.nan, "b": b})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_a_norm_filter_long_rows_stay(dtype: torch.dtype) -> None:
    values = rows(100).to(dtype)
    values[5] *= 1000
    assert RowFilter(["a"]).usable({"a": values}) is None
    assert RowFilter(["a"], norm_filter=10.0).usable({"a": values}) is not None


def test_rows_of_zeros_are_not_long() -> None:
    filters = RowFilter(["a"], norm_filter=10.0)
    assert filters.usable({"a": torch.zeros(64, 4)}) is None


def test_where_most_rows_are_zeros_the_others_are_not_long() -> None:
    filters = RowFilter(["a"], norm_filter=10.0)
    values = torch.zeros(64, 4)
    values[:20] = rows(20, 1e3, width=4)
    assert filters.usable({"a": values}) is None
    assert filters.max_ratios == {"a": 0}


def test_the_median_runs_and_then_stays() -> None:
    median = RunningMedian()
    generator = torch.Generator().manual_seed(0)
    seen = torch.empty(0)
    while median.count < MEDIAN_ROWS:
        norms = torch.rand(10_000, generator=generator) + 1
        assert torch.equal(median.observe(norms, norms > 0), norms / torch.cat([seen, norms]).median())
        median.add(norms)
        seen = torch.cat([seen, norms])[:MEDIAN_ROWS]
        assert median.numbers[0] == seen.median()
    fixed = median.numbers[0]
    norms = torch.full((10_000,), 50.0)
    median.observe(norms, norms > 0)
    median.add(norms)
    assert median.numbers[0] == fixed
    assert median.numbers[1] == 50 / fixed


def test_the_median_is_of_finite_rows_that_passed() -> None:
    def kept(*norms: tuple[float, int]) -> int:
        values = torch.cat([torch.full((number, 1), norm) for norm, number in norms])
        found = filters.usable({"a": values})
        return len(values) if found is None else len(found)

    filters = RowFilter(["a"], norm_filter=2.0)
    assert kept((1.0, 60), (5.0, 40)) == 60
    assert kept((3.0, 50)) == 0
    assert (filters.medians, filters.dropped["norm"]) == ({"a": 1}, 90)
    filters = RowFilter(["a"], norm_filter=2.0)
    assert kept((1.0, 40), (2.5, 10), (torch.inf, 60), (torch.nan, 5)) == 40
    assert (filters.medians, filters.dropped["nonfinite"]) == ({"a": 1}, 65)


def test_too_many_long_rows_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    filters = RowFilter(["a"], norm_filter=2.0)
    for seed in range(9):
        values = rows(10_000, seed=seed)
        values[::10] *= 50
        filters.usable({"a": values})
        assert seed > 6 or not caplog.records, "said before the median is known"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "of the activations are dropped because their norm is above 2 times the median" in caplog.text


def test_a_filter_goes_on_where_its_state_was_taken() -> None:
    one, other = (RowFilter(["a"], excluded=(1,), norm_filter=3.0) for _ in range(2))
    for seed in range(4):
        values = rows(25_000, seed=seed)
        values[:50] *= 20
        one.usable({"a": values})
        other.load_state_dict(one.state_dict())
        assert (other.dropped, other.medians, other.max_ratios) == (one.dropped, one.medians, one.max_ratios)
        following = {"a": rows(500, 1.5, seed=99)}
        mine, yours = one.usable(following), other.usable(following)
        assert (mine is None and yours is None) or torch.equal(mine, yours)  # pyright: ignore[reportArgumentType]
        assert one.medians == other.medians


def test_a_multiple_below_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a multiple above 1"):
        RowFilter(["a"], norm_filter=0.5)
