"""The GPU kernels held to dense products: on the GPU where there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton has wheels for Linux alone")
from sae_kit.ops.triton_sums import BLOCK_E, MAX_BLOCK_D, gather_dot, gather_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest result. Sums are at least float32, so the narrow types lose no more than the rounding of the result:
# half of the last bit, where the interpreter does not cut off what bfloat16 has no room for.
CUT_OFF = 1 if DEVICE == "cuda" else 2
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: CUT_OFF * 2**-8, torch.float16: 2**-11}
SHAPES: dict[str, tuple[list[int], int, int]] = {  # entries of each bag, rows, columns
    "uneven": ([3, 0, 1, 40, 0, 17], 23, 48),
    "empty ends": ([0, 0, 5, 0], 4, 16),
    "no entries": ([0, 0, 0], 5, 16),
    "no bags": ([], 5, 16),
    "one bag": ([9], 7, 32),
    "whole tiles": ([BLOCK_E, 2 * BLOCK_E], 7, MAX_BLOCK_D),
    "d = 1": ([2, 4], 5, 1),
    "odd d": ([2, 4, 0, 1], 5, 77),
    "two blocks": ([2, 20, 0, 1], 5, 2 * MAX_BLOCK_D),
    "blocks and a rest": ([2, 20, 0, 1], 5, 2 * MAX_BLOCK_D + 3),
    "very many entries": ([1, 2500, 2], 300, 20),
    "one row": ([3, 30], 1, 24),
}


class Problem(NamedTuple):
    """Arguments of both functions; `indices` may repeat in a bag."""

    values: Tensor
    indices: Tensor
    offsets: Tensor
    rows: Tensor
    left: Tensor

    def sums(self) -> Tensor:
        return gather_sum(self.values, self.indices, self.offsets, self.rows)

    def products(self) -> Tensor:
        return gather_dot(self.left, self.indices, self.offsets, self.rows)

    def bag(self) -> Tensor:
        return torch.arange(len(self.left), device=DEVICE).repeat_interleave(self.offsets.diff())

    def dense_sums(self) -> Tensor:
        codes = torch.zeros(len(self.left), len(self.rows), dtype=torch.float64, device=DEVICE)
        codes.index_put_((self.bag(), self.indices), self.values.double(), accumulate=True)
        return codes @ self.rows.double()

    def dense_products(self) -> Tensor:
        return (self.left.double() @ self.rows.double().T)[self.bag(), self.indices]


def problem(lengths: list[int], n: int, d: int, dtype: torch.dtype = torch.float32) -> Problem:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    indices = torch.randint(n, (sum(lengths),), generator=generator).to(DEVICE)
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    return Problem(draw(sum(lengths)), indices, offsets, draw(n, d), draw(len(lengths), d))


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCES[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_dense(shape: str, dtype: torch.dtype) -> None:
    drawn = problem(*SHAPES[shape], dtype)
    close(drawn.sums(), drawn.dense_sums(), dtype)
    close(drawn.products(), drawn.dense_products(), dtype)


def test_wide_values_and_left_with_narrow_rows() -> None:
    """Nothing is rounded before it is summed, and results have the types of `rows` and of `left`."""
    drawn = problem([3, 0, 40], 9, 33, torch.float32)
    mixed = drawn._replace(rows=drawn.rows.bfloat16())
    close(mixed.sums(), mixed.dense_sums(), torch.bfloat16)
    close(mixed.products(), mixed.dense_products(), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_small_terms_are_not_lost(dtype: torch.dtype) -> None:
    """4097 ones: where the sum were narrow, it would stop at 256 or 2048."""
    many = 4097
    zeros = torch.zeros(many, dtype=torch.int64, device=DEVICE)
    ends = torch.tensor([0, many], device=DEVICE)
    ones = torch.ones(1, many, dtype=dtype, device=DEVICE)
    expected = torch.tensor(float(many)).to(dtype).item()
    assert gather_sum(ones[0], zeros, ends, ones[:, :1]).item() == expected
    assert gather_dot(ones, zeros[:1], ends.clamp(max=1), ones).item() == expected


def test_strided() -> None:
    """Slices of wider matrices are read where they are; columns that do not lie side by side are read as well."""
    drawn = problem([3, 0, 20], 9, 50)
    expected = drawn._replace(rows=drawn.rows[:, 5:38], left=drawn.left[:, 5:38])
    columns = drawn._replace(rows=drawn.rows.T.contiguous().T[:, 5:38], left=drawn.left.T.contiguous().T[:, 5:38])
    every_other = drawn._replace(rows=drawn.rows[::2], indices=drawn.indices // 2)
    same = drawn._replace(rows=drawn.rows[:1].expand(9, -1), left=drawn.left[:1].expand(3, -1))
    for strided in (expected, columns, every_other, same):
        close(strided.sums(), strided.dense_sums(), torch.float32)
        close(strided.products(), strided.dense_products(), torch.float32)
    values, indices = (torch.stack([part, part], 1)[:, 0] for part in (drawn.values, drawn.indices))
    entries = drawn._replace(values=values, indices=indices)
    close(entries.sums(), drawn.dense_sums(), torch.float32)
    close(entries.products(), drawn.dense_products(), torch.float32)


def test_addresses_beyond_2_to_31() -> None:
    """Rows 2^30 elements apart, in memory of which only these rows are ever touched."""
    drawn = problem([2, 0, 3], 3, 16, torch.bfloat16)
    apart = [torch.empty(2**31 + 16, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 16), (2**30, 1)) for _ in "rl"]
    far = drawn._replace(rows=apart[0].copy_(drawn.rows), left=apart[1].copy_(drawn.left))
    assert far.sums().equal(drawn.sums())
    assert far.products().equal(drawn.products())


def test_what_lies_in_no_bag_is_not_read() -> None:
    drawn = problem([3, 2], 6, 16)
    more = torch.full((4,), 10**12, device=DEVICE)
    nan = drawn.values.new_full((4,), torch.nan)
    longer = drawn._replace(indices=torch.cat([drawn.indices, more]), values=torch.cat([drawn.values, nan]))
    assert longer.sums().equal(drawn.sums())
    assert longer.products().equal(torch.cat([drawn.products(), torch.zeros(4, device=DEVICE)]))


def test_rows_that_are_not_asked_for_do_not_matter() -> None:
    """Row 0 fills up tiles, with nothing: not even NaN comes through."""
    drawn = problem([3, 0, 2], 6, 16)
    drawn = drawn._replace(indices=drawn.indices.clamp(min=1))
    expected = drawn.sums(), drawn.products()
    drawn.rows[0] = torch.nan
    assert drawn.sums().equal(expected[0])
    assert drawn.products().equal(expected[1])


def test_same_bits_every_time() -> None:
    drawn = problem([40, 1000, 0, 7], 200, 64)
    assert drawn.sums().equal(drawn.sums())
    assert drawn.products().equal(drawn.products())


# What the interpreter runs the compiler may still refuse. It needs no GPU, but kernels that are not interpreted.
COMPILE = """
import torch
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sae_kit.ops import triton_sums

for dtype, name, d in (
    (torch.float64, "fp64", 768),
    (torch.float32, "fp32", 768),
    (torch.bfloat16, "bf16", 768),
    (torch.float32, "fp32", 1),
):
    shape = triton_sums._shape(torch.empty(1, d, dtype=dtype))
    options = {"num_warps": shape.pop("num_warps")}
    if d == 1:  # an argument of 1 is known to the compiler
        shape |= {"d": 1, "stride": 1, "left_stride": 1}
    for kernel in (triton_sums._sum_kernel, triton_sums._dot_kernel):
        types = dict.fromkeys(kernel.arg_names, "*" + name)
        types |= dict.fromkeys(("indices", "offsets"), "*i64") | dict.fromkeys(("d", "stride", "left_stride"), "i32")
        types |= dict.fromkeys(shape, "constexpr")
        types = {argument: types[argument] for argument in kernel.arg_names}
        known = {argument: value for argument, value in shape.items() if argument in types}
        made = compile(ASTSource(kernel, types, known), GPUTarget("cuda", 90, 32), options)
        print(len(made.asm["cubin"]))
"""


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=250
    )
    assert child.returncode == 0, child.stderr
    assert len(child.stdout.split()) == 8
