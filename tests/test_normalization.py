"""Each mode by its definition, per site; zero rows; estimates and their limits; what undoes what."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kit.errors import ConfigError, DataError, MissingContextError
from sae_kit.normalization import ESTIMATED, PER_ROW, Normalization

WIDTH = 6
SHAPES = [(WIDTH,), (3, WIDTH)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["one_site", "three_sites"])


def activations(shape: tuple[int, ...], rows: int = 500, seed: int = 0) -> Tensor:
    """Correlated features of unequal size, with a mean, and another scale at every site."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    u = torch.randn(rows, *shape, generator=generator, dtype=torch.float64) @ mix + torch.arange(WIDTH)
    return u * (1 + torch.arange(shape[0]))[:, None] if len(shape) > 1 else u


def made(mode: Any, shape: tuple[int, ...], u: Tensor | None = None, statistic: Any = "mean") -> Normalization:
    norm = Normalization(mode, shape, torch.float64, statistic)
    if u is not None:
        norm.estimate(u)
    return norm


@each_shape
@pytest.mark.parametrize("statistic", ["mean", "rms"])
def test_expected_average_brings_the_norm_to_root_d(shape: tuple[int, ...], statistic: str) -> None:
    u = activations(shape)
    norm = made("expected_average_only_in", shape, u, statistic)
    lengths = norm(u).norm(dim=-1)
    mean = lengths.mean(0) if statistic == "mean" else lengths.square().mean(0).sqrt()
    torch.testing.assert_close(mean, torch.full(shape[:-1], WIDTH**0.5, dtype=torch.float64))
    torch.testing.assert_close(norm(u), norm.scale[..., None] * u)
    assert norm.rows == 500


@each_shape
def test_center_and_scale(shape: tuple[int, ...]) -> None:
    u = activations(shape)
    x = made("center_and_scale", shape, u)(u)
    torch.testing.assert_close(x.mean(0), torch.zeros(shape, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.norm(dim=-1).mean(0), torch.full(shape[:-1], WIDTH**0.5, dtype=torch.float64))


@each_shape
def test_whitening_gives_the_identity_as_covariance(shape: tuple[int, ...]) -> None:
    u = activations(shape)
    norm = made("covariance_whitening", shape, u)
    x = norm(u)
    torch.testing.assert_close(x.mean(0), torch.zeros(shape, dtype=torch.float64), rtol=0, atol=1e-12)
    centred = u - u.mean(0)
    for site in range(shape[0] if len(shape) > 1 else 1):
        own, before = (x[:, site], centred[:, site]) if len(shape) > 1 else (x, centred)
        values = torch.linalg.eigvalsh(before.T @ before / len(u))
        floor = 1e-3 * values.mean()
        found = torch.linalg.eigvalsh(own.T @ own / len(u))
        # λ / (λ + ε): one, but for directions in which there is little
        torch.testing.assert_close(found, (values / (values + floor)).sort().values)
        assert found[1:].min() > 0.9


def test_whitening_of_a_flat_direction_stays_finite() -> None:
    u = activations((WIDTH,))
    u[:, 2] = 5.0
    norm = made("covariance_whitening", (WIDTH,), u)
    assert norm(u).isfinite().all()
    torch.testing.assert_close(norm.undo(norm(u)), u)
    constant = made("covariance_whitening", (WIDTH,), torch.ones(100, WIDTH, dtype=torch.float64))
    assert constant(u).isfinite().all()


@each_shape
def test_row_norm(shape: tuple[int, ...]) -> None:
    u = activations(shape, 20)
    x, scale, shift = made("constant_norm_rescale", shape).normalize(u)
    assert scale is not None
    assert shift is None
    torch.testing.assert_close(x.norm(dim=-1), torch.full((20, *shape[:-1]), WIDTH**0.5, dtype=torch.float64))
    torch.testing.assert_close(x * scale, u)


@each_shape
def test_layer_norm(shape: tuple[int, ...]) -> None:
    """σ is unbiased; undone as ŷσ + μ, without the 1e-5 that the division had."""
    u = activations(shape, 20)
    x, scale, shift = made("layer_norm", shape).normalize(u)
    mean, std = u.mean(-1, keepdim=True), u.std(-1, keepdim=True, correction=1)
    torch.testing.assert_close(x, (u - mean) / (std + 1e-5))
    assert scale is not None
    assert shift is not None
    torch.testing.assert_close(made("layer_norm", shape).undo(x, scale, shift), x * std + mean)


@each_shape
@pytest.mark.parametrize("mode", [*sorted(ESTIMATED), "constant_norm_rescale", "constant_scalar_rescale", "none"])
def test_undo_undoes(shape: tuple[int, ...], mode: str) -> None:
    norm = made(mode, shape, activations(shape))
    norm.factor = 3.0
    u = activations(shape, 7, seed=1)
    x, scale, shift = norm.normalize(u)
    torch.testing.assert_close(norm.undo(x, scale, shift), u)
    assert (x.sub(u).abs().max() > 1e-3) == (mode != "none")


@each_shape
@pytest.mark.parametrize("mode", sorted(ESTIMATED))
def test_affine_is_the_same_map(shape: tuple[int, ...], mode: str) -> None:
    norm = made(mode, shape, activations(shape))
    u = activations(shape, 7, seed=1)
    matrix, inverse, shift = norm.affine()
    centred = u if shift is None else u - shift
    x = (centred[..., None, :] @ matrix).squeeze(-2)
    torch.testing.assert_close(x, norm(u))
    back = (x[..., None, :] @ inverse).squeeze(-2)
    torch.testing.assert_close(back if shift is None else back + shift, u)


@pytest.mark.parametrize("mode", sorted(PER_ROW))
def test_row_modes_need_their_rows(mode: Any) -> None:
    norm = made(mode, (WIDTH,))
    with pytest.raises(MissingContextError, match=f"{mode} scales each by itself"):
        norm.undo(torch.zeros(2, WIDTH))


@pytest.mark.parametrize("mode", [*sorted(PER_ROW), "constant_scalar_rescale", "none"])
def test_only_statistics_are_folded(mode: Any) -> None:
    with pytest.raises(ConfigError, match=f"{mode} has no statistics and cannot be folded into weights"):
        made(mode, (WIDTH,)).affine()


@each_shape
@pytest.mark.parametrize("mode", [*sorted(ESTIMATED), *sorted(PER_ROW)])
def test_rows_of_zeros_stay_finite(shape: tuple[int, ...], mode: str) -> None:
    norm = made(mode, shape, activations(shape))
    x, scale, shift = norm.normalize(torch.zeros(3, *shape, dtype=torch.float64))
    assert x.isfinite().all()
    assert norm.undo(x, scale, shift).abs().max() < 1e-9


@pytest.mark.parametrize("mode", sorted(ESTIMATED))
def test_estimates_do_not_depend_on_pieces_and_are_in_float64(mode: str) -> None:
    u = activations((3, WIDTH)).float()
    whole, pieces, half = (made(mode, (3, WIDTH)) for _ in range(3))
    whole.estimate(u)
    pieces.estimate(u, chunk=7)
    half.estimate(u.bfloat16())
    exact = made(mode, (3, WIDTH), u.double())
    torch.testing.assert_close(dict(pieces.named_buffers()), dict(whole.named_buffers()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(whole.named_buffers()), dict(exact.named_buffers()), rtol=1e-6, atol=1e-6)
    rounded = made(mode, (3, WIDTH), u.bfloat16().double())
    torch.testing.assert_close(dict(half.named_buffers()), dict(rounded.named_buffers()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", sorted(ESTIMATED))
def test_estimates_need_rows(mode: str) -> None:
    norm = made(mode, (WIDTH,))
    assert norm.needs_estimate
    with pytest.raises(DataError, match=r"empty batch|needs at least 60 rows, found 0"):
        norm.estimate(torch.zeros(0, WIDTH))
    assert norm.needs_estimate
    norm.estimate(activations((WIDTH,)))
    assert not norm.needs_estimate


def test_whitening_asks_for_enough_rows() -> None:
    norm = made("covariance_whitening", (WIDTH,))
    with pytest.raises(DataError, match=r"6 features needs at least 60 rows, found 59: .* center_and_scale"):
        norm.estimate(activations((WIDTH,), 59))
    norm.estimate(activations((WIDTH,), 60))


def test_other_modes_estimate_nothing() -> None:
    for mode in ("none", "layer_norm", "constant_norm_rescale", "constant_scalar_rescale"):
        norm = made(mode, (WIDTH,), activations((WIDTH,)))
        assert not norm.needs_estimate
        assert not list(norm.buffers())


@pytest.mark.parametrize("mode", sorted(PER_ROW))
def test_row_statistics_of_half_precision_are_taken_in_float32(mode: str) -> None:
    u = (100 * activations((WIDTH,), 50)).bfloat16()
    x, scale, shift = made(mode, (WIDTH,)).normalize(u)
    exact, scale_32, shift_32 = made(mode, (WIDTH,)).normalize(u.float())
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(x, exact.bfloat16(), rtol=0, atol=0)
    assert scale is not None
    torch.testing.assert_close(scale, scale_32)
    assert (shift is None) == (shift_32 is None)
