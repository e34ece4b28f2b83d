"""Second moments on bfloat16 matrix hardware: the specification of what is multiplied there.

A number is taken apart into bfloat16 numbers, side by side, so that one product of matrices does all products of
parts. bfloat16 numbers have 8 significant bits and their products are exact in float32, so what is lost is what the
parts do not hold. Of float16 two parts hold all 11 bits. Of float32 they hold x to 2^-16 |x|: the first part leaves
at most 2^-8 |x|, the second at most 2^-8 of that. A float32 product of n rows may be wrong by n 2^-24 of the sum of
magnitudes, so from 256 rows on two parts are the smaller error; unlike that of the sums it has no sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_CHUNK = 2048
"""Rows whose products are summed one after the other, at least; the sums of such chunks are added up behind them."""
MOST_PARTIAL = 1 << 27
"""Bounds the float32 numbers that the sums of all chunks take together."""


def count_parts(x: Tensor, is_scaled: bool) -> int:
    """How many bfloat16 numbers stand for one of `x`."""
    return 1 if x.dtype == torch.bfloat16 and not is_scaled else 2


def plain_bfloat16_parts(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """`x` [rows, K], each row times its factor [rows, 1], as bfloat16 [rows, K] or [rows, 2 K].

    bfloat16 without factors is one part; everything else is a first part and, behind it, what that has left.
    """
    if count_parts(x, factors is not None) == 1:
        return x
    scaled = x.float() if factors is None else x.float() * factors
    first = scaled.to(torch.bfloat16)
    return torch.cat([first, (scaled - first.float()).to(torch.bfloat16)], dim=1)


def moment_of_parts(a: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    """a^T b summed over the parts: float64 [n, m] of 16-bit [rows, p n] and [rows, q m]; b has the type of a.

    Sums are float32. One over all rows would lose bits with their number, and on matrix hardware, which cuts partial
    sums off, always in the same direction.
    """
    count = _chunks(len(a), a.shape[1] * b.shape[1])
    whole = len(a) // count * count
    left, right = (x[:whole].unflatten(0, (count, whole // count)) for x in (a, b))
    total = _summed(_float32_products(left.mT, right), n, m)
    if whole < len(a):
        total = total + _summed(_float32_products(a[None, whole:].mT, b[None, whole:]), n, m)
    return total.double()


def _chunks(rows: int, elements: int) -> int:
    """Into how many chunks the rows are cut: a power of two."""
    count = 1
    while rows // (2 * count) >= LEAST_CHUNK and 2 * count * elements <= MOST_PARTIAL:
        count *= 2
    return count


def _float32_products(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _summed(products: Tensor, n: int, m: int) -> Tensor:
    """[chunks, p n, q m] to [n, m]."""
    return products.unflatten(2, (-1, m)).unflatten(1, (-1, n)).sum(dim=(0, 1, 3))


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """[K, K] to the blocks on its diagonal, [K / B, B, B]."""
    tiles = matrix.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
