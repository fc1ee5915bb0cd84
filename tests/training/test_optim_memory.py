"""The fused optimizer works on the encoder where it lies, latent by latent."""

import copy
from typing import Any, ClassVar

import pytest
import torch
from helpers import BATCH, batch, make_sae, run_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kit.training.optim import OptimConfig
from sae_kit.training.part import SAEInTraining


class Seen(TorchDispatchMode):
    """Whether every tensor that the fused kernel was given is contiguous."""

    contiguous: ClassVar[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "fused_adam" in str(func):
            Seen.contiguous += [t.is_contiguous() for tensors in args for t in tensors if isinstance(t, Tensor)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("geometry", ["sae", "crosscoder", "clt"])
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_the_kernel_sees_contiguous_memory_and_moves_the_right_weights(name: str, geometry: str) -> None:
    sae = make_sae("topk", geometry)
    reference = copy.deepcopy(sae)
    fields: dict[str, Any] = {"name": name, "lr": 1e-2, "weight_decay": 0.1 if name == "adamw" else 0.0}
    part = SAEInTraining(run_config(optim=fields | {"clip_grad_norm": None}), "sae", sae)
    gradients: dict[str, Tensor] = {}
    for key, parameter in sae.named_parameters():
        parameter.register_hook(lambda grad, key=key: gradients.__setitem__(key, grad.clone()))
    plain = OptimConfig(**fields).build(reference)
    for group in plain.param_groups:
        group["fused"] = False
    Seen.contiguous = []
    for step in range(3):
        with Seen():
            part.step(batch(sae, BATCH, seed=step), step * BATCH, 1.0)
        for key, parameter in reference.named_parameters():
            # In another order of memory than the parameter's: shapes decide, not strides.
            parameter.grad = gradients[key].clone(memory_format=torch.contiguous_format)
        plain.step()
    assert Seen.contiguous
    assert all(Seen.contiguous)
    for key, parameter in reference.named_parameters():
        torch.testing.assert_close(sae.get_parameter(key), parameter, rtol=1e-5, atol=1e-6)


def test_gradients_in_another_order_of_memory_move_the_right_weights() -> None:
    """As a user may set them; what is not contiguous the kernel copies."""
    sae = make_sae("topk")
    sae.W_enc.data = sae.geometry.latent_by_latent(sae.W_enc.data)
    expected = sae.W_enc.detach() - 0.01 * torch.sign(sae.W_dec.detach().T)
    sae.W_enc.grad = sae.W_dec.detach().T.contiguous()
    assert sae.W_enc.grad.stride() != sae.W_enc.stride()
    OptimConfig(lr=0.01).build(sae).step()
    torch.testing.assert_close(sae.W_enc.detach(), expected, rtol=1e-4, atol=1e-5)


def test_moments_from_a_file_are_laid_out_anew() -> None:
    """A file holds tensors in the order of their shape; what they move must not depend on it."""
    sae = make_sae("topk")
    reference = copy.deepcopy(sae)
    trained = SAEInTraining(run_config(optim={"lr": 1e-2}), "sae", sae)
    trained.step(batch(sae, BATCH), 0, 1.0)
    resumed_sae = copy.deepcopy(sae)
    resumed = SAEInTraining(run_config(optim={"lr": 1e-2}), "sae", resumed_sae)
    state = copy.deepcopy(trained.optimizer.state_dict())
    for moments in state["state"].values():
        for key, value in moments.items():
            moments[key] = value.contiguous()
    resumed.optimizer.load_state_dict(state)
    for step in range(1, 4):
        for part in (trained, resumed):
            part.step(batch(sae, BATCH, seed=step), step * BATCH, 1.0)
    assert not torch.equal(sae.W_enc, reference.W_enc)
    for key, parameter in sae.named_parameters():
        assert torch.equal(resumed_sae.get_parameter(key), parameter), key
