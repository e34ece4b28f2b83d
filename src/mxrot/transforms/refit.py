"""What is right for a transform once the weights behind it are codes: block-diagonal least squares, in closed form.

The outputs of a site are x' W_q^T with x' = Q(x T). A correction T <- T (I + D), D block-diagonal, moves them by about
x' D W_q^T. With H the mean of x'^T x', S = W_q^T W_q and C the mean of r^T x', r what the outputs lack, the mean of
|r - x' D W_q^T|^2 is least where for each block g

    sum_h H_gh D_h S_hg + damping h s D_g = (C^T W_q)_gg

h and s the mean diagonals of H and S. That is solved by conjugate gradients: for D a block-diagonal matrix a step is
two products of K B K numbers. HiRes (arXiv 2609.34680) refits an affine map a head of v and three scalars an MLP in
closed form; this is the same for all that the transform can take. x' is rounded again after D, which is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 100
"""Of conjugate gradients, at most."""
TOLERANCE = 1e-8
"""Of the residual, relative to the right-hand side: far below what bfloat16 keeps of a transform."""


def by_block(matrix: Tensor, size: int) -> Tensor:
    """The columns of [K, K] by block: [K / size, K, size], in tensors of their own."""
    groups = len(matrix) // size
    return matrix.view(len(matrix), groups, size).permute(1, 0, 2).contiguous()


def added_to_diagonal(hessian: Tensor, gram: Tensor, damping: float) -> Tensor:
    """damping h s, a scalar."""
    return damping * hessian.diagonal().mean() * gram.diagonal().mean()


def refit_correction(rows: Tensor, columns: Tensor, wanted: Tensor, added: Tensor, shared: bool = False) -> Tensor:
    """D, float64 [G, B, B], or [1, B, B] where one matrix is `shared` by all blocks.

    `rows` and `columns` are H and S `by_block` [G, K, B], `wanted` [G, B, B] the diagonal blocks of C^T W_q; all
    float64. Takes two more matrices [K, K].
    """
    groups, size, _ = wanted.shape

    def together(blocks: Tensor) -> Tensor:
        return blocks.sum(dim=0, keepdim=True) if shared else blocks

    def applied(d: Tensor) -> Tensor:
        moved = torch.bmm(rows, d.expand(groups, size, size))  # [G, K, B]: H times the columns of D, block by block
        whole = moved.view(groups, groups, size, size).permute(1, 2, 0, 3).reshape(groups, size, groups * size)
        del moved
        return together(torch.bmm(whole, columns)) + added * d

    residual = together(wanted)
    found = torch.zeros_like(residual)
    size_of_goal = residual.norm()
    if not size_of_goal:
        return found
    direction = residual
    square = residual.square().sum()
    for _ in range(ROUNDS):
        image = applied(direction)
        step = square / (direction * image).sum()
        found = found + step * direction
        residual = residual - step * image
        before, square = square, residual.square().sum()
        if square.sqrt() <= TOLERANCE * size_of_goal:
            break
        direction = residual + (square / before) * direction
    return found


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Of [K, K] the blocks [K / size, size, size] along the diagonal."""
    groups = len(matrix) // size
    return matrix.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
