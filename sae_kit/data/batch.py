"""What the trainer sees of data."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Rows to train on: `x` [batch, *in_shape] is read, `y` [batch, *out_shape] is to be reproduced.

    For an SAE both are the same tensor.
    """

    x: Float[Tensor, "batch ..."]
    y: Float[Tensor, "batch ..."]
