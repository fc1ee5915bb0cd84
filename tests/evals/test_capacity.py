import pytest
import torch

from sae_kit.errors import ShapeError
from sae_kit.evals import capacity
from sae_kit.seeding import generator


def test_orthogonal_vectors_have_a_dimension_each_and_equal_ones_share_it() -> None:
    torch.testing.assert_close(capacity(torch.diag(torch.tensor([1.0, 3.0, 1e-9]))), torch.ones(3))
    torch.testing.assert_close(capacity(torch.full((5, 2), -3.0)), torch.full((5,), 0.2))
    assert capacity(torch.zeros(0, 3)).shape == (0,)


def test_it_is_the_formula() -> None:
    vectors = torch.randn(40, 8, dtype=torch.float64, generator=generator(0, "vectors"))
    products = (vectors @ vectors.T).square()
    expected = products.diagonal().sqrt() ** 2 / products.sum(1)
    torch.testing.assert_close(capacity(vectors), expected)


def test_what_is_zero_has_none_and_takes_none() -> None:
    found = capacity(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    assert found.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(found[[0, 2]], torch.tensor([1 / 2, 4 / 5]))


def test_large_and_small_vectors_stay_in_range() -> None:
    vectors = torch.eye(3) * torch.tensor([1e30, 1.0, 1e-30])[:, None]
    torch.testing.assert_close(capacity(vectors), torch.ones(3))
    torch.testing.assert_close(capacity(vectors[:2].bfloat16()), torch.ones(2))


def test_too_many_vectors_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected at most 4,096 vectors.* found 4,097"):
        capacity(torch.ones(4097, 1))
