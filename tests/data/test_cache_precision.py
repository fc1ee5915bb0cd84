"""Rows come back as they were stored, as exactly as their precision allows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from harvests import RandomHarvest

from sae_kit.data.cache import write_cache
from sae_kit.data.cache.quantize import bytes_per_row, decode, encode
from sae_kit.errors import DataError


def outliers(rows: int = 2048, width: int = 768) -> torch.Tensor:
    """Rows with a few columns 20 times, and a few rows 30 times as large as the rest."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    x[:, [3, 140, 400]] *= 20
    x[::100] *= 30
    return x


@pytest.mark.parametrize("dtype", ["float32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("width", [768, 129, 128, 5])
def test_stored_rows_are_the_rows(dtype: Any, width: int) -> None:
    x = outliers()[:, :width].contiguous()
    values, scales = encode(x, dtype, "site")
    found = decode(values, scales, torch.empty_like(x))
    fvu = (found - x).square().sum() / (x - x.mean(0)).square().sum()
    assert fvu <= {"float32": 0, "fp16": 1e-6, "bf16": 1e-5, "int8": 1e-3}[dtype]
    assert (values.nbytes + (0 if scales is None else scales.nbytes)) == len(x) * bytes_per_row(width, dtype)
    ordinary = x[1:100]  # rows beside those that are 30 times as large
    assert (found[1:100] - ordinary).square().sum() <= 1e-3 * ordinary.square().sum()


def test_int8_is_exact_where_it_can_be() -> None:
    x = torch.zeros(3, 130)
    x[1, :128] = torch.arange(-64, 64) * 127 / 64
    x[1, 128:] = torch.tensor([1e-20, -1e-20])
    values, scales = encode(x, "int8", "site")
    assert scales is not None
    assert scales.shape == (3, 2)
    found = decode(values, scales, torch.empty(3, 130))
    torch.testing.assert_close(found[1, 128:], x[1, 128:])
    assert not found[[0, 2]].any()
    assert int(values.min()) == -127  # symmetric: -128 stays unused
    assert torch.equal(decode(values, scales, torch.empty(3, 130, dtype=torch.bfloat16)), found.bfloat16())


def test_float16_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    class Loud(RandomHarvest):
        def __next__(self) -> Any:
            forward = super().__next__()
            forward.rows["b"][:2, 1] = torch.tensor([65_504.0, -7e4])
            return forward

    with pytest.raises(DataError, match=r"1 values of a forward at 'b' are beyond 65,504.*bf16"):
        write_cache(Loud(), tmp_path / "half", tokens=10, dtype="fp16")
    write_cache(Loud(), tmp_path / "whole", tokens=10, dtype="int8")


def test_int8_refuses_what_is_not_finite() -> None:
    x = torch.ones(4, 130)
    x[1, 129], x[2, 0] = torch.inf, torch.nan
    with pytest.raises(DataError, match="2 of 4 rows at 'site' hold values that are not finite"):
        encode(x, "int8", "site")
