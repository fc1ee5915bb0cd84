"""The optimizer of one SAE: groups, learning rate, clipping, what holds after each step, and its state by name."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from sae_kit.data.batch import State
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE

FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")
AUTO_LR = {"adam": 2e-4, "adamw": 2e-4, "signum": 5e-3}  # Gao et al. 2024; EleutherAI's sparsify
AUTO_LR_WIDTH = 2**14  # Gao et al. 2024: the best learning rate falls with the square root of the width
ParamGroups = list[dict[str, Any]]
OptimizerFactory = Callable[[ParamGroups], torch.optim.Optimizer]
"""Makes an optimizer of parameter groups, e.g. `bitsandbytes.optim.Adam8bit`."""


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
    found_inf: Tensor | None = None


class _AdamW(_InMemoryOrder, torch.optim.AdamW):  # pyright: ignore
    found_inf: Tensor | None = None


class Momentum(torch.optim.Optimizer):
    """m ← μm + g, then p ← p − lr·m, or p ← p − lr·sign(m) (signum, arXiv 1802.04434).

    Where `found_inf` is set nothing moves, as with the fused kernels of torch.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: ParamGroups, *, lr: float, momentum: float, sign: bool) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "sign": sign})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        move = grad
        if group["momentum"]:
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            kept: Tensor = state["momentum_buffer"]
            move = torch.add(grad, kept, alpha=group["momentum"])
            kept.copy_(self._unless_bad(move, kept))
        move = self._unless_bad(move.sign() if group["sign"] else move, torch.zeros_like(move[..., :1]))
        parameter.add_(move, alpha=-group["lr"])

    def _unless_bad(self, new: Tensor, old: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf > 0, old, new)


USED_BY: Mapping[str, frozenset[str]] = {
    "betas": frozenset({"adam", "adamw"}),
    "eps": frozenset({"adam", "adamw"}),
    "amsgrad": frozenset({"adam", "adamw"}),
    "fused": frozenset({"adam", "adamw"}),
    "weight_decay": frozenset({"adamw"}),
    "momentum": frozenset({"signum", "sgd"}),
}
"""Fields that only some of the optimizers have."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer; another one can be given to the trainer as a function of parameter groups."""

    name: Literal["adam", "adamw", "signum", "sgd"] = "adam"
    """optimizer; signum moves every number by the learning rate, in the direction of its momentum"""
    lr: float | Literal["auto"] = "auto"
    """learning rate; auto = 2e-4 · sqrt(16384 / d_sae), with signum 5e-3 · sqrt(16384 / d_sae)"""
    betas: tuple[float, float] = (0.9, 0.999)
    """adam, adamw: decay of the two moments"""
    eps: float = 1e-8
    """adam, adamw: added to the root of the second moment"""
    amsgrad: bool = False
    """adam, adamw: divide by the largest second moment so far"""
    weight_decay: float = 0.0
    """adamw: decay of W_enc and W_dec; biases and thresholds have none"""
    momentum: float = 0.95
    """signum, sgd: decay of the sum of gradients"""
    fused: Literal["auto"] | bool = "auto"
    """adam, adamw: one kernel for all parameters; auto = where the device has one"""
    clip_grad_norm: float | None = 1.0
    """largest L2 norm of all gradients of an SAE together, thresholds left out; None = off"""
    ema: float | None = None
    """evaluate and save an average of the weights, with this decay over 4,096 tokens, e.g. 0.999; None = the weights"""

    def __post_init__(self) -> None:
        if self.lr != "auto" and not self.lr >= 0:
            raise ConfigError(f"lr must be at least 0 or 'auto', found {self.lr}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum)):
            raise ConfigError(f"betas and momentum must lie in [0, 1), found {self.betas} and {self.momentum}")
        if not (self.eps >= 0 and self.weight_decay >= 0):
            raise ConfigError(f"eps and weight_decay must be at least 0, found {self.eps} and {self.weight_decay}")
        for field in dataclasses.fields(self):
            users = USED_BY.get(field.name)
            if users is not None and self.name not in users and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"{field.name} has no effect with {self.name!r}: leave it out, or choose "
                    f"{' or '.join(f'name={user!r}' for user in sorted(users))}"
                )
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ConfigError(f"clip_grad_norm must be positive or None, found {self.clip_grad_norm}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"ema must lie between 0 and 1, or be None, found {self.ema}")

    def build(self, sae: SAE, optimizer: OptimizerFactory | None = None) -> torch.optim.Optimizer:
        """The optimizer of `sae`, or what `optimizer` makes of its groups: matrices, biases and thresholds.

        Every group remembers its full learning rate as `base_lr`.

        Raises:
            ConfigError: no learning rate, for an optimizer that has no rule for it.
        """
        groups = self._groups(sae)
        if optimizer is not None:
            built = optimizer(groups)
        elif self.name in ("signum", "sgd"):
            built = Momentum(groups, lr=groups[0]["lr"], momentum=self.momentum, sign=self.name == "signum")
        else:
            optimizer_class = _AdamW if self.name == "adamw" else _Adam
            fused = sae.device.type in FUSED_DEVICES if self.fused == "auto" else self.fused
            built = optimizer_class(groups, betas=self.betas, eps=self.eps, amsgrad=self.amsgrad, fused=fused)
        for group in built.param_groups:
            group["base_lr"] = group["lr"]
        return built

    def _groups(self, sae: SAE) -> ParamGroups:
        lr = self._lr(sae)
        threshold_factor = getattr(sae.cfg, "threshold_lr_factor", 1.0)
        kinds: dict[str, list[Tensor]] = {"matrices": [], "biases": [], "thresholds": []}
        per_site = (sae.latent_shape, sae.geometry.out_shape)  # of several sites a bias has two axes
        for name, parameter in sae.named_parameters():
            bias = parameter.ndim == 1 or tuple(parameter.shape) in per_site
            kinds["thresholds" if name in sae.threshold_names else "biases" if bias else "matrices"].append(parameter)
        groups: ParamGroups = [
            {"params": kinds["matrices"], "lr": lr, "weight_decay": self.weight_decay},
            {"params": kinds["biases"], "lr": lr, "weight_decay": 0.0},
            {"params": kinds["thresholds"], "lr": lr * threshold_factor, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def _lr(self, sae: SAE) -> float:
        if self.lr != "auto":
            return float(self.lr)
        if self.name not in AUTO_LR:
            raise ConfigError(f"optim.lr: there is no rule for the learning rate of {self.name!r}: give a number")
        return AUTO_LR[self.name] * (AUTO_LR_WIDTH / sae.d_sae) ** 0.5


def step_unless(optimizer: torch.optim.Optimizer, bad: Bool[Tensor, ""]) -> None:
    """One step; where `bad`, parameters, moments and their count of steps stay as they are.

    Our own optimizers skip it on the device. For any other the host waits for the answer.
    """
    skips = isinstance(optimizer, Momentum) or (
        isinstance(optimizer, _InMemoryOrder) and optimizer.defaults.get("fused")
    )
    if skips:
        optimizer.found_inf = bad.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
    elif not bad:
        optimizer.step()


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


def optimizer_state(optimizer: torch.optim.Optimizer, sae: SAE) -> State:
    """What the optimizer knows of each parameter, by the parameter's name."""
    return {name: dict(optimizer.state[p]) for name, p in sae.named_parameters() if p in optimizer.state}


def load_optimizer_state(optimizer: torch.optim.Optimizer, sae: SAE, state: State) -> None:
    """The inverse; learning rates and the other settings of groups stay those of the optimizer.

    Raises:
        ConfigError: a state of other parameters.
    """
    parameters = dict(sae.named_parameters())
    if unknown := sorted(state.keys() - parameters.keys()):
        raise ConfigError(f"the state is of another SAE: it holds {', '.join(unknown)}, found {', '.join(parameters)}")
    groups = optimizer.state_dict()["param_groups"]
    numbers = {
        parameter: number
        for group, own in zip(groups, optimizer.param_groups, strict=True)
        for number, parameter in zip(group["params"], own["params"], strict=True)
    }
    kept = {
        numbers[parameters[name]]: {key: _laid_out(value, parameters[name]) for key, value in values.items()}
        for name, values in state.items()
    }
    optimizer.load_state_dict({"state": kept, "param_groups": groups})


def _laid_out(value: Any, parameter: Tensor) -> Any:
    """A copy; of what is shaped like the parameter, in the order in which that lies in memory."""
    if not isinstance(value, Tensor):
        return value
    return (
        torch.empty_like(parameter, dtype=value.dtype).copy_(value) if value.shape == parameter.shape else value.clone()
    )
