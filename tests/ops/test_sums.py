"""Decoding and encoding of chosen entries, held to dense products in value and in every gradient."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sae_kit.ops import Layout, SparseCodes, encode, sums
from sae_kit.ops.sums import gather_dot, gather_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, LATENTS, WIDTH = 13, 40, 9
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(params=["torch", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both: embedding bags on the CPU, and the kernels of CUDA, in Triton's interpreter where there is none."""
    if request.param == "triton":
        monkeypatch.setattr(sums, "_has_kernels", lambda rows: True)
    elif DEVICE == "cuda":
        monkeypatch.setattr(sums, "_has_kernels", lambda rows: False)


def draw(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def masks() -> Iterator[Tensor]:
    """Which entries there are: a few, none at all, none in some rows, all of one latent, all."""
    few = draw(0)(ROWS, LATENTS) > 1
    yield few
    yield torch.zeros_like(few)
    gaps = few.clone()
    gaps[::3] = False
    yield gaps
    hot = torch.zeros_like(few)
    hot[:, 5] = True
    yield hot
    yield torch.ones_like(few)


def close(found: Tensor | None, expected: Tensor | None, dtype: torch.dtype) -> None:
    assert found is not None
    assert expected is not None
    assert found.dtype == dtype
    scale = expected.abs().max().clamp(min=1).item() if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=TOLERANCES[dtype] * scale)


def codes_of(values: Tensor, mask: Tensor) -> SparseCodes:
    """The entries of a mask, values taken from a dense tensor with its gradient."""
    row, latent = mask.nonzero(as_tuple=True)
    return SparseCodes.from_keys(row * LATENTS + latent, values[row, latent], ROWS, LATENTS)


@every_dtype
@pytest.mark.parametrize("mask", list(masks()), ids=["few", "none", "gaps", "hot", "all"])
def test_decode(mask: Tensor, dtype: torch.dtype) -> None:
    new = draw(1)
    leaves = [new(ROWS, LATENTS).to(dtype), new(LATENTS, WIDTH).to(dtype)]
    weights = new(ROWS, WIDTH)
    sparse, dense = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    found = codes_of(sparse[0], mask).decode(sparse[1])
    wide = [leaf.double() for leaf in dense]
    expected = (wide[0] * mask) @ wide[1]
    close(found, expected, dtype)
    (found.double() * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, theirs in zip(sparse, dense, strict=True):
        close(mine.grad, theirs.grad, dtype)


@every_dtype
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("mask", list(masks()), ids=["few", "none", "gaps", "hot", "all"])
def test_encode(mask: Tensor, centred: bool, dtype: torch.dtype) -> None:
    """h = (x − b_dec) W + bias at chosen entries: gradients to x, W, bias and b_dec, and to nothing else."""
    new = draw(2)
    leaves = [part.to(dtype) for part in (new(ROWS, WIDTH), new(LATENTS, WIDTH), new(LATENTS), new(WIDTH))]
    weights = new(ROWS, LATENTS)
    sparse, dense = ([leaf.clone().requires_grad_() for leaf in leaves] for _ in range(2))
    x, W, bias, b_dec = (leaf.double() for leaf in dense)
    h = ((x - b_dec) if centred else x) @ W.T + bias
    picked = codes_of(h.detach().to(dtype), mask)
    layout = picked.layout
    found = encode(picked.values, sparse[0], sparse[1], sparse[2], sparse[3] if centred else None, layout, layout.bag)
    assert torch.equal(found, picked.values)
    row, latent = mask.nonzero(as_tuple=True)
    (found.double() * weights[row, latent]).sum().backward()
    (h * mask * weights).sum().backward()
    for mine, theirs in list(zip(sparse, dense, strict=True))[: 4 if centred else 3]:
        close(mine.grad, theirs.grad, dtype)
    assert centred or sparse[3].grad is None


def test_entries_may_read_any_row() -> None:
    """In a cross-layer transcoder the row of x depends on the layer of the latent."""
    new = draw(3)
    x, W = new(2 * ROWS, WIDTH).requires_grad_(), new(LATENTS, WIDTH).requires_grad_()
    mask = draw(0)(ROWS, LATENTS) > 1
    row, latent = mask.nonzero(as_tuple=True)
    source = 2 * row + (latent >= LATENTS // 2)
    layout = codes_of(mask.double(), mask).layout
    weights = new(len(row))
    picked = (x[source] * W[latent]).sum(dim=1)
    (picked * weights).sum().backward()
    expected = [leaf.grad for leaf in (x, W)]
    x.grad = W.grad = None
    found = encode(picked.detach(), x, W, W.new_zeros(LATENTS), None, layout, source)
    (found * weights).sum().backward()
    for leaf, wanted in zip((x, W), expected, strict=True):
        close(leaf.grad, wanted, torch.float64)


@pytest.mark.parametrize("implementation", ["torch", "triton"] if DEVICE == "cuda" else ["torch"], indirect=True)
def test_gradients_by_finite_differences() -> None:
    new, mask = draw(4), draw(0)(ROWS, LATENTS) > 1.5
    values = new(ROWS, LATENTS).requires_grad_()
    W = new(LATENTS, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: codes_of(v, mask).decode(w), (values, W))


@every_dtype
def test_results_do_not_depend_on_the_order_of_a_run(dtype: torch.dtype) -> None:
    """Equal inputs, equal bits."""
    new = draw(5)
    rows = new(500, WIDTH).to(dtype)
    indices = torch.randint(0, 500, (1_000,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    offsets = torch.tensor([0, 5, 5, 700, 1_000], device=DEVICE)
    values, left = new(1_000).to(dtype), new(4, WIDTH).to(dtype)
    first = gather_sum(values, indices, offsets, rows), gather_dot(left, indices, offsets, rows)
    for _ in range(3):
        again = gather_sum(values, indices, offsets, rows), gather_dot(left, indices, offsets, rows)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_a_layout_sorts_once() -> None:
    codes = SparseCodes.from_dense(torch.relu(draw(6)(ROWS, LATENTS)))
    assert codes.scale(torch.ones(LATENTS, device=DEVICE)).layout is codes.layout
    assert codes.layout.by_latent is codes.layout.by_latent
    order, offsets = codes.layout.by_latent
    assert torch.equal(codes.indices[order], codes.indices.sort(stable=True).values)
    assert torch.equal(offsets.diff(), codes.firing_counts())


def test_levels_split_rows() -> None:
    """Each level of a row has the latents between two widths."""
    acts = torch.relu(draw(7)(ROWS, LATENTS) - 0.5)
    acts[3] = 0
    widths = (4, 5, 20, LATENTS)
    codes = SparseCodes.from_dense(acts).at_levels(widths)
    W = draw(8)(LATENTS, WIDTH)
    first = 0
    for level, last in enumerate(widths):
        torch.testing.assert_close(codes.decode(W)[:, level], acts[:, first:last] @ W[first:last])
        first = last


def test_a_layout_knows_the_bag_of_each_entry() -> None:
    layout = Layout(torch.tensor([3, 1, 2]), torch.tensor([0, 0, 2, 3, 3]), 4)
    assert layout.bag.tolist() == [1, 1, 2]
    assert layout.n_bags == 4


def test_decoding_can_be_differentiated_twice() -> None:
    """Second derivatives of a product of values and rows, as autograd finds them for dense codes."""
    mask, new = draw(0)(ROWS, LATENTS) > 1, draw(9)
    values, W = new(ROWS, LATENTS).requires_grad_(), new(LATENTS, WIDTH).requires_grad_()

    def second(output: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(output.pow(3).sum(), (values, W), create_graph=True)
        return torch.autograd.grad(torch.stack([part.square().sum() for part in first]).sum(), (values, W))

    for found, expected in zip(second(codes_of(values, mask).decode(W)), second((values * mask) @ W), strict=True):
        close(found, expected, torch.float64)


def test_the_encoder_of_training_refuses_a_second_derivative() -> None:
    """Instead of giving 0."""
    new, mask = draw(10), draw(0)(ROWS, LATENTS) > 1
    x, W = new(ROWS, WIDTH), new(LATENTS, WIDTH).requires_grad_()
    picked = codes_of((x @ W.T).detach(), mask)
    h = encode(picked.values, x, W, W.new_zeros(LATENTS), None, picked.layout, picked.layout.bag)
    with pytest.raises(RuntimeError, match="differentiated once, found create_graph=True"):
        torch.autograd.grad(h.square().sum(), W, create_graph=True)
