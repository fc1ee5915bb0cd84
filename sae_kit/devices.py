"""Which device a run uses, and which of its kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator
from typing import Any

import torch

from sae_kit.errors import ConfigError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"  # cuBLAS asks for fixed memory before it promises the same bits
FILLING: Any = torch.utils.deterministic  # torch has no types for what it holds


def pick_device(name: str, field: str) -> torch.device:
    """The device called `name`; auto is cuda where there is one, else cpu. `field` names it in errors.

    Not mps by itself: it lacks float64, in which statistics are kept.

    Raises:
        ConfigError: there is no such device here; the message lists those that there are.
    """
    wanted = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        torch.empty(0, device=wanted)
        return torch.device(wanted)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # AssertionError: a build without CUDA
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        there = ["cpu"] if kind is None else ["cpu", *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
        raise ConfigError(f"{field}: expected auto or one of {', '.join(there)}, found {name!r}") from error


@contextlib.contextmanager
def kernels(*, tf32: bool, deterministic: bool) -> Generator[None]:
    """The kernels of the process within this block; after it they are what they were.

    With `tf32` products of float32 on a GPU round their factors to TF32, without it they do not. With `deterministic`
    operations take kernels that give the same bits each time, and torch warns of those that have none; without it
    nothing changes.
    """
    precision, by_backend = _common_precision(), _precisions()
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled, workspace = FILLING.fill_uninitialized_memory, os.environ.get(WORKSPACE)
    try:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        if deterministic:
            os.environ.setdefault(WORKSPACE, ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
            FILLING.fill_uninitialized_memory = False  # it finds mistakes, and costs a write
        yield
    finally:
        if precision is not None:
            torch.set_float32_matmul_precision(precision)
        for backend, own in by_backend:
            backend.fp32_precision = own
        torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])
        FILLING.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def _common_precision() -> str | None:
    """That of all float32 products; None where torch does not say, because one backend was given another."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _precisions() -> list[tuple[Any, str]]:
    """Backends whose products have a precision of their own in this torch, which may be another than the common one."""
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [(backend, backend.fp32_precision) for backend in backends if hasattr(backend, "fp32_precision")]
