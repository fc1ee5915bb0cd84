"""Normalisation of activations as state of the SAE: statistics are buffers, `encode` and `decode` apply them.

Losses live in the normalised ("training") space; users and models only ever see raw activations.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

NormalizationMode = Literal["none", "expected_average_only_in"]


class Normalization(nn.Module):
    """`x = scale · u` and back; the scale is estimated once, from the first rows that training sees.

    expected_average_only_in: scale = √d / E‖u‖, which gives rows of mean norm √d whatever the model's units.
    """

    scale: Float[Tensor, ""]
    rows: Int[Tensor, ""]

    def __init__(self, mode: NormalizationMode, width: int) -> None:
        super().__init__()
        self.mode: NormalizationMode = mode
        self.width = width
        if mode != "none":
            self.register_buffer("scale", torch.ones((), dtype=torch.float32))
            self.register_buffer("rows", torch.zeros((), dtype=torch.int64))

    def forward(self, u: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Raw activations to training space."""
        return u if self.mode == "none" else u * self.scale.to(u.dtype)

    def inverse(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Training space to raw activations."""
        return x if self.mode == "none" else x / self.scale.to(x.dtype)

    @property
    def needs_estimate(self) -> bool:
        """Whether the statistics are still those of no data at all."""
        return self.mode != "none" and self.rows.item() == 0

    @torch.no_grad()
    def estimate(self, rows: Float[Tensor, "rows width"], chunk: int = 65_536) -> None:
        """Set the statistics from a sample of raw rows; sums run in float64."""
        if self.mode == "none":
            return
        total = sum(
            torch.linalg.vector_norm(part, dim=1, dtype=torch.float64).sum().item() for part in rows.split(chunk)
        )
        mean_norm = total / len(rows)
        self.scale.fill_(math.sqrt(self.width) / max(mean_norm, 1e-12))
        self.rows.fill_(len(rows))
