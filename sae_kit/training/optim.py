"""The optimizer of one SAE: groups, learning rate, clipping, and what holds after each step."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sae_kit.errors import ConfigError
from sae_kit.sae import SAE

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
AUTO_LR, AUTO_LR_WIDTH = 2e-4, 2**14  # Gao et al. 2024: the best learning rate falls with the square root of the width


class _InMemoryOrder:
    """Shows an optimizer every tensor in the order in which its parameter lies in memory.

    The encoder lies there latent by latent, and the fused kernels take what is not contiguous slowly, or wrongly where
    a gradient lies in another order.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        found: Any = super()._init_group(group, *lists)  # pyright: ignore
        parameters, gradients, *moments = lists
        for tensors in moments:
            tensors[:] = [self._as_the_parameter_lies(p, t) for p, t in zip(parameters, tensors, strict=False)]
        orders = [sorted(range(p.ndim), key=lambda axis, p=p: -p.stride(axis)) for p in parameters]
        for tensors in lists:  # the others are moments, and scalars
            tensors[:] = [t.permute(order) if t.ndim else t for t, order in zip(tensors, orders, strict=False)]
        gradients[:] = [grad.contiguous() for grad in gradients]
        return found  # pyright: ignore

    def _as_the_parameter_lies(self, parameter: Tensor, moment: Tensor) -> Tensor:
        """A moment from a file lies in the order of its shape: it is laid out anew, once."""
        if not moment.ndim or moment.stride() == parameter.stride():
            return moment
        state: dict[str, Tensor] = self.state[parameter]  # pyright: ignore
        name = next(key for key in state if state[key] is moment)  # pyright: ignore
        state[name] = torch.empty_like(parameter).copy_(moment)
        return state[name]  # pyright: ignore


class _Adam(_InMemoryOrder, torch.optim.Adam):  # pyright: ignore
    pass


class _AdamW(_InMemoryOrder, torch.optim.AdamW):  # pyright: ignore
    pass


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam, with the weight decay of AdamW if asked."""

    name: Literal["adam", "adamw"] = "adam"
    """optimizer"""
    lr: float | Literal["auto"] = "auto"
    """learning rate; auto = 2e-4 · sqrt(16384 / d_sae)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of the two moments"""
    eps: float = 1e-8
    """added to the root of the second moment"""
    weight_decay: float = 0.0
    """adamw: decay of W_enc and W_dec; biases and thresholds have none"""
    clip_grad_norm: float | None = 1.0
    """largest L2 norm of all gradients of an SAE together, thresholds left out; None = off"""

    def __post_init__(self) -> None:
        if self.lr != "auto" and not self.lr >= 0:
            raise ConfigError(f"lr must be at least 0 or 'auto', found {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas must lie in [0, 1), found {self.betas}")
        if not (self.eps >= 0 and self.weight_decay >= 0):
            raise ConfigError(f"eps and weight_decay must be at least 0, found {self.eps} and {self.weight_decay}")
        if self.weight_decay and self.name != "adamw":
            raise ConfigError(f"weight_decay has no effect with {self.name!r}: choose name='adamw'")
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ConfigError(f"clip_grad_norm must be positive or None, found {self.clip_grad_norm}")

    def build(self, sae: SAE) -> torch.optim.Optimizer:
        """The optimizer of `sae`, one group each for matrices, biases and thresholds.

        Every group remembers its full learning rate as `base_lr`.
        """
        lr = AUTO_LR * (AUTO_LR_WIDTH / sae.d_sae) ** 0.5 if self.lr == "auto" else float(self.lr)
        threshold_factor = getattr(sae.cfg, "threshold_lr_factor", 1.0)
        kinds: dict[str, list[Tensor]] = {"matrices": [], "biases": [], "thresholds": []}
        per_site = (sae.latent_shape, sae.geometry.out_shape)  # of several sites a bias has two axes
        for name, parameter in sae.named_parameters():
            bias = parameter.ndim == 1 or tuple(parameter.shape) in per_site
            kinds["thresholds" if name in sae.threshold_names else "biases" if bias else "matrices"].append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": kinds["matrices"], "lr": lr, "weight_decay": self.weight_decay},
            {"params": kinds["biases"], "lr": lr, "weight_decay": 0.0},
            {"params": kinds["thresholds"], "lr": lr * threshold_factor, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer_class = _AdamW if self.name == "adamw" else _Adam
        fused = sae.device.type in FUSED_DEVICES
        optimizer = optimizer_class(groups, lr=lr, betas=self.betas, eps=self.eps, fused=fused)
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
        return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Give every group its full rate times `factor`; returns the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def clipped_parameters(sae: SAE) -> list[Tensor]:
    """What the gradient norm is taken over: all parameters but thresholds, whose slope 1/bandwidth would dominate."""
    return [parameter for name, parameter in sae.named_parameters() if name not in sae.threshold_names]


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients by min(1, limit / norm) with their true common L2 norm, which is returned (before clipping)."""
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


@torch.no_grad()
def project_decoder_gradient(sae: SAE) -> None:
    """Decoder rows of constant norm: remove the part of the gradient that would change it, which is undone anyway."""
    if sae.cfg.decoder_norm_constraint != "unit":
        return
    for layer in range(sae.geometry.layers):
        block = sae.W_dec[layer] if sae.geometry.cross_layer else sae.W_dec
        if block.grad is not None:
            normals = sae.geometry.normals(block.flatten(1))
            gradient = block.grad.flatten(1)
            gradient -= (gradient * normals).sum(dim=1, keepdim=True) * normals
