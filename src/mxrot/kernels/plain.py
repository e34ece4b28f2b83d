"""The specification of each kernel, in plain PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxrot.formats import (
    BlockScales,
    Format,
    QTensor,
    ScaleRule,
    choose_scales,
    encode_blocks,
    fake_quantize,
    get_format,
    pack_codes,
    round_blocks,
    unpack_codes,
)
from mxrot.formats.element import Element, powers_of_two
from mxrot.formats.scale import E8M0_BIAS
from mxrot.transforms.base import apply_matrices


@dataclass(frozen=True)
class RoundedColumns:
    """A block of columns after GPTQ has walked over it."""

    values: Tensor
    """Rounded values on the grid of the chosen scales, float64 [N, B]."""
    differences: Tensor
    """What each column, as the walk found it, lost by rounding: float64 [N, B]."""
    chosen: Tensor
    """Index of the scales that cost each row least, int64 [N]."""


@dataclass(frozen=True)
class WeightMoves:
    """Where tunable weights [N, K] start, and what moves them besides their own offsets."""

    value: Tensor
    """Their values at the start, on the grid; bfloat16 [N, K]."""
    up: Tensor
    """Distance to the next larger value of the grid, 0 at its end; bfloat16 [N, K]."""
    down: Tensor
    """Distance to the next smaller one."""
    scales: Tensor
    """A power of two for each block of 32, float32 [N, K/32]."""
    follow: Tensor | None = None
    """What a moving transform multiplies weights with, float32 [1 | K/32, 32, 32]; None for nothing."""


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of a loss, float32."""

    offset: Tensor
    """[N, K]."""
    follow: Tensor | None
    """The shape of `follow`; None where there is none."""
    exponent: Tensor | None
    """For the binary logarithm of each scale, [N, K/32]; None if not asked for."""


def plain_moved_weights(offset: Tensor, moves: WeightMoves, element: Element) -> Tensor:
    """Tunable weights as they are for these offsets float32 [N, K]: on the grid, bfloat16 [N, K].

    An offset is the way to a neighbour, up or down by its sign, in units of its distance. Where it leads the weight
    is multiplied by `follow`, and rounded on the grid of `scales`.
    """
    weight, _ = _continuous(offset, moves)
    scales = moves.scales.repeat_interleave(offset.shape[1] // moves.scales.shape[1], dim=1)
    return (element.round(_followed(weight, moves) / scales) * scales).to(torch.bfloat16)


def plain_moved_weights_gradients(
    gradient: Tensor, offset: Tensor, moves: WeightMoves, element: Element, wants_exponent: bool
) -> WeightGradients:
    """Gradients of what moves the weights, from the `gradient` [N, K] of the moved ones, as if nothing were rounded.

    That of an exponent is the one of LSQ (arXiv 1902.08153, section 2.1): ln 2 times what rounding added, or the
    whole value where it was cut off.
    """
    weight, distance = _continuous(offset, moves)
    gradient = gradient.float()
    of_weight, of_follow, of_exponent = gradient, None, None
    if moves.follow is not None:
        size = moves.follow.shape[-1]
        of_weight = apply_matrices(gradient, moves.follow.mT)
        before, after = (x.unflatten(1, (-1, size)).transpose(0, 1) for x in (weight, gradient))
        of_follow = before.mT @ after
        if len(moves.follow) == 1:
            of_follow = of_follow.sum(dim=0, keepdim=True)
    if wants_exponent:
        scales = moves.scales.repeat_interleave(offset.shape[1] // moves.scales.shape[1], dim=1)
        followed = _followed(weight, moves)
        kept = torch.where((followed / scales).abs() > element.max, 0.0, followed)
        error = element.round(followed / scales) * scales - kept
        of_exponent = (gradient * error).unflatten(1, (moves.scales.shape[1], -1)).sum(dim=-1) * math.log(2)
    return WeightGradients(of_weight * distance, of_follow, of_exponent)


def _continuous(offset: Tensor, moves: WeightMoves) -> tuple[Tensor, Tensor]:
    """The weights that are rounded, before they follow the transform, and the distances that offsets count in."""
    distance = torch.where(offset > 0, moves.up, moves.down).float()
    return moves.value.float() + offset * distance, distance


def _followed(weight: Tensor, moves: WeightMoves) -> Tensor:
    return weight if moves.follow is None else apply_matrices(weight, moves.follow)


def plain_divergence(expected: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """KL(expected || found) in nats of each row of logits [M, V]: float32 [M], and its gradient for `found` [M, V]."""
    wanted, had = (torch.log_softmax(logits.float(), dim=-1) for logits in (expected, found))
    chances = wanted.exp()
    return (chances * (wanted - had)).sum(dim=-1), (had.exp() - chances).to(found.dtype)


def plain_rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) in float32, the shape of `x` [..., K]; `matrices` float32 [1 | G, B, B], or None for no transform."""
    transformed = x.to(torch.float32)
    if matrices is not None:
        transformed = apply_matrices(transformed, matrices.to(torch.float32))
    return fake_quantize(transformed, format, rule)


E5M2_EXPONENTS = -15, 13
"""Exponents e for which every E2M1 number times 2^e is an E5M2 number."""


@dataclass(frozen=True)
class PackedRows:
    """MXFP4 as matrix hardware reads it."""

    codes: Tensor
    """Two codes a byte, the even column in the low half: uint8 [..., K/2]."""
    scales: Tensor
    """E8M0 bytes, uint8 [..., K/32], or in the order of `swizzle_scales`; 255 for a block that held NaN or Inf."""


def plain_rotate_quantize_packed(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, swizzled: bool = False
) -> PackedRows:
    """Q(x T) as codes and scales of MXFP4; a block that holds NaN or Inf has the codes 0 and the scale NaN."""
    assert format.element.bits == 4
    blocks = _transformed_blocks(x, matrices, format)
    scales = choose_scales(blocks, format, rule)
    is_finite = scales.values().isfinite()[..., None]
    quantized = encode_blocks(torch.where(is_finite, blocks, 0.0), scales, format)
    codes = torch.where(is_finite, quantized.codes.unflatten(-1, (-1, format.block)), 0).flatten(-2)
    stored = scales.stored
    return PackedRows(pack_codes(codes, 4), swizzle_scales(stored.flatten(0, -2)) if swizzled else stored)


def plain_rotate_quantize_e5m2(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, shift: int = 0
) -> Tensor:
    """Q(x T) / 2^shift as E5M2, the shape of `x` [..., K]; for MXFP4.

    Exact for all exponents from shift - 15 to shift + 13. Smaller ones are raised to the least of these, which rounds
    to multiples of 2^(shift - 16); larger ones are lowered, and the block is cut off at 6 * 2^(shift + 13).
    """
    blocks = _transformed_blocks(x, matrices, format)
    scales = choose_scales(blocks, format, rule)
    least, most = (bound + shift + E8M0_BIAS for bound in E5M2_EXPONENTS)
    limited = scales.stored.clamp(least, most)
    scales = replace(scales, stored=torch.where(scales.stored == 255, scales.stored, limited))
    values = round_blocks(blocks, scales, format).flatten(-2)
    return (values * 2.0**-shift).to(torch.float8_e5m2)


E4M3_SHIFTS = -8, 6
"""Exponents d for which every E2M1 number times 2^d is an E4M3 number."""


def lift_exponents(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent of each row of lifted weights, int32 [N], and how many of their blocks do not fit below it.

    `codes` uint8 [N, K/2], two of E2M1 a byte, `scales` E8M0 bytes [N, K/32]. The largest block of a row is lifted by
    2^6; a block of zeros fits anywhere. The count is an int64 scalar.
    """
    has_value = (codes.unflatten(1, (-1, 16)) & 0x77).amax(dim=2) > 0
    exponents = scales.to(torch.int32) - E8M0_BIAS
    lowest, highest = E4M3_SHIFTS
    largest = torch.where(has_value, exponents, -E8M0_BIAS).amax(dim=1)
    rows = (largest - highest).clamp(min=-126)  # 2^row is a normal number
    return rows, (has_value & (exponents - rows[:, None] < lowest)).sum()


def plain_lift_weights(codes: Tensor, scales: Tensor, row_exponents: Tensor) -> Tensor:
    """MXFP4 weights over 2^(exponent of their row), as E4M3 [N, K].

    Exact but for the blocks that `lift_exponents` counts; those are rounded to multiples of 2^-9.
    """
    element = get_format("mxfp4").element
    values = element.decode(unpack_codes(codes, 4), torch.float32).unflatten(1, (-1, 32))
    shifts = (scales.to(torch.int32) - E8M0_BIAS - row_exponents[:, None]).clamp(-32, E4M3_SHIFTS[1])
    lifted = values * powers_of_two(shifts)[..., None]
    fine = torch.copysign((lifted * 512).round() / 512, lifted)
    return torch.where(lifted.abs() < 2.0**-6, fine, lifted).flatten(1).to(torch.float8_e4m3fn)


def swizzled_bytes(rows: int, groups: int) -> int:
    """How many bytes `swizzle_scales` gives."""
    return -(-rows // 128) * -(-groups // 4) * 512


def swizzle_scales(scales: Tensor) -> Tensor:
    """E8M0 bytes [M, K/32] in the order in which Blackwell's block-scaled products read them, uint8 [bytes].

    Tiles of 128 rows by 4 blocks, row after row of tiles, 512 bytes each: the byte of row r and block g of a tile is
    at (r mod 32) * 16 + (r div 32) * 4 + g (cuBLAS, "1D block scaling factors layout"). What is missing at the edges
    is filled with 0.
    """
    rows, groups = scales.shape
    tall, wide = -(-rows // 128), -(-groups // 4)
    padded = torch.nn.functional.pad(scales, (0, 4 * wide - groups, 0, 128 * tall - rows))
    tiles = padded.view(tall, 4, 32, wide, 4)  # tile row, row div 32, row mod 32, tile column, block
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def plain_packed_product(inputs: PackedRows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 inputs [..., K] by MXFP4 weights, uint8 codes [N, K/2] and E8M0 scales [N, K/32]: `dtype` [..., N].

    Products of codes are exact, sums are float32.
    """
    format = get_format("mxfp4")
    x, w = (
        QTensor.dequantize_packed(c, BlockScales(s, format.scale), format)
        for c, s in ((inputs.codes, inputs.scales), (codes, scales))
    )
    return (x @ w.mT).to(dtype)


def plain_lifted_product(inputs: Tensor, shift: int, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """E5M2 inputs [..., K] times 2^shift by MXFP4 weights, uint8 codes [N, K/2] and E8M0 scales [N, K/32].

    `dtype` [..., N]; sums are float32.
    """
    format = get_format("mxfp4")
    weights = QTensor.dequantize_packed(codes, BlockScales(scales, format.scale), format)
    return (inputs.float() @ weights.mT * 2.0**shift).to(dtype)


def _transformed_blocks(x: Tensor, matrices: Tensor | None, format: Format) -> Tensor:
    transformed = x.to(torch.float32)
    if matrices is not None:
        transformed = apply_matrices(transformed, matrices.to(torch.float32))
    return transformed.unflatten(-1, (-1, format.block))


def plain_round_columns(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> RoundedColumns:
    """Round the columns of a block one after the other, and let those still open make up for the error of each.

    `columns` float64 [N, B]; `scales` float64 [C, N, B], of which each row keeps the one whose walk costs
    sum_j (difference_j / upper_jj)^2 least, of equals the first; `upper` float64 [B, B], the block on the diagonal
    of the Cholesky factor of the inverse Hessian; `zeros` float64 [N, B] codes that stand for 0, or None.
    """
    best: RoundedColumns | None = None
    least = columns.new_full((len(columns),), torch.inf)
    for index, candidate in enumerate(scales):
        values, differences = _walk(columns, candidate, upper, zeros, element)
        chosen = torch.full(least.shape, index, device=least.device)
        if best is None:
            best = RoundedColumns(values, differences, chosen)
        if len(scales) == 1:
            break
        cost = (differences / upper.diagonal()).square().sum(dim=1)
        better = cost < least
        least = torch.where(better, cost, least)
        best = RoundedColumns(
            torch.where(better[:, None], values, best.values),
            torch.where(better[:, None], differences, best.differences),
            torch.where(better, chosen, best.chosen),
        )
    assert best is not None
    return best


def _walk(
    columns: Tensor, scales: Tensor, upper: Tensor, zeros: Tensor | None, element: Element
) -> tuple[Tensor, Tensor]:
    """Rounded values and differences [N, B] under one set of scales."""
    ratios = upper / upper.diagonal()[:, None]
    # Transposed, so that each step works on contiguous rows; a step is a few short kernels, and their number is
    # what a GPU waits for.
    local = columns.t().clone(memory_format=torch.contiguous_format)  # of one row, contiguous() is no copy
    scale = scales.t().contiguous()
    divisor = torch.where(scale == 0, torch.inf, scale)
    zero = None if zeros is None else zeros.t().contiguous()
    rounded, differences = torch.empty_like(local), torch.empty_like(local)
    for j in range(len(local)):
        scaled = local[j] / divisor[j]
        if zero is None:
            torch.mul(element.round(scaled), scale[j], out=rounded[j])
        else:
            torch.mul(element.round(scaled + zero[j]) - zero[j], scale[j], out=rounded[j])
        torch.sub(local[j], rounded[j], out=differences[j])
        local[j + 1 :].addr_(ratios[j, j + 1 :], differences[j], alpha=-1)
    return rounded.t(), differences.t()
