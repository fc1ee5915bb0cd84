"""SAEs in the state in which their training step is measured.

Rows are standard normal. Architectures with a k have it; standard, JumpReLU and gated SAEs have their biases or
thresholds where 60 latents of a row are on. The learning rate is 0, so that they stay there while the step does all its
work. `topk+auxk` is topk with a tenth of the latents dead.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from sae_kit import RunConfig, list_architectures
from sae_kit.data.batch import Batch
from sae_kit.registry import get_architecture
from sae_kit.sae import SAE
from sae_kit.seeding import generator
from sae_kit.training.part import SAEInTraining

L0 = 60
"""latents that are on in a row of an SAE that has thresholds"""
BANDWIDTH = 0.02
"""of a JumpReLU's estimates, relative to its threshold: few entries should lie in the window"""
SILENT_TOKENS = 10**8
"""for how long the dead have been silent: longer than any `dead_after_tokens`"""
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


def names() -> list[str]:
    """All cases: the architectures that can be trained, and TopK with dead latents."""
    return [*(name for name, found in list_architectures().items() if found.sae.trainable), "topk+auxk"]


def normal_rows(batch: int, d_in: int, like: Tensor) -> Tensor:
    """The rows of every case, in the dtype and on the device of `like`."""
    return torch.randn(batch, d_in, generator=generator(0, "benchmark")).to(like)


class Case:
    """One SAE, its rows and its optimizer."""

    def __init__(self, name: str, d_sae: int, x: Tensor, k: int, **train: Any) -> None:
        """`train` are fields of that section of a run."""
        self.name, self.k = name, k
        self.batch, self.tokens = Batch(x, x), 0
        architecture, _, variant = name.partition("+")
        sae = build(architecture, d_sae, x, k)
        self.dead = kill_a_tenth(sae) if variant == "auxk" else 0
        section = {"batch_tokens": len(x), "device": str(x.device), **train}
        cfg = RunConfig.from_dict({"tokens": 10**9, "train": section, "optim": {"lr": 0.0}})
        self.part = SAEInTraining(cfg, name, sae)

    def step(self) -> None:
        """One whole training step."""
        self.part.step(self.batch, self.tokens, 1.0)
        self.tokens += len(self.batch.x)

    def l0(self) -> float:
        """Mean L0 of all steps so far; and the case is what it says.

        Raises:
            RuntimeError: not as many dead latents, or no AuxK where there should be one.
        """
        found = self.part.metrics.take()
        aux = found.get("losses/auxiliary_reconstruction_loss", 0.0)
        if found["sparsity/dead_features"] != self.dead or (self.dead and not aux > 0):
            raise RuntimeError(f"{self.name}: expected AuxK on {self.dead} dead latents, found {found}")
        return float(found["metrics/l0"])


def build(architecture: str, d_sae: int, x: Tensor, k: int) -> SAE:
    """A fresh SAE of which k latents, or 60, are on in a row of `x`."""
    config = get_architecture(architecture).config
    own = {field.name for field in dataclasses.fields(config)}
    fields: dict[str, Any] = {"d_in": x.shape[1], "d_sae": d_sae, "device": str(x.device), "dtype": DTYPES[x.dtype]}
    fields |= {name: k for name in ("k", "max_iterations") if name in own}
    sae = config(**fields).build()
    if "k" in own or "max_iterations" in own:
        return sae
    cutoff = ((x @ sae.W_enc.detach()).flatten().float().topk(min(L0, d_sae // 4) * len(x)).values[-1]).item()
    if "jumprelu_bandwidth" in own:
        fields |= {"jumprelu_init_threshold": cutoff, "jumprelu_bandwidth": BANDWIDTH * cutoff}
        return config(**fields).build()
    with torch.no_grad():
        sae.shift_preactivations(torch.full((d_sae,), -cutoff).to(x))
    return sae


@torch.no_grad()
def kill_a_tenth(sae: SAE) -> int:
    """Every tenth latent becomes too weak to be selected, not so weak that AuxK had nothing to work on."""
    sae.W_enc[:, ::10] *= 0.1
    sae.tokens_since_fired[::10] = SILENT_TOKENS
    return len(sae.tokens_since_fired[::10])
