"""Sparse and dense passes agree in every mode of an architecture, schedules and dead latents included."""

import copy
from typing import Any

import pytest
import torch
from dense import densely
from helpers import BATCH, batch, make_sae, relative, values_of
from torch import Tensor

from sae_kit.annealing import PAnnealing
from sae_kit.ops import SparseCodes
from sae_kit.sae import SAE
from sae_kit.training.dead import DeadLatents
from sae_kit.training.losses import training_losses, training_pass

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("standard", {"lp_norm": 0.5}),
    ("standard", {"lp_norm": 2.0}),
    ("standard", {"p_annealing": PAnnealing()}),
    ("standard", {"reconstruction_loss": "fvu"}),
    ("standard", {"decoder_norm_constraint": "unit"}),
    ("gated", {"detach_aux_decoder": False}),
    ("gated", {"detach_aux_decoder": False, "skip": True}),
    ("gated", {"p_annealing": PAnnealing()}),
    ("jumprelu", {"jumprelu_ste_to_input": True}),
    ("jumprelu", {"jumprelu_bandwidth": 3.0}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 10.0}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "tanh_quad"}),
    ("standard", {"pre_act_loss_coefficient": 0.3, "pre_act_on": "all"}),
    ("batchtopk", {"pre_act_loss_coefficient": 0.3, "pre_act_on": "all"}),
    ("topk", {"pre_act_loss_coefficient": 0.3}),
    ("topk", {}),
    ("topk", {"rescale_acts_by_decoder_norm": False}),
    ("topk", {"apply_b_dec_to_input": False}),
    ("abstopk", {}),
    ("batchtopk", {"k": 7.5}),
    ("matryoshka_batchtopk", {"matryoshka_widths": (5, 40), "matryoshka_weights": (1.0, 2.0, 3.0)}),
]


def losses_and_gradients(sae: SAE, dead_share: float) -> dict[str, Tensor]:
    values = values_of(sae)
    dead = DeadLatents(sae, 10**6)
    number = int(dead_share * sae.geometry.n_latents)
    sae.tokens_since_fired[:number] = 10**7
    with torch.no_grad():
        if sae.cfg.architecture == "abstopk":  # on where they are far from 0
            sae.W_enc[:, :number] *= 1e-3
            sae.b_enc[:number] = 0.0
        else:
            sae.get_parameter("b_gate" if sae.cfg.architecture == "gated" else "b_enc")[:number] -= 100.0
    run = training_pass(sae, batch(sae, BATCH), values)
    dead.observe(run.encoding.codes.detach(), BATCH, 0)
    assert len(dead.candidates) == number
    losses = training_losses(sae, run, values, dead)
    losses.total.backward()
    found = {"loss": losses.total, "y_hat": run.y_hat} | {f"d{name}": p.grad for name, p in sae.named_parameters()}
    return {key: value.detach() for key, value in found.items() if value is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-5)])
@pytest.mark.parametrize("dead_share", [0.0, 0.1])
@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=lambda value: str(value))
def test_both_paths_agree(name: str, fields: dict[str, Any], dead_share: float, dtype: str, tolerance: float) -> None:
    sae = make_sae(name, dtype=dtype, aux_coefficient=0.5, aux_k=4, **fields)
    sae.sparse_below = 1.0
    dense = densely(copy.deepcopy(sae))
    dense.sparse_below = 0.0
    expected = losses_and_gradients(dense, dead_share)
    found = losses_and_gradients(sae, dead_share)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert relative(found[key], value) < tolerance, key


@pytest.mark.parametrize("selection", ["topk", "groupmax"])
@pytest.mark.parametrize("limit", [1, 9 * 8 * BATCH, 2**30])
def test_a_row_selects_the_same_from_slices(selection: str, limit: int) -> None:
    sae = make_sae("topk", dtype="float64", selection=selection)
    sae.max_pre_bytes = limit
    x = batch(sae, BATCH).x
    z = sae.preactivations(x) * sae.decoder_norms()
    if selection == "topk":
        expected = z.topk(8).indices
    else:
        expected = z.unflatten(1, (8, -1)).argmax(dim=2) + torch.arange(8) * (sae.d_sae // 8)
    found = sae.training_encoding(x, values_of(sae)).codes
    assert isinstance(found, SparseCodes)
    assert torch.equal(found.indices.sort(dim=1).values, expected.sort(dim=1).values)
