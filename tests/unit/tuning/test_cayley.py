"""Steps between orthogonal matrices, beside the Cayley transform itself, which solves for what is iterated here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.transforms.base import random_orthogonal
from mxrot.tuning.cayley import ROUNDS, cayley_curve, cayley_step, skew_direction, step_sizes

EXACT = 1e-10


def problem(size: int, count: int = 3, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Matrices R, and targets M of the loss -tr(R^T M), whose gradient for R is -M."""
    generator = torch.Generator().manual_seed(size)
    matrices = random_orthogonal(count, size, generator)
    return matrices, scale * torch.randn(count, size, size, generator=generator, dtype=torch.float64)


def transform(matrices: Tensor, A: Tensor, steps: Tensor) -> Tensor:
    half, identity = A * (steps[:, None, None] / 2), torch.eye(A.shape[-1], dtype=torch.float64)
    return torch.linalg.solve(identity + half, (identity - half) @ matrices)


def orthogonality_error(matrices: Tensor) -> float:
    return float((matrices.mT @ matrices - torch.eye(matrices.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_the_iteration_closes_in_on_the_cayley_transform(size: int) -> None:
    """Each round multiplies the error by (s/2) A, whose norm is at most 1/2."""
    matrices, targets = problem(size)
    A = skew_direction(matrices, -targets)
    steps = step_sizes(A, 1e3)
    expected = transform(matrices, A, steps)
    factor = torch.linalg.matrix_norm(A, 2) * steps / 2
    assert (factor <= 0.5).all()
    start = torch.linalg.matrix_norm(cayley_curve(matrices, A, steps, rounds=0) - expected, 2)
    for rounds in (1, ROUNDS, 60):
        left = torch.linalg.matrix_norm(cayley_curve(matrices, A, steps, rounds) - expected, 2)
        assert (left <= start * factor**rounds + 1e-13).all()
    torch.testing.assert_close(cayley_curve(matrices, A, steps, 60), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_matrices_stay_orthogonal(scale: float) -> None:
    """Whatever the size of the gradients; the curve itself does, the iteration by itself does not."""
    matrices, targets = problem(48, scale=scale)
    bare = matrices
    for _ in range(100):
        matrices = cayley_step(matrices, -targets, 1.5)
        A = skew_direction(bare, -targets)
        bare = cayley_curve(bare, A, step_sizes(A, 1.5))
    assert orthogonality_error(matrices) < EXACT
    assert scale < 1 or orthogonality_error(bare) > EXACT


def test_the_step_is_normalised_where_it_would_be_large() -> None:
    matrices, targets = problem(16, count=2)
    A = skew_direction(matrices, -targets)
    largest = torch.stack([torch.linalg.matrix_norm(one, 1) for one in A])
    assert torch.equal(step_sizes(A, 1e-3), torch.full((2,), 1e-3, dtype=torch.float64))
    torch.testing.assert_close(step_sizes(A, 1e3), 1 / largest, rtol=1e-14, atol=0)
    nothing = torch.zeros_like(targets)
    torch.testing.assert_close(cayley_step(matrices, nothing, 1.5), matrices, rtol=0, atol=1e-14)


def test_it_is_the_formula_of_the_paper() -> None:
    """With What as it is written for matrices that need not be square."""
    matrices, gradients = problem(12)
    what = gradients @ matrices.mT - matrices @ (matrices.mT @ gradients @ matrices.mT) / 2
    torch.testing.assert_close(skew_direction(matrices, gradients), what - what.mT, rtol=0, atol=1e-12)


def test_the_loss_falls_as_the_direction_says() -> None:
    """By s |A|^2 for a small step."""
    matrices, targets = problem(20)
    A, small = skew_direction(matrices, -targets), 1e-6
    moved = cayley_step(matrices, -targets, small)
    fall = (targets * (moved - matrices)).sum(dim=(1, 2))
    torch.testing.assert_close(fall / small, A.square().sum(dim=(1, 2)), rtol=1e-4, atol=0)


def test_it_finds_the_nearest_orthogonal_matrix() -> None:
    """The least of |R - M|^2 is U V^T of M = U S V^T, where the signs of both determinants are the same."""
    matrices, targets = problem(10, count=4)
    U, _, Vh = torch.linalg.svd(targets)
    nearest = U @ Vh
    same = torch.linalg.det(nearest) * torch.linalg.det(matrices) > 0
    assert same.any()
    for step in range(1000):
        matrices = cayley_step(matrices, -targets, 0.2 * (1 - step / 1000))
    torch.testing.assert_close(matrices[same], nearest[same], rtol=0, atol=1e-6)
