"""Second moments on bfloat16 matrix hardware: the specification.

A number is split into bfloat16 numbers, side by side, so that one matrix product computes all products of parts.
bfloat16 numbers have 8 significant bits and their products are exact in float32, so the only loss is what the parts do
not hold. Two parts hold all 11 bits of float16. They hold a float32 number x to 2^-16 |x|: the first part leaves at
most 2^-8 |x|, the second at most 2^-8 of that. A float32 product of n rows may have an error of n 2^-24 of the sum of
magnitudes. From 256 rows on, two parts are therefore the smaller error, and unlike that of the sums it has no preferred
sign.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_CHUNK = 2048
"""The minimum number of rows per chunk. The products in a chunk are summed one after the other, then the sums of the
chunks are added."""
MOST_PARTIAL = 1 << 27
"""The maximum number of float32 elements in the sums of all chunks."""


def count_parts(x: Tensor, is_scaled: bool) -> int:
    """The number of bfloat16 parts of one element of `x`."""
    return 1 if x.dtype == torch.bfloat16 and not is_scaled else 2


def plain_bfloat16_parts(x: Tensor, factors: Tensor | None = None) -> Tensor:
    """`x` [rows, K], each row times its factor [rows, 1], as bfloat16 [rows, K] or [rows, 2 K].

    bfloat16 without factors is one part. Anything else is a first part, followed by its remainder.
    """
    if count_parts(x, factors is not None) == 1:
        return x
    scaled = x.float() if factors is None else x.float() * factors
    first = scaled.to(torch.bfloat16)
    return torch.cat([first, (scaled - first.float()).to(torch.bfloat16)], dim=1)


def moment_of_parts(a: Tensor, b: Tensor, n: int, m: int) -> Tensor:
    """a^T b summed over the parts: float64 [n, m] of 16-bit [rows, p n] and [rows, q m]. b has the type of a.

    Sums are float32. One sum over all rows would lose more bits with more rows. Matrix hardware truncates partial sums,
    so its error would always have the same sign.
    """
    count = _chunks(len(a), a.shape[1] * b.shape[1])
    whole = len(a) // count * count
    left, right = (x[:whole].unflatten(0, (count, whole // count)) for x in (a, b))
    total = _summed(_float32_products(left.mT, right), n, m)
    if whole < len(a):
        total = total + _summed(_float32_products(a[None, whole:].mT, b[None, whole:]), n, m)
    return total.double()


def _chunks(rows: int, elements: int) -> int:
    """The number of chunks of rows, a power of two."""
    count = 1
    while rows // (2 * count) >= LEAST_CHUNK and 2 * count * elements <= MOST_PARTIAL:
        count *= 2
    return count


def _float32_products(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def _summed(products: Tensor, n: int, m: int) -> Tensor:
    """Sums of parts [chunks, p n, q m], as [n, m]."""
    return products.unflatten(2, (-1, m)).unflatten(1, (-1, n)).sum(dim=(0, 1, 3))


def diagonal_blocks(matrix: Tensor, block: int) -> Tensor:
    """The diagonal blocks [K / B, B, B] of [K, K]."""
    tiles = matrix.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    return tiles.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
