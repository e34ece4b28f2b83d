"""Inverses by products against a library's."""

import pytest
import torch

from mxrot.transforms.base import random_orthogonal
from mxrot.tuning.inverses import inverses


def with_condition(condition: float, count: int = 7, size: int = 32) -> torch.Tensor:
    """Random matrices whose singular values fall evenly in their logarithm from 1 to 1 / condition."""
    left, right = (random_orthogonal(count, size, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    values = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), size, dtype=torch.float64)
    return left @ torch.diag(values) @ right.mT


@pytest.mark.parametrize("condition", [1.0, 3.0, 30.0])
def test_as_the_library_inverts_them(condition: float) -> None:
    matrices = with_condition(condition)
    expected = torch.linalg.inv(matrices)
    error = torch.linalg.matrix_norm(inverses(matrices) - expected) / torch.linalg.matrix_norm(expected)
    assert error.max() < 1e-13 * condition


def test_corrections_as_far_from_the_identity_as_tuning_takes_them() -> None:
    moved = torch.eye(32) + 0.05 * torch.randn(50, 32, 32, generator=torch.Generator().manual_seed(2))
    identity = torch.eye(32, dtype=torch.float64).expand(50, 32, 32)
    assert (inverses(moved) @ moved.double() - identity).abs().max() < 1e-12


def test_the_identity_is_its_own_inverse_exactly() -> None:
    identity = torch.eye(32).repeat(3, 1, 1)
    assert torch.equal(inverses(identity), identity.double())


def test_each_matrix_alone() -> None:
    """What others are beside it changes nothing."""
    matrices = with_condition(5.0)
    matrices[3] *= 1e3
    assert torch.equal(inverses(matrices)[4], inverses(matrices[4:5])[0])
