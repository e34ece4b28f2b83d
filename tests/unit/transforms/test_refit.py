"""The refit of a transform behind codes, beside dense least squares and beside what it must bring."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.transforms.refit import added_to_diagonal, by_block, diagonal_blocks, refit_correction

G, B, N, TOKENS = 3, 4, 7, 200
K = G * B


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, weights that are codes, and what the outputs lack."""
    return random(TOKENS, K, seed=seed), random(N, K, seed=seed + 1), random(TOKENS, N, seed=seed + 2)


def found_for(x: Tensor, weight: Tensor, lack: Tensor, damping: float, shared: bool) -> Tensor:
    hessian, cross = x.T @ x / len(x), lack.T @ x / len(x)
    wanted = diagonal_blocks(cross.T @ weight, B)
    gram = weight.T @ weight
    added = added_to_diagonal(hessian, gram, damping)
    return refit_correction(by_block(hessian, B), by_block(gram, B), wanted, added, shared)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("damping", [1e-4, 0.3])
def test_it_is_least_squares_over_all_entries_of_the_blocks(shared: bool, damping: float) -> None:
    """The same by a dense matrix with a column for what each entry moves."""
    x, weight, lack = problem(0)
    columns = []
    for g in range(G):
        for i in range(B):
            for j in range(B):
                columns.append((x[:, g * B + i, None] * weight[None, :, g * B + j]).flatten())
    moves = torch.stack(columns, dim=1)
    if shared:
        moves = moves.view(-1, G, B * B).sum(dim=1)
    hessian, gram = x.T @ x / len(x), weight.T @ weight
    added = damping * hessian.diagonal().mean() * gram.diagonal().mean()
    normal = moves.T @ moves / len(x) + added * torch.eye(moves.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(normal, moves.T @ lack.flatten() / len(x))
    got = found_for(x, weight, lack, damping, shared)
    assert got.shape == ((1 if shared else G), B, B)
    assert torch.allclose(got.flatten(), expected, atol=1e-7)


def test_outputs_that_lack_nothing_leave_it_alone() -> None:
    x, weight, _ = problem(3)
    assert not found_for(x, weight, torch.zeros(TOKENS, N, dtype=torch.float64), 0.01, False).any()


def test_a_transform_that_was_wrong_is_found_again() -> None:
    x, weight, _ = problem(6)
    d = 0.1 * random(G, B, B, seed=9)
    lack = x @ torch.block_diag(*d) @ weight.T
    assert torch.allclose(found_for(x, weight, lack, 1e-12, False), d, atol=1e-4)


def test_diagonal_blocks() -> None:
    d = random(G, B, B, seed=1)
    assert torch.equal(diagonal_blocks(torch.block_diag(*d), B), d)
