"""Slow exact twin of GPTQ: the closed form of Optimal Brain Surgeon, with a fresh inverse after every column.

With H the damped Hessian of the columns still open, rounding column j by the error e = w_j - q_j is made up for
best by w_rest -= e Hinv[j, rest] / Hinv[j, j] (GPTQ, arXiv 2210.17323, equation 2). No Cholesky factor, no lazy
updates, no blocks but those that choose scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats import Format, Parts, ScaleRule, as_blocks, round_blocks


def round_columns(
    weight: Tensor, hessian: Tensor, damping: float, order: list[int], format: Format, rule: ScaleRule, reached: bool
) -> Tensor:
    """The rounded values [N, K] of float64 `weight`, columns taken in `order`.

    With `reached` the scales of a block come from the weights as they are when its first column is taken,
    else from the weights as they came.
    """
    weight, rounded = weight.clone(), torch.zeros_like(weight)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    block = format.block_in(weight.shape[1])
    parts = format.grid.choose(as_blocks(weight, format, "w"), rule)
    remaining = list(order)
    for column in order:
        group = column // block
        if reached and column % block == 0:
            parts_here = format.grid.choose(weight[:, None, column : column + block], rule)
        elif not reached:
            parts_here = parts.of_blocks(slice(group, group + 1))
        rounded[:, column] = round_column(weight[:, column], parts_here, format)
        inverse = torch.linalg.inv(damped[remaining][:, remaining])
        position = remaining.index(column)
        error = (weight[:, column] - rounded[:, column]) / inverse[position, position]
        weight[:, remaining] -= error[:, None] * inverse[position]
        remaining.remove(column)
    return rounded


def round_column(column: Tensor, parts: Parts, format: Format) -> Tensor:
    """Values of column [N] under parts [N, 1], each row by itself."""
    return round_blocks(column[:, None, None], parts, format)[:, 0, 0]
