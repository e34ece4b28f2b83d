"""Products with packed weights, and weights lifted to FP8: the specification."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format, unpack_codes
from mxrot.formats.element import powers_of_two
from mxrot.formats.exponents import E8M0_BIAS
from mxrot.kernels.plain.activations import PackedRows, out_of_blocks, out_of_pairs

E4M3_SHIFTS = -8, 6
"""The least and the largest exponent d for which every E2M1 number times 2^d is an E4M3 number."""


def lift_exponents(codes: Tensor, scales: Tensor, together: bool = False) -> tuple[Tensor, Tensor]:
    """The exponent of each row of lifted weights, int32 [N], and the number of their blocks that do not fit below it.

    `codes` uint8 [N, K/2], two E2M1 codes per byte, `scales` E8M0 bytes [N, K/32]. The largest block of a row is lifted
    by 2^6. With `together`, the largest block of all rows is, and all rows have the same exponent. A block of zeros
    always fits. The count is an int64 scalar.
    """
    has_value = (codes.unflatten(1, (-1, 16)) & 0x77).amax(dim=2) > 0
    exponents = scales.to(torch.int32) - E8M0_BIAS
    lowest, highest = E4M3_SHIFTS
    largest = torch.where(has_value, exponents, -E8M0_BIAS).amax(dim=1)
    if together:
        largest = largest.amax().expand(len(largest)).contiguous()
    rows = (largest - highest).clamp(min=-126)  # 2^row is a normal number
    return rows, (has_value & (exponents - rows[:, None] < lowest)).sum()


def plain_lift_weights(codes: Tensor, scales: Tensor, row_exponents: Tensor) -> Tensor:
    """MXFP4 weights divided by 2^(exponent of their row), as E4M3 [N, K].

    Exact except for the blocks that `lift_exponents` counts. These are rounded to multiples of 2^-9.
    """
    element = get_format("mxfp4").element
    values = element.decode(unpack_codes(codes, 4), torch.float32).unflatten(1, (-1, 32))
    shifts = (scales.to(torch.int32) - E8M0_BIAS - row_exponents[:, None]).clamp(-32, E4M3_SHIFTS[1])
    lifted = values * powers_of_two(shifts)[..., None]
    fine = torch.copysign((lifted * 512).round() / 512, lifted)
    return torch.where(lifted.abs() < 2.0**-6, fine, lifted).flatten(1).to(torch.float8_e4m3fn)


def lift_rows(
    inputs: PackedRows, lift: Callable[[Tensor, Tensor, Tensor], Tensor] = plain_lift_weights
) -> tuple[Tensor, Tensor]:
    """MXFP4 inputs [..., K] as E4M3 with one power of two per token: E4M3 [..., K] and its exponents, int32 [...].

    For inputs beyond the range of E5M2 (`plain_rotate_quantize_e5m2`). Blocks that are 2^14 or more below the largest
    block of their token are rounded to multiples of 2^-15 of its scale.
    """
    codes, scales = inputs.codes.flatten(0, -2), inputs.scales.flatten(0, -2)
    exponents, _ = lift_exponents(codes, scales)
    shape = inputs.codes.shape[:-1]
    return lift(codes, scales, exponents).view(*shape, -1), exponents.view(shape)


def plain_packed_product(inputs: PackedRows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 inputs [..., K] times MXFP4 weights, uint8 codes [N, K/2] and E8M0 scales [N, K/32]: `dtype` [..., N].

    Products of codes are exact, sums are float32.
    """
    format = get_format("mxfp4")
    x, w = (
        QTensor.dequantize_packed(c, BlockScales(s, format.scale), format)
        for c, s in ((inputs.codes, inputs.scales), (codes, scales))
    )
    return (x @ w.mT).to(dtype)


def plain_paired_product(
    inputs: Tensor, codes: Tensor, scales: Tensor, row_exponents: Tensor, dtype: torch.dtype
) -> Tensor:
    """E5M2 inputs [..., K] in the order of `in_pairs` times MXFP4 weights that can be lifted: `dtype` [..., N].

    `codes` uint8 [N, K/2], `scales` E8M0 bytes [N, K/32] and `row_exponents` int32 [N] are as for `plain_lift_weights`.
    Products are exact, sums are float32.
    """
    # Not all devices can copy a float8 tensor, but all can copy its bytes.
    ordered = out_of_pairs(inputs.view(torch.uint8)).view(inputs.dtype)
    lifted = plain_lift_weights(codes, scales, row_exponents)
    return plain_fp8_product(ordered, lifted, torch.exp2(row_exponents.float()), dtype)


def plain_middle_product(
    inputs: Tensor, codes: Tensor, scales: Tensor, row_exponents: Tensor, dtype: torch.dtype
) -> Tensor:
    """`plain_paired_product`, with inputs in the order of `across_blocks`."""
    ordered = out_of_blocks(inputs.view(torch.uint8)).view(inputs.dtype)
    lifted = plain_lift_weights(codes, scales, row_exponents)
    return plain_fp8_product(ordered, lifted, torch.exp2(row_exponents.float()), dtype)


def plain_fp8_product(inputs: Tensor, weights: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition of `fp8_product`, in float32 on any device."""
    return (inputs.float() @ weights.float().mT * scales).to(dtype)
