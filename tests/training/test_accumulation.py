"""Micro-batches: the same gradients in less memory."""

from typing import Any

import pytest
import torch
from helpers import BATCH, TRAINABLE, make_sae, relative, run_config, sparse_batches
from torch import Tensor

from sae_kit.data.batch import Batch
from sae_kit.errors import ConfigError
from sae_kit.sae import SAE
from sae_kit.training.memory import peak_of
from sae_kit.training.part import SAEInTraining, split
from sae_kit.weights import SLICE_BYTES

WITHOUT_BATCH_STATISTICS: list[tuple[str, dict[str, Any]]] = [
    ("standard", {}),
    ("standard", {"lp_norm": 0.5}),
    ("jumprelu", {"jumprelu_bandwidth": 0.5}),
    ("jumprelu", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 5.0, "jumprelu_bandwidth": 0.5}),
    ("gated", {}),
    ("topk", {"aux_coefficient": 0.0}),
    ("abstopk", {"aux_coefficient": 0.0}),
    ("matching_pursuit", {}),
]


def gradients(sae: SAE, batch: Batch, accumulate: int) -> dict[str, Tensor]:
    part = SAEInTraining(
        run_config(10, train={"accumulate": accumulate}, optim={"lr": 0.0, "clip_grad_norm": None}), "sae", sae
    )
    found: dict[str, Tensor] = {}

    def keep() -> None:
        found.update({name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None})

    part.step(batch, 0, 1.0, keep)
    return found


@pytest.mark.parametrize("accumulate", [2, 4, 5])
@pytest.mark.parametrize(("name", "fields"), WITHOUT_BATCH_STATISTICS)
def test_gradients_are_those_of_the_whole_batch(name: str, fields: dict[str, Any], accumulate: int) -> None:
    one, several = (make_sae(name, dtype="float64", **fields) for _ in range(2))
    batch = next(sparse_batches(one, 1))
    expected, found = gradients(one, batch, 1), gradients(several, batch, accumulate)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        assert relative(found[key], gradient) <= 1e-6, key
    for key in ("tokens_since_fired", "firing_count", "tokens_seen"):
        assert torch.equal(several.get_buffer(key), one.get_buffer(key)) or key == "tokens_since_fired"
    silent = one.tokens_since_fired == BATCH
    assert torch.equal(several.tokens_since_fired == BATCH, silent)


def test_metrics_are_those_of_the_whole_batch() -> None:
    rows = []
    for accumulate in (1, 4):
        sae = make_sae("standard")
        part = SAEInTraining(run_config(10, train={"accumulate": accumulate}, optim={"lr": 0.0}), "sae", sae)
        for step, batch in enumerate(sparse_batches(sae, 3)):
            part.step(batch, step * BATCH)
        rows.append(part.row())
    assert rows[0].keys() == rows[1].keys()
    for key, value in rows[0].items():
        assert rows[1][key] == pytest.approx(value, rel=1e-5), key


def test_parts_differ_by_one_row_at_most() -> None:
    x, y = torch.arange(7.0)[:, None], torch.arange(7.0)[:, None]
    same, other = split(Batch(x, x), 3), split(Batch(x, y), 3)
    assert [len(part.x) for part in same] == [3, 2, 2]
    assert all(part.x is part.y for part in same)
    assert torch.equal(torch.cat([part.y for part in other]), y)
    assert len(split(Batch(x, x), 9)) == 7
    with pytest.raises(ConfigError, match="accumulate must lie between 1 and batch_tokens, found 0"):
        run_config(train={"accumulate": 0})


def peak(accumulate: int, name: str, shift: float) -> int:
    """Most bytes held at a time in a step beyond what there was, without the gradients (see benchmarks/memory.py)."""
    sae = make_sae(name, d_sae=2048)
    if shift:
        torch.no_grad()(sae.shift_preactivations)(torch.full((2048,), shift))
    part = SAEInTraining(run_config(10**6, train={"accumulate": accumulate}), "sae", sae)
    x = torch.cat([batch.x for batch in sparse_batches(sae, 32)])
    for step in range(2):
        part.step(Batch(x, x), step * len(x), 1.0)
    most = peak_of(lambda: part.step(Batch(x, x), 2 * len(x), 1.0), x.device)
    return most - sum(p.numel() * p.element_size() for p in sae.parameters())


@pytest.mark.parametrize(
    ("name", "shift"), [*((name, 0.0) for name in TRAINABLE), ("standard", -2.5), ("jumprelu", -2.5), ("gated", -2.5)]
)
def test_four_passes_need_at_most_two_fifths_of_the_memory(name: str, shift: float) -> None:
    """In the default slices. Without the shift half of the latents are on where there is no k, with it twenty."""
    whole, quarters = peak(1, name, shift), peak(4, name, shift)
    assert 0 < quarters <= 0.4 * whole, f"{quarters / 2**20:.1f} of {whole / 2**20:.1f} MiB"


def test_slices_that_were_asked_for_stay() -> None:
    def limit(**train: Any) -> int | None:
        sae = make_sae("topk")
        SAEInTraining(run_config(10, train=train), "sae", sae)
        return sae.max_pre_bytes

    assert limit(accumulate=4, max_pre_bytes=2**16) == 2**16
    assert limit(accumulate=4) == SLICE_BYTES["cpu"] // 4
    assert limit() is None
