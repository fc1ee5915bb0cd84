"""Trees of numbers and tensors, compared bit for bit."""

from typing import Any

import torch
from torch import Tensor


def equal(found: Any, expected: Any, where: str) -> None:
    """The same tree, bit for bit; NaN equals NaN."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, pair in enumerate(zip(found, expected, strict=True)):
            equal(*pair, f"{where}[{index}]")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=where)
    else:
        assert found == expected or (found != found and expected != expected), f"{where}: {found} {expected}"
