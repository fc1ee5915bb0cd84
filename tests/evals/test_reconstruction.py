"""Reconstruction metrics: worked numbers, invariances, and a brute force in float64."""

import pytest
import torch
from torch import Tensor

from sae_kit.evals import EvalStep, Reconstruction
from sae_kit.ops import SparseCodes

QUALITY, SHRINKAGE = "reconstruction_quality", "shrinkage"
NO_CODES = SparseCodes(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), 2, (1,))


def measure(y: Tensor, y_hat: Tensor, batch: int = 10**9) -> Reconstruction:
    family = Reconstruction(y.shape[1], 2)
    for part, part_hat in zip(y.split(batch), y_hat.split(batch), strict=True):
        family.update(EvalStep(part, part_hat, NO_CODES))
    return family


def values(y: Tensor, y_hat: Tensor, batch: int = 10**9) -> dict[str, float | None]:
    groups = measure(y, y_hat, batch).compute()
    return {**groups[QUALITY], **groups[SHRINKAGE]}


def square() -> tuple[Tensor, Tensor]:
    x = torch.tensor([[0.0, 0], [2, 0], [0, 2], [2, 2]])
    return x, x + torch.tensor([[0.5, 0], [-0.5, 0], [0, 0.5], [0, -0.5]])


def noisy(tokens: int = 3_000, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(tokens, 64, generator=generator)
    return y, y + 0.5 * torch.randn(tokens, 64, generator=generator)


def number(value: float | None) -> float:
    assert value is not None
    return value


def test_worked_numbers() -> None:
    found = values(*square())
    expected = {
        "explained_variance": 0.875,
        "fvu": 0.125,
        "nmse": 0.0625,
        "mse": 0.25,
        "mse_per_dim": 0.125,
        "cossim": 0.9966498312,
        "l2_ratio": 0.9612944922,
        "relative_reconstruction_bias": 1.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=3e-8)


def test_worked_numbers_shifted() -> None:
    x, x_hat = square()
    found = values(x + 1, x_hat + 1)
    expected = {
        "explained_variance": 0.875,
        "nmse": 0.025,
        "cossim": 0.9934511035,
        "l2_ratio": 1.0494393479,
        "relative_reconstruction_bias": 1.0,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=3e-8)


@pytest.mark.parametrize(("scale", "shift", "mse"), [(10, 0, 25.0), (100, 0, 2_500.0), (1, 100, 0.25)])
def test_scale_and_shift(scale: float, shift: float, mse: float) -> None:
    x, x_hat = square()
    found = values(scale * x + shift, scale * x_hat + shift)
    assert number(found["explained_variance"]) == pytest.approx(0.875, abs=1e-12)
    assert number(found["mse"]) == pytest.approx(mse)


@pytest.mark.parametrize("shift", [0.0, 3.0, 30.0, 3_000.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_explained_variance_ignores_offset_and_unit(shift: float, scale: float) -> None:
    y, y_hat = noisy(20_000)
    plain, moved = values(y, y_hat), values(scale * (y + shift), scale * (y_hat + shift))
    assert number(moved["explained_variance"]) == pytest.approx(number(plain["explained_variance"]), abs=2e-7)
    assert number(plain["explained_variance"]) == pytest.approx(0.75, abs=0.002)


@pytest.mark.parametrize("batch", [1, 37, 1_024])
def test_no_value_depends_on_the_batch(batch: int) -> None:
    y, y_hat = noisy(2_500)
    assert values(y, y_hat, batch) == pytest.approx(values(y, y_hat), rel=1e-9)


def test_no_value_depends_on_order_or_on_where_it_was_computed() -> None:
    y, y_hat = noisy()
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(3))
    whole, first = values(y, y_hat), measure(y[shuffled[:900]], y_hat[shuffled[:900]])
    first.merge(measure(y[shuffled[900:]], y_hat[shuffled[900:]]))
    merged = first.compute()
    assert {**merged[QUALITY], **merged[SHRINKAGE]} == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_a_brute_force(dtype: torch.dtype) -> None:
    y, y_hat = (t.to(dtype) for t in noisy(seed=1))
    y[:3], y_hat[3:5] = 0, 0
    found = values(y, y_hat, batch=100)
    y, y_hat = y.double(), y_hat.double()
    error, n_in, n_out = (y - y_hat).square().sum(), y.norm(dim=1), y_hat.norm(dim=1)
    fvu = float(error / (y - y.mean(0)).square().sum())
    expected = {
        "explained_variance": 1 - fvu,
        "fvu": fvu,
        "nmse": float(error / y.square().sum()),
        "mse": float(error / len(y)),
        "mse_per_dim": float(error / y.numel()),
        "cossim": float(((y * y_hat).sum(1) / (n_in * n_out).clamp(min=1e-30))[3:].mean()),
        "l2_norm_in": float(n_in.mean()),
        "l2_norm_out": float(n_out.mean()),
        "l2_ratio": float((n_out / n_in)[3:].mean()),
        "relative_reconstruction_bias": float(y_hat.square().sum() / (y * y_hat).sum()),
    }
    assert found == pytest.approx(expected, rel=1e-6)


def test_the_limits_of_explained_variance() -> None:
    y, y_hat = noisy()
    assert values(y, y)["explained_variance"] == 1
    assert number(values(y, y.mean(0).expand_as(y))["explained_variance"]) == pytest.approx(0, abs=1e-7)
    assert number(values(y, -3 * y_hat)["explained_variance"]) < 0


def test_undefined_values_are_none() -> None:
    constant = torch.full((50, 3), 0.1)
    found = values(constant, constant + 1)
    assert found["explained_variance"] is None
    assert found["fvu"] is None
    assert number(found["nmse"]) == pytest.approx(100)
    assert set(values(torch.zeros(0, 3), torch.zeros(0, 3)).values()) == {None}
    zeros = values(torch.zeros(4, 3), torch.ones(4, 3))
    assert [zeros[key] for key in ("cossim", "l2_ratio", "relative_reconstruction_bias", "nmse")] == [None] * 4


def test_shrinkage_is_seen() -> None:
    y, _ = noisy()
    found = values(y, 0.8 * y)
    assert number(found["relative_reconstruction_bias"]) == pytest.approx(0.8)
    assert number(found["l2_ratio"]) == pytest.approx(0.8)
    assert number(found["cossim"]) == pytest.approx(1)


@pytest.mark.parametrize(("factor", "counts"), [(1e-8, False), (1e-4, True)])
def test_tokens_about_zero_do_not_count_in_the_ratio_of_norms(factor: float, counts: bool) -> None:
    y, _ = noisy()
    y_hat = y.clone()
    y[0] *= factor  # seen first, when no norm is known yet
    assert (number(values(y, y_hat, batch=1_000)["l2_ratio"]) > 1.1) is counts
