"""How activations are stored: as they are, in half the bytes, or as 8-bit integers with scales.

An int8 row is cut into groups of 128 columns, each with a float32 scale of its own: the largest magnitude of the group
becomes 127. So an outlier costs precision only to the 127 numbers beside it, not to its row or its column.
"""

from typing import Literal

import torch
from jaxtyping import Float, Int8, Shaped
from torch import Tensor

from sae_kit.errors import DataError

StoredDtype = Literal["float32", "bf16", "fp16", "int8"]
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
GROUP = 128
"""columns that share a scale; the last group of a row is shorter where the width is no multiple"""
LARGEST_FP16 = 65_504.0
LARGEST_INT8 = 127
NUMBERS_AT_A_TIME = 2**18
"""of the result, while scales are applied: what stays in the cache of a processor between two passes"""


def scales_per_row(width: int) -> int:
    return -(-width // GROUP)


def bytes_per_row(width: int, dtype: StoredDtype) -> int:
    """Bytes of one activation and its scales."""
    return width * DTYPES[dtype].itemsize + (4 * scales_per_row(width) if dtype == "int8" else 0)


def encode(
    rows: Float[Tensor, "rows width"], dtype: StoredDtype, site: str
) -> tuple[Shaped[Tensor, "rows width"], Float[Tensor, "rows groups"] | None]:
    """Rows as they are stored, in memory of their own, with the scales of int8; `site` is named in errors.

    Raises:
        DataError: float16 cannot hold some values, or int8 is asked of rows that are not finite.
    """
    if dtype == "int8":
        return _to_int8(rows, site)
    if dtype == "fp16" and (number := int((rows.abs() > LARGEST_FP16).sum())):
        raise DataError(
            f"{number:,} values of a forward at {site!r} are beyond 65,504, the largest float16. "
            "Store bf16, int8 or float32"
        )
    return rows.to(DTYPES[dtype], copy=True), None


def decode(
    values: Shaped[Tensor, "rows width"],
    scales: Float[Tensor, "rows groups"] | None,
    out: Float[Tensor, "rows width"],
) -> Float[Tensor, "rows width"]:
    """Write the rows into `out`, in its precision; it is returned."""
    if scales is None:
        return out.copy_(values)
    width = values.shape[1]
    whole = width // GROUP * GROUP
    step = max(1, NUMBERS_AT_A_TIME // width)
    for start in range(0, len(out), step):
        part, scale = out[start : start + step], scales[start : start + step]
        part.copy_(values[start : start + step])
        if whole:
            part[:, :whole].unflatten(1, (-1, GROUP)).mul_(scale[:, : whole // GROUP, None])
        if whole < width:
            part[:, whole:].mul_(scale[:, -1:])
    return out


def _to_int8(
    rows: Float[Tensor, "rows width"], site: str
) -> tuple[Int8[Tensor, "rows width"], Float[Tensor, "rows groups"]]:
    width = rows.shape[1]
    padded = torch.nn.functional.pad(rows.float(), (0, -width % GROUP)).unflatten(1, (-1, GROUP))
    scales = padded.abs().amax(-1) / LARGEST_INT8
    if not scales.isfinite().all():
        raise DataError(
            f"{int((~scales.isfinite()).any(1).sum()):,} of {len(rows):,} rows at {site!r} hold values that are not "
            "finite: int8 has none. Leave such rows out, or store float32"
        )
    # A group of zeros has the scale 0; dividing by 1 instead keeps its zeros.
    steps = padded / torch.where(scales > 0, scales, 1.0)[..., None]
    return steps.round_().clamp_(-LARGEST_INT8, LARGEST_INT8).to(torch.int8).flatten(1)[:, :width], scales
