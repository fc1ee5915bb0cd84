"""What many tests need: every registered architecture with weights that hide no mistake."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_kit import list_architectures
from sae_kit.sae import SAE
from sae_kit.sae_config import SAEConfig

ARCHITECTURES = tuple(list_architectures())
D_IN, D_SAE = 32, 96


def make_config(name: str, **fields: Any) -> SAEConfig:
    """The default config of an architecture at the tests' size; fields that it lacks are left out."""
    cls = list_architectures()[name].config
    defaults: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE}
    if hasattr(cls, "k"):
        defaults["k"] = 8
    return cls(**{**defaults, **fields})


def make_sae(name: str, *, seed: int = 0, **fields: Any) -> SAE:
    """An SAE of non-zero parameters, unequal decoder norms, and thresholds in the range of its inputs."""
    sae = make_config(name, **fields).build(seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in sae.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(0.3 * noise if parameter.ndim == 1 else 0.15 * noise)
            if parameter_name == "threshold":
                parameter.abs_()
        sae.W_dec.mul_(torch.linspace(0.5, 2.0, sae.d_sae, dtype=sae.dtype)[:, None])
    return sae


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a mean of their own, [*shape, D_IN]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, D_IN, generator=generator) + torch.linspace(-1, 1, D_IN)).to(dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).detach())


class DemoRun(NamedTuple):
    """`sae-kit demo` as a user runs it: its folder, what it printed, and how long it took."""

    home: Path
    """where it was started; the run is in runs/demo below it"""
    output: str
    seconds: float

    @property
    def folder(self) -> Path:
        return self.home / "runs" / "demo"
