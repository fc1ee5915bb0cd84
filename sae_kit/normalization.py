"""Normalisation of activations as state of the SAE: statistics are buffers, `encode` and `decode` apply them.

Losses live in the normalised ("training") space; users and models only ever see raw activations.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae_kit.errors import DataError

NormalizationMode = Literal["none", "expected_average_only_in"]


class Normalization(nn.Module):
    """`x = scale · u` and back; the scale is estimated once, from the first rows that training sees.

    expected_average_only_in: scale = √d / E‖u‖, which gives rows of mean norm √d whatever the model's units.
    """

    scale: Float[Tensor, ""]
    rows: Int[Tensor, ""]

    def __init__(self, mode: NormalizationMode, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.mode: NormalizationMode = mode
        self.width = width
        if mode != "none":
            self.register_buffer("scale", torch.ones((), dtype=dtype))
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, u: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Raw activations to training space."""
        return u if self.mode == "none" else u * self.scale  # a scalar: the dtype stays that of u

    def inverse(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Training space to raw activations."""
        return x if self.mode == "none" else x / self.scale

    @property
    def needs_estimate(self) -> bool:
        """Whether the statistics are still those of no data at all."""
        return self.mode != "none" and self.rows.item() == 0

    @torch.no_grad()
    def estimate(self, rows: Float[Tensor, "rows width"], chunk: int = 65_536) -> None:
        """Set the statistics from a sample of raw rows; sums run in float64.

        Raises:
            DataError: there are no rows.
        """
        if self.mode == "none":
            return
        if len(rows) == 0:
            raise DataError("cannot estimate the scale of activations from an empty batch")
        total = sum(
            torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).sum().item() for part in rows.split(chunk)
        )
        mean_norm = total / len(rows)
        self.scale.fill_(math.sqrt(self.width) / max(mean_norm, 1e-12))
        self.rows.fill_(len(rows))
