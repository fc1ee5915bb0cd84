"""Sparse codes and the few hot operations on them."""

from sae_kit.ops.codes import (
    Codes,
    SparseCodes,
    decode,
    firing_counts,
    l0,
    latent_means,
    of_latents,
    row_sums,
    scale,
    to_dense,
    values_of,
    widen,
    with_values,
)
from sae_kit.ops.layout import Layout
from sae_kit.ops.selection import Largest, largest, largest_of_rows
from sae_kit.ops.sums import encode

__all__ = [
    "Codes",
    "Largest",
    "Layout",
    "SparseCodes",
    "decode",
    "encode",
    "firing_counts",
    "l0",
    "largest",
    "largest_of_rows",
    "latent_means",
    "of_latents",
    "row_sums",
    "scale",
    "to_dense",
    "values_of",
    "widen",
    "with_values",
]
