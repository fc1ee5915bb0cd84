"""What the trainer sees of data."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows to train on: `x` is read, `y` is to be reproduced; for an SAE both are the same tensor."""

    x: Float[Tensor, "batch d_in"]
    y: Float[Tensor, "batch d_out"]
