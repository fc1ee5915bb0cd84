"""The kernels of a run: switched for it, and left as they were."""

import contextlib
import os
from typing import Any

import pytest
import torch
from helpers import make_sae, run_config, sparse_batches

from sae_kit import SAETrainer
from sae_kit.devices import FILLING, WORKSPACE, kernels
from sae_kit.training.callbacks import Callback


def settings() -> dict[str, Any]:
    return {
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": FILLING.fill_uninitialized_memory,
        "workspace": os.environ.get(WORKSPACE),
    }


@pytest.mark.parametrize("error", [None, RuntimeError("in the middle")])
@pytest.mark.parametrize("before", [False, True])
def test_settings_are_entered_and_left(before: bool, error: Exception | None) -> None:
    try:
        torch.use_deterministic_algorithms(before)
        torch.backends.cuda.matmul.allow_tf32 = before
        was = settings()
        ends = pytest.raises(RuntimeError, match="in the middle") if error else contextlib.nullcontext()
        with ends, kernels(tf32=not before, deterministic=True):
            entered = {"tf32": not before, "deterministic": True, "warns": True, "fills": False}
            assert settings() == entered | {"workspace": ":4096:8"}
            if error:
                raise error
        assert settings() == was
        with kernels(tf32=before, deterministic=False):
            assert settings() == was, "what was chosen outside stays"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("chosen", ["medium", "tf32", "ieee"])
def test_precisions_are_left_however_they_were_chosen(chosen: str, tf32: bool) -> None:
    """For all backends, or for one of them, after which torch refuses to say whether TF32 is allowed."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # pyright: ignore
    common, before = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    try:
        torch.set_float32_matmul_precision("medium" if chosen == "medium" else "highest")
        backends[0].fp32_precision = "tf32" if chosen == "medium" else chosen
        was = [backend.fp32_precision for backend in backends]
        with kernels(tf32=tf32, deterministic=False):
            assert backends[0].allow_tf32 == tf32
        assert [backend.fp32_precision for backend in backends] == was
        if chosen == "medium":
            assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(common)
        for backend, own in zip(backends, before, strict=True):
            backend.fp32_precision = own


class Seen(Callback):
    """What is set while steps are made."""

    def on_step_start(self, trainer: SAETrainer) -> None:
        self.found = settings()


@pytest.mark.parametrize(("tf32", "deterministic"), [(True, False), (False, True)])
def test_a_run_has_the_kernels_of_its_config(tf32: bool, deterministic: bool) -> None:
    sae, seen, before = make_sae("topk"), Seen(), settings()
    cfg = run_config(2, train={"tf32": tf32}, deterministic=deterministic)
    SAETrainer(cfg, sae, sparse_batches(sae, 2), callbacks=[seen]).fit()
    assert (seen.found["tf32"], seen.found["deterministic"]) == (tf32, deterministic)
    assert settings() == before


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_tf32_rounds_products_on_a_gpu_alone(device: str) -> None:
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)).to(device) for seed in range(2))
    with kernels(tf32=False, deterministic=False):
        exact = a @ b
    with kernels(tf32=True, deterministic=False):
        rounded = a @ b
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert 1e-5 < error < 1e-2 if device == "cuda" else error == 0
