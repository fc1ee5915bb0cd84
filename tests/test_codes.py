"""SparseCodes against the dense operations they stand for."""

import torch

from sae_kit import ops
from sae_kit.ops import SparseCodes


def dense_codes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    acts = torch.randn(3, 4, 20, generator=generator, dtype=torch.float64)
    acts = acts * (torch.rand(3, 4, 20, generator=generator) < 0.3)
    acts[1, 2] = 0
    return acts


def fixed_width() -> SparseCodes:
    generator = torch.Generator().manual_seed(1)
    indices = torch.rand(6, 20, generator=generator).topk(5, dim=1).indices
    values = torch.randn(6, 5, generator=generator, dtype=torch.float64).relu()
    return SparseCodes(values, indices, 20, (2, 3))


def test_ragged_codes_round_trip() -> None:
    acts = dense_codes()
    codes = SparseCodes.from_dense(acts)
    assert torch.equal(codes.to_dense(), acts)
    assert codes.n_rows == 12
    assert torch.equal(codes.l0(), ops.l0(acts))


def test_operations_equal_dense_ones_in_value_and_gradient() -> None:
    decoder = torch.randn(20, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for codes in (SparseCodes.from_dense(dense_codes()), fixed_width()):
        values = codes.values.clone().requires_grad_()
        codes = SparseCodes(values, codes.indices, 20, codes.leading, codes.row_offsets)
        sparse_decoder, dense_decoder = decoder.clone().requires_grad_(), decoder.clone().requires_grad_()
        acts = codes.to_dense().detach().requires_grad_()
        sparse, dense = ops.decode(codes, sparse_decoder), ops.decode(acts, dense_decoder)
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)
        weights = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (sparse * weights).sum().backward()
        (dense * weights).sum().backward()
        torch.testing.assert_close(sparse_decoder.grad, dense_decoder.grad, rtol=1e-10, atol=1e-10)
        assert values.grad is not None
        assert acts.grad is not None
        gradient = SparseCodes(values.grad, codes.indices, 20, codes.leading, codes.row_offsets).to_dense()
        touched = SparseCodes(
            torch.ones_like(values.grad), codes.indices, 20, codes.leading, codes.row_offsets
        ).to_dense()
        torch.testing.assert_close(gradient, acts.grad * touched, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(codes.scale(torch.arange(20.0)).to_dense(), acts * torch.arange(20.0).double())


def test_an_entry_of_value_zero_has_not_fired() -> None:
    codes = fixed_width()
    assert (codes.values == 0).any()
    acts = codes.to_dense()
    assert torch.equal(codes.firing_counts(), (acts != 0).reshape(-1, 20).sum(dim=0))
    assert torch.equal(ops.firing_counts(acts), codes.firing_counts())
    assert torch.equal(codes.l0(), ops.l0(acts))
