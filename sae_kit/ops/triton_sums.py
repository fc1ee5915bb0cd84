"""`gather_sum` and `gather_dot` of `sums.py` as Triton kernels for CUDA. Importing this needs triton.

A sum is one program per bag and block of columns, a product one program per bag. Either goes through its bag in tiles
of BLOCK_E entries × BLOCK_D columns: the loads of a tile wait for one load of indices and not for each other. A
program alone writes what it sums, always in the same order, so results are the same bits in every run. Sums are in
float32, or in float64 where `rows` are.

Cost: both read entries · d elements of `rows`, more than everything else together; gather_sum writes bags · d. Programs
start bag by bag, block of columns after block of columns: rows that several bags share come from the L2 cache
where n · BLOCK_D elements fit in it.

Not taken: a program for a fixed number of entries, which makes bags of thousands of entries no slower than others, but
adds up what several programs found, by atomics (the order then varies) or in a second pass. A bag here is only as
fast as its program, 1 of the hundreds that run side by side.
"""

# pyright: basic
# (triton has no types)

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_E = 16
MAX_BLOCK_D = 256


# `no_type_check`: the bodies are Triton's own language, and a function wrapped by a type checker is not that any more.
@triton.jit
@no_type_check
def _sum_kernel(
    out, values, indices, offsets, rows, d, stride, wide: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    bag = tl.program_id(0).to(tl.int64)  # bag · d, like index · stride, may be more than 2^31
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < d
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    total = tl.zeros([BLOCK_E, BLOCK_D], wide)
    for start in range(first, last, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        exists = entries < last
        index = tl.load(indices + entries, mask=exists, other=0)
        value = tl.load(values + entries, mask=exists, other=0).to(wide)
        address = rows + index[:, None] * stride + columns[None, :]
        tile = tl.load(address, mask=exists[:, None] & inside[None, :], other=0).to(wide)
        total += value[:, None] * tile
    tl.store(out + bag * d + columns, tl.sum(total, 0), mask=inside)


@triton.jit
@no_type_check
def _dot_kernel(
    out,
    left,
    indices,
    offsets,
    rows,
    d,
    left_stride,
    stride,
    wide: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    for start in range(first, last, BLOCK_E):
        entries = start + tl.arange(0, BLOCK_E)
        exists = entries < last
        index = tl.load(indices + entries, mask=exists, other=0)
        total = tl.zeros([BLOCK_E, BLOCK_D], wide)
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = columns < d
            ours = tl.load(left + bag * left_stride + columns, mask=inside, other=0).to(wide)
            address = rows + index[:, None] * stride + columns[None, :]
            tile = tl.load(address, mask=exists[:, None] & inside[None, :], other=0).to(wide)
            total += ours[None, :] * tile
        tl.store(out + entries, tl.sum(total, 1), mask=exists)


def gather_sum(
    values: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_1"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, "bags d"]:
    """Σ over the entries e of each bag of values[e] · rows[indices[e]]; an empty bag gives 0."""
    values, indices, offsets, rows = values.contiguous(), indices.contiguous(), offsets.contiguous(), _readable(rows)
    bags, d = len(offsets) - 1, rows.shape[1]
    out = rows.new_empty(bags, d)
    shape = _shape(rows)
    grid = (bags, triton.cdiv(d, shape["BLOCK_D"]))
    if out.numel() == 0:  # CUDA has no empty grids
        return out
    with torch.cuda.device(rows.get_device()):  # Triton takes the current device
        _sum_kernel[grid](out, values, indices, offsets, rows, d, rows.stride(0), **shape)
    return out


def gather_dot(
    left: Float[Tensor, "bags d"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_plus_1"],
    rows: Float[Tensor, "n d"],
) -> Float[Tensor, " entries"]:
    """⟨left[bag of e], rows[indices[e]]⟩ for every entry e; 0 for what lies in no bag."""
    left, indices, offsets, rows = _readable(left), indices.contiguous(), offsets.contiguous(), _readable(rows)
    out = left.new_zeros(len(indices))
    if out.numel() == 0 or len(left) == 0:
        return out
    with torch.cuda.device(rows.get_device()):
        _dot_kernel[len(left),](
            out, left, indices, offsets, rows, rows.shape[1], left.stride(0), rows.stride(0), **_shape(rows)
        )
    return out


def _readable(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """The kernels step from row to row, and by 1 in a row."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _shape(rows: Float[Tensor, "n d"]) -> dict[str, object]:
    """Tiles and warps: 32 elements a thread, which keeps enough loads under way and spills no registers."""
    block_d = min(MAX_BLOCK_D, max(16, triton.next_power_of_2(rows.shape[1])))
    wide = tl.float64 if rows.dtype == torch.float64 else tl.float32
    return {
        "wide": wide,
        "BLOCK_E": BLOCK_E,
        "BLOCK_D": block_d,
        "num_warps": max(1, BLOCK_E * block_d // 1024),
    }
