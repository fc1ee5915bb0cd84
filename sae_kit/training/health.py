"""Steps that are skipped because their loss or a gradient is not finite."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.data.batch import State


class Health:
    """Counts the steps that are skipped; the host reads it where a row is logged, and nowhere else."""

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self.skipped: Int[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)
        """steps so far"""
        self.in_a_row: Int[Tensor, ""] = torch.zeros((), dtype=torch.int64, device=device)
        """the last of them, up to now"""
        self.last_loss: Float[Tensor, ""] = torch.full((), torch.nan, dtype=torch.float64, device=device)
        """the last one that was finite"""
        self._rows: Tensor | None = None

    def observe(
        self, loss: Float[Tensor, ""], norms: list[Float[Tensor, ""]], rows: Float[Tensor, "rows ..."]
    ) -> Bool[Tensor, ""]:
        """Whether the step with this loss and these norms of gradients is to be skipped."""
        bad = ~torch.stack([loss, *(norm.double() for norm in norms)]).isfinite().all()
        self.skipped = self.skipped + bad
        self.in_a_row = torch.where(bad, self.in_a_row + 1, 0)
        self.last_loss = torch.where(bad, self.last_loss, loss)
        self._rows = rows
        return bad

    @property
    def diverged(self) -> bool:
        """Whether so many steps in a row were skipped that no more are worth trying."""
        return int(self.in_a_row) >= self.limit

    def report(self) -> str:
        """What is known of a divergence."""
        norm = (
            torch.nan if self._rows is None else torch.linalg.vector_norm(self._rows.flatten(1).double(), dim=1).max()
        )
        return (
            f"the loss or a gradient was not finite in the last {int(self.in_a_row):,} steps; the last finite loss was "
            f"{self.last_loss.item():.6g}, the largest norm of a row in the last step {norm:.6g}"
        )

    def state_dict(self) -> State:
        """Counts and the last finite loss."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row, "last_loss": self.last_loss}

    def load_state_dict(self, state: State) -> None:
        """Go on from there."""
        for name, tensor in state.items():
            setattr(self, name, tensor.to(self.skipped.device, copy=True))
