"""A matrix for each value head, merged into the linears before and behind attention. The function stays the same.

Attention sums values over tokens. With v U for the values v of a head, it returns its sums times U. With W_o U^-T for
the columns of every head that reads them, o_proj returns its former output. (For one orthogonal matrix per block see
`rotate_heads`.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.models import Family
from mxrot.surgery.smooth import Weights


def reader_moments(reader: Tensor, heads: int, width: int) -> Tensor:
    """W^T W summed over the query heads that read each value head: float64 [heads, D, D], from the reader's weight
    [N, Q * D]."""
    columns = reader.double().unflatten(1, (heads, -1, width)).permute(1, 2, 0, 3).flatten(1, 2)
    return columns.mT @ columns


def fold_values(weights: Weights, bias: Tensor | None, family: Family, matrices: Tensor) -> Tensor | None:
    """Transform the values of each head by its matrix, float64 [heads, D, D], in `weights`.

    The two entries of `weights` become float64, not rounded. Returns the new bias of the values, float64; None if there
    is none.
    """
    heads, width, _ = matrices.shape
    values, reader = family.values, family.values_read_by
    weights[values] = _rows(weights[values], matrices)
    columns = weights[reader].double().unflatten(1, (heads, -1, width))
    folded = torch.einsum("nhqd,hde->nhqe", columns, torch.linalg.inv(matrices).mT)
    weights[reader] = folded.flatten(1)
    return None if bias is None else _rows(bias, matrices)


def _rows(tensor: Tensor, matrices: Tensor) -> Tensor:
    """U^T W for the rows W of each head, the last rows of `tensor`; others may come before. Float64."""
    heads, width, _ = matrices.shape
    exact = tensor.double()
    before, own = exact.split([len(exact) - heads * width, heads * width])
    turned = torch.einsum("hd...,hde->he...", own.unflatten(0, (heads, width)), matrices)
    return torch.cat([before, turned.flatten(0, 1)])
