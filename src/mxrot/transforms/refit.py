"""Refit a transform after its weights are quantized: block-diagonal least squares, in closed form.

The outputs of a site are x' W_q^T with x' = Q(x T). A correction T <- T (I + D), D block-diagonal, changes them by
about x' D W_q^T. Let H be the mean of x'^T x', S = W_q^T W_q, and C the mean of r^T x', where r is what the outputs
lack. The mean of |r - x' D W_q^T|^2 is least if for each block g

    sum_h H_gh D_h S_hg + damping h s D_g = (C^T W_q)_gg

with h and s the mean diagonals of H and S. Conjugate gradients solve this: for a block-diagonal D a step is two
products of K B K numbers. HiRes (arXiv 2609.34680) refits an affine map per head of v and three scalars per MLP in
closed form. This does the same for every value of the transform. The second rounding of x' after D is neglected.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 100
"""The most steps of conjugate gradients."""
TOLERANCE = 1e-8
"""The residual relative to the right-hand side: far below the precision of a transform in bfloat16."""


def by_block(matrix: Tensor, size: int) -> Tensor:
    """The columns of [K, K] by block, [K / size, K, size], copied to a new tensor."""
    groups = len(matrix) // size
    return matrix.view(len(matrix), groups, size).permute(1, 0, 2).contiguous()


def added_to_diagonal(hessian: Tensor, gram: Tensor, damping: float) -> Tensor:
    """damping h s, a scalar."""
    return damping * hessian.diagonal().mean() * gram.diagonal().mean()


def refit_correction(rows: Tensor, columns: Tensor, wanted: Tensor, added: Tensor, shared: bool = False) -> Tensor:
    """D, float64 [G, B, B], or [1, B, B] if one matrix is `shared` by all blocks.

    `rows` and `columns` are H and S `by_block` [G, K, B], and `wanted` [G, B, B] the diagonal blocks of C^T W_q; all
    float64. It takes two more matrices [K, K].
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
    """The blocks [K / size, size, size] on the diagonal of [K, K]."""
    groups = len(matrix) // size
    return matrix.view(groups, size, groups, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
