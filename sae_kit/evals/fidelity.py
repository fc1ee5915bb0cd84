"""What a model loses when its activations are replaced by their reconstructions.

Three forwards are compared at the eligible positions: clean, ablated, and with the SAE spliced in.

| group / key | definition |
|---|---|
| model_performance_preservation / ce_loss_without_sae, ce_loss_with_sae, ce_loss_with_ablation | mean −log p(next id) |
| / ce_loss_score | (CE_abl − CE_sae) / (CE_abl − CE_clean): 1 = as good as the model, 0 = as bad as the ablation |
| model_behavior_preservation / kl_div_with_sae, kl_div_with_ablation | mean KL(p_clean ‖ p_patched) |
| / kl_div_score | (KL_abl − KL_sae) / KL_abl |
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_kit.evals.family import Family, Metrics, family, ratio
from sae_kit.evals.moments import Sums

POSITIONS_PER_CHUNK = 1_024  # of logits in float32
NO_DIFFERENCE = 1e-6  # nats; an ablation that costs no more gives no scale to score on


@dataclass(frozen=True)
class FidelityStep:
    """Sums over some rows, of one SAE; those of the clean and the ablated forward may be shared with others."""

    ce_positions: int
    kl_positions: int
    ce_clean: Float[Tensor, ""]
    ce_ablated: Float[Tensor, ""]
    ce_spliced: Float[Tensor, ""]
    kl_ablated: Float[Tensor, ""]
    kl_spliced: Float[Tensor, ""]


@family("fidelity")
class Fidelity(Family[FidelityStep]):
    """The table above; scores are quotients of means, not means of quotients."""

    reads = "logits"

    def __init__(self, d_out: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        super().__init__(d_out, d_sae, device)
        self.ce_positions = self.kl_positions = 0
        sums = [f.name for f in fields(FidelityStep) if not f.name.endswith("positions")]
        self.sums = Sums(*sums, device=device)

    def update(self, step: FidelityStep) -> None:
        self.ce_positions += step.ce_positions
        self.kl_positions += step.kl_positions
        self.sums.add(**{name: getattr(step, name).to(self.device) for name in self.sums.names})

    def merge(self, other: "Fidelity") -> None:
        self.ce_positions += other.ce_positions
        self.kl_positions += other.kl_positions
        self.sums.merge(other.sums)

    def compute(self) -> Metrics:
        s, n, m = self.sums.totals(), self.ce_positions, self.kl_positions
        ce_gap, kl_gap = s["ce_ablated"] - s["ce_clean"], s["kl_ablated"]
        return {
            "model_performance_preservation": {
                "ce_loss_without_sae": ratio(s["ce_clean"], n),
                "ce_loss_with_sae": ratio(s["ce_spliced"], n),
                "ce_loss_with_ablation": ratio(s["ce_ablated"], n),
                "ce_loss_score": ratio(s["ce_ablated"] - s["ce_spliced"], ce_gap, NO_DIFFERENCE * n),
            },
            "model_behavior_preservation": {
                "kl_div_with_sae": ratio(s["kl_spliced"], m),
                "kl_div_with_ablation": ratio(s["kl_ablated"], m),
                "kl_div_score": ratio(s["kl_ablated"] - s["kl_spliced"], kl_gap, NO_DIFFERENCE * m),
            },
        }


class Positions:
    """The eligible positions of some rows, known on the CPU so that the device need not wait for their number.

    `index` are their places in `rows.flatten()`, ascending.
    """

    def __init__(
        self,
        rows: Int[Tensor, "rows context"],
        index: Int[Tensor, " eligible"],
        device: torch.device | str = "cpu",
    ) -> None:
        rows, index = rows.cpu(), index.cpu()
        self._rows, self._device = rows, device
        mask = torch.zeros(rows.shape, dtype=torch.bool)
        mask.view(-1)[index] = True
        has_target = torch.ones_like(mask)
        has_target[:, -1] = False
        targets = rows.roll(-1, dims=1).long()  # what it gives for the last position is not used
        self.number, self.n_targets = len(index), int((mask & has_target).sum())
        self.mask: Bool[Tensor, "rows context"] = mask.to(device)
        self.index: Int[Tensor, " eligible"] = index.to(device)
        self._targets: Int[Tensor, " eligible"] = targets.flatten()[index].to(device)
        self._has_target: Bool[Tensor, " eligible"] = has_target.flatten()[index].to(device)

    def only(self, which: Int[Tensor, " fewer"]) -> "Positions":
        """Those of the eligible positions that stand at `which` among them."""
        return Positions(self._rows, self.index[which.to(self.index.device)], self._device)

    def select(self, values: Float[Tensor, "... width"]) -> Float[Tensor, "eligible width"]:
        """The rows of eligible positions, copied."""
        return values.reshape(-1, values.shape[-1]).index_select(0, self.index.to(values.device))

    @torch.no_grad()
    def losses(
        self, logits: Float[Tensor, "rows context vocabulary"], clean: Float[Tensor, "rows context vocabulary"] | None
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Σ −log p(next id) and, against `clean`, Σ KL(p_clean ‖ p), in chunks and in float32 or wider."""
        ce = torch.zeros((), dtype=torch.float64, device=logits.device)
        kl = torch.zeros((), dtype=torch.float64, device=logits.device)
        chunks = zip(
            *(t.split(POSITIONS_PER_CHUNK) for t in (self.index, self._targets, self._has_target)), strict=True
        )
        for index, targets, has_target in chunks:
            log_q = log_probabilities(logits, index)
            losses = log_q.gather(1, targets[:, None]).squeeze(1).neg()
            ce += torch.where(has_target, losses, 0).sum(dtype=torch.float64)
            if clean is not None:
                log_p = log_probabilities(clean, index)
                terms = torch.where(log_p.isinf(), 0, log_p.exp() * (log_p - log_q))
                kl += terms.sum(1).sum(dtype=torch.float64)
        return ce, kl


def log_probabilities(
    logits: Float[Tensor, "rows context vocabulary"], index: Int[Tensor, " chunk"]
) -> Float[Tensor, "chunk vocabulary"]:
    rows = logits.reshape(-1, logits.shape[-1]).index_select(0, index.to(logits.device))
    return rows.to(torch.promote_types(rows.dtype, torch.float32)).log_softmax(-1)
