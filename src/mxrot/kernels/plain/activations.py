"""Transform and quantization of activations: the specification."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxrot.formats import Format, ScaleRule, encode_blocks, fake_quantize, pack_codes, round_blocks
from mxrot.formats.exponents import E8M0_BIAS
from mxrot.transforms.stages import apply_matrices


def plain_rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) in float32, in the shape of `x` [..., K]. `matrices` float32 [1 | G, B, B], or None for no transform."""
    transformed = x.to(torch.float32)
    if matrices is not None:
        transformed = apply_matrices(transformed, matrices.to(torch.float32))
    return fake_quantize(transformed, format, rule)


E5M2_EXPONENTS = -15, 13
"""The least and the largest exponent e for which every E2M1 number times 2^e is an E5M2 number."""


@dataclass(frozen=True)
class PackedRows:
    """MXFP4 in the layout that matrix hardware reads."""

    codes: Tensor
    """Two codes per byte, the even column in the low half: uint8 [..., K/2]."""
    scales: Tensor
    """E8M0 bytes, uint8 [..., K/32], or in the order of `swizzle_scales`. 255 for a block that held NaN or Inf."""


def plain_rotate_quantize_packed(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, swizzled: bool = False
) -> PackedRows:
    """Q(x T) as codes and scales of MXFP4. A block that holds NaN or Inf has the codes 0 and the scale NaN."""
    assert format.element.bits == 4
    blocks = _transformed_blocks(x, matrices, format)
    scales = format.uniform.choose(blocks, rule)
    is_finite = scales.values().isfinite()[..., None]
    quantized = encode_blocks(torch.where(is_finite, blocks, 0.0), scales, format)
    codes = torch.where(is_finite, quantized.codes.unflatten(-1, (-1, format.block)), 0).flatten(-2)
    stored = scales.stored
    return PackedRows(pack_codes(codes, 4), swizzle_scales(stored.flatten(0, -2)) if swizzled else stored)


def plain_rotate_quantize_e5m2(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, shift: int = 0
) -> Tensor:
    """Q(x T) / 2^shift as E5M2, in the shape of `x` [..., K]; for MXFP4.

    Exact for all exponents from shift - 15 to shift + 13. Smaller exponents are raised to the least of these, which
    rounds to multiples of 2^(shift - 16). Larger ones are lowered, and the block is clipped at 6 * 2^(shift + 13).
    """
    blocks = _transformed_blocks(x, matrices, format)
    scales = format.uniform.choose(blocks, rule)
    least, most = (bound + shift + E8M0_BIAS for bound in E5M2_EXPONENTS)
    limited = scales.stored.clamp(least, most)
    scales = replace(scales, stored=torch.where(scales.stored == 255, scales.stored, limited))
    values = round_blocks(blocks, scales, format).flatten(-2)
    return (values * 2.0**-shift).to(torch.float8_e5m2)


def in_pairs(values: Tensor) -> Tensor:
    """`values` [..., K] with the 32 of each block in the order of `skinny_product`.

    Column 8 j + 4 a + 2 b + c moves to 16 b + 4 j + 2 a + c. Four bytes then hold two pairs of columns that are four
    apart, and the first half of a block holds all columns with b = 0.
    """
    return values.unflatten(-1, (-1, 4, 2, 2, 2)).permute(*range(values.dim()), -2, -4, -3, -1).flatten(-5)


def out_of_pairs(values: Tensor) -> Tensor:
    """The inverse of `in_pairs`."""
    return values.unflatten(-1, (-1, 2, 4, 2, 2)).permute(*range(values.dim()), -3, -2, -4, -1).flatten(-5)


def across_blocks(values: Tensor) -> Tensor:
    """`values` [..., K] in the order of `middle_product`. K is a multiple of 128.

    The order takes the first four columns of each of four neighbouring blocks, then the next four of each, and so on:
    column 32 t + 4 j + b of 128 moves to 16 j + 4 t + b.
    """
    return values.unflatten(-1, (-1, 4, 8, 4)).transpose(-3, -2).flatten(-4)


def out_of_blocks(values: Tensor) -> Tensor:
    """The inverse of `across_blocks`."""
    return values.unflatten(-1, (-1, 8, 4, 4)).transpose(-3, -2).flatten(-4)


def swizzled_bytes(rows: int, groups: int) -> int:
    """The number of bytes that `swizzle_scales` returns."""
    return -(-rows // 128) * -(-groups // 4) * 512


def swizzle_scales(scales: Tensor) -> Tensor:
    """E8M0 bytes [M, K/32] in the order in which Blackwell's block-scaled products read them, uint8 [bytes].

    Tiles of 128 rows by 4 blocks have 512 bytes each, and follow each other row by row. The byte of row r and block g
    of a tile is at (r mod 32) * 16 + (r div 32) * 4 + g (cuBLAS, "1D block scaling factors layout"). The edges are
    padded with 0.
    """
    rows, groups = scales.shape
    tall, wide = -(-rows // 128), -(-groups // 4)
    padded = torch.nn.functional.pad(scales, (0, 4 * wide - groups, 0, 128 * tall - rows))
    tiles = padded.view(tall, 4, 32, wide, 4)  # tile row, row div 32, row mod 32, tile column, block
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def _transformed_blocks(x: Tensor, matrices: Tensor | None, format: Format) -> Tensor:
    transformed = x.to(torch.float32)
    if matrices is not None:
        transformed = apply_matrices(transformed, matrices.to(torch.float32))
    return transformed.unflatten(-1, (-1, format.block))
