"""A few rows of MXFP4 inputs times packed MXFP4 weights, on float16 matrix hardware (Triton).

In generation the weights are read once and little is computed with them. Memory limits the speed as long as a code
costs few instructions and enough bytes are being loaded at any time. Hence:

- Weights and inputs are loaded one step before they are used. The branch around these loads keeps a compiler from
  moving them behind the arithmetic. The first weights are loaded before the inputs are ready: the kernel is launched
  while the kernel that writes them runs.
- A program processes a few rows, along all of K. Each warp handles its own share of the blocks, and the shares are
  added at the end, in a fixed order. Even a small layer thus fills a device.
- A code becomes a float16 number, which holds code and scale exactly if they are an E4M3 number times one power of two
  for the row (`plain.lift_exponents`). The three bits of a magnitude, put where exponent and fraction of float16 meet,
  are 2^-14 times its value. One product, of two numbers at a time, raises them and applies the scale of the block. A
  sum therefore runs over all of K in float32, without a step for each block, and the power of two of the row is applied
  last.
- Inputs are E5M2, which are the upper halves of float16 numbers. Their order puts two that are multiplied together side
  by side (`plain.in_pairs`): one instruction for two of them. Packed codes would be half the bytes, but every program
  would spend a third of its time on decoding them.
- A sum may run over K in any order. Each thread loads whole blocks, 16 bytes at a time, and the order is that of the
  matrix hardware's operands, so threads exchange nothing. This relies on how Triton distributes loaded data. If it
  distributes otherwise, the result is the same, through shared memory and slower.

`plain_paired_product` is the specification, up to the order of the sums. Triton's interpreter has no inline assembly,
so the numbers are float32 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from mxrot.kernels.crossovers import MOST_ROWS
from mxrot.kernels.fused.arithmetic import power_of_two
from mxrot.kernels.fused.overlap import can_overlap


def _decoder(sign: str, magnitude: str) -> tl.constexpr:
    """Assembly that converts one code of each of two 16-bit units ($1), with the factor of their block twice ($2), to
    two float16 numbers. `sign` and `magnitude` move the code's sign to bit 15 and its magnitude to bits 11 to 9.

    lop3 0xEA is (sign & 0x80008000) | magnitude.
    """
    return tl.constexpr(
        f"""{{
        .reg .b32 sign, number;
        {sign}
        {magnitude}
        and.b32 number, number, 0x0E000E00;
        lop3.b32 number, sign, 0x80008000, number, 0xEA;
        mul.rn.f16x2 $0, number, $2;
        }}"""
    )


_FIRST = _decoder("shl.b32 sign, $1, 12;", "shl.b32 number, $1, 9;")
_SECOND = _decoder("shl.b32 sign, $1, 8;", "shl.b32 number, $1, 5;")
_THIRD = _decoder("shl.b32 sign, $1, 4;", "shl.b32 number, $1, 1;")
_FOURTH = _decoder("mov.b32 sign, $1;", "shr.u32 number, $1, 3;")
_LOWER = tl.constexpr("{ .reg .b32 moved; shl.b32 moved, $1, 8; and.b32 $0, moved, 0xFF00FF00; }")
_UPPER = tl.constexpr("and.b32 $0, $1, 0xFF00FF00;")
RAISED = tl.constexpr(5)
"""Weights are multiplied as E4M3 numbers divided by 2^5: with scales up to 2^1, the factors that lift codes are
finite."""


@triton.jit
def _decode(units, factors, PLACE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The numbers of the codes in bits 4 PLACE to 4 PLACE + 3 of 16-bit units, with their `_factors`: float16, or
    float32."""
    if not ASSEMBLY:
        codes = (units.to(tl.int32) >> (4 * PLACE)) & 15
        numbers = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True)
        return numbers * 2.0**112 * factors
    elif PLACE == 0:
        return tl.inline_asm_elementwise(_FIRST, "=r,r,r", [units, factors], tl.float16, True, 2)
    elif PLACE == 1:
        return tl.inline_asm_elementwise(_SECOND, "=r,r,r", [units, factors], tl.float16, True, 2)
    elif PLACE == 2:
        return tl.inline_asm_elementwise(_THIRD, "=r,r,r", [units, factors], tl.float16, True, 2)
    else:
        return tl.inline_asm_elementwise(_FOURTH, "=r,r,r", [units, factors], tl.float16, True, 2)


@triton.jit
def _factors(exponents, ASSEMBLY: tl.constexpr):
    """2^(14 + e - RAISED), float16 or float32, for int32 e up to 6, and 2^-14 for all below -23."""
    fields = tl.maximum(exponents + (29 - RAISED), 1)
    if ASSEMBLY:
        return (fields << 10).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        return ((fields + 112) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _places(ROWS: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Row, block and index below EACH in it, of the elements of [ROWS / 8, RUN, WARPS, 8, 4, EACH] in one dimension."""
    places = tl.arange(0, ROWS * RUN * WARPS * 4 * EACH)
    threads, octets, warps = places // EACH % 4, places // (4 * EACH) % 8, places // (32 * EACH) % WARPS
    others = places // (32 * EACH * WARPS)
    return others // RUN * 8 + octets, (warps * RUN + others % RUN) * 4 + threads, places % EACH


@triton.jit
def _load(
    pointer,
    first_row,
    first_block,
    rows_in_all,
    groups_in_all,
    EACH: tl.constexpr,
    OF: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,
    POLICY: tl.constexpr,
):
    """The first EACH of the OF numbers in each block, [1, N] of [ROWS / 8, RUN, WARPS, 8, 4, EACH]; [N] if EACH is 1.

    Rows beyond the end are replaced by the last one, blocks beyond the end by zeros.
    """
    start = first_row.to(tl.int64) * groups_in_all + first_block
    row, block, which = _places(ROWS, EACH, RUN, WARPS)
    at = tl.minimum(row, rows_in_all - 1 - first_row) * groups_in_all + block
    if EACH == 1:
        at = tl.max_contiguous(at, 1)  # one byte per thread
    else:
        # Two dimensions, so that scales never have the layout of words.
        at, block = (at * OF + which)[None, :], block[None, :]
    inside = None if WHOLE else first_block + block < groups_in_all
    return tl.load(pointer + start * OF + at, mask=inside, other=None if WHOLE else 0, eviction_policy=POLICY)


@triton.jit
def _load_inputs(
    pointer,
    first_row,
    first_block,
    rows_in_all,
    groups_in_all,
    INPUTS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The words of both halves of each block."""
    first = _load(pointer, first_row, first_block, rows_in_all, groups_in_all, 4, 8, INPUTS, RUN, WARPS, WHOLE, "")
    second = _load(pointer + 4, first_row, first_block, rows_in_all, groups_in_all, 4, 8, INPUTS, RUN, WARPS, WHOLE, "")
    return first, second


@triton.jit
def _operand(numbers, EIGHTS: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Numbers [EIGHTS, RUN, WARPS, 8, 4, 8] as [WARPS, ROWS, RUN * 32].

    A thread holds four neighbours of K, then come the four threads of a row. Triton passes operands to the matrix
    hardware in this order if they have 16 bits and no load is in the same loop.
    """
    numbers = tl.reshape(numbers, [EIGHTS, RUN, WARPS, 8, 4, 2, 4])
    return tl.reshape(tl.permute(numbers, [2, 0, 3, 1, 5, 4, 6]), [WARPS, EIGHTS * 8, RUN * 32])


@triton.jit
def _units(words):
    """The lower and the upper half of each word."""
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit
def _weights(words, exponents, PLACE: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """One code of each half of the words of weights, as numbers [WARPS, ROWS, RUN * 32]."""
    EIGHTS: tl.constexpr = words.shape[1] // (RUN * WARPS * 128)
    factors = tl.reshape(_factors(exponents, ASSEMBLY), [EIGHTS, RUN, WARPS, 8, 4, 1])
    factors = tl.broadcast_to(factors, [EIGHTS, RUN, WARPS, 8, 4, 8])
    units = tl.reshape(_units(words), [EIGHTS, RUN, WARPS, 8, 4, 8])
    return _operand(_decode(units, factors, PLACE, ASSEMBLY), EIGHTS, RUN, WARPS)


@triton.jit
def _values(words, PLACE: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The inputs for `_weights` of this PLACE, [WARPS, INPUTS, RUN * 32], from words of four E5M2 each, which PLACE 0
    and 1, or 2 and 3, share."""
    EIGHTS: tl.constexpr = words.shape[1] // (RUN * WARPS * 128)
    units = tl.reshape(_units(words), [EIGHTS, RUN, WARPS, 8, 4, 8])
    if not ASSEMBLY:
        bits = units if PLACE % 2 == 1 else units << 8
        numbers = (bits & -256).to(tl.float16, bitcast=True).to(tl.float32)
    elif PLACE % 2 == 1:
        numbers = tl.inline_asm_elementwise(_UPPER, "=r,r", [units], tl.float16, True, 2)
    else:
        numbers = tl.inline_asm_elementwise(_LOWER, "=r,r", [units], tl.float16, True, 2)
    return _operand(numbers, EIGHTS, RUN, WARPS)


@triton.jit
def _add_products(total, weights, inputs, ASSEMBLY: tl.constexpr):
    """total + weights inputs^T: [WARPS, ROWS, K] by [WARPS, INPUTS, K]."""
    if ASSEMBLY:
        return tl.dot(weights, tl.permute(inputs, [0, 2, 1]), total)
    else:
        return total + tl.dot(weights, tl.permute(inputs, [0, 2, 1]), input_precision="ieee")


@triton.jit(do_not_specialize=["inputs_in_all"])
def _packed_product(
    inputs_pointer,
    words_pointer,
    scales_pointer,
    row_exponent_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
    ASSEMBLY: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
):
    STEP: tl.constexpr = 4 * RUN * WARPS
    first_input, first_row = tl.program_id(0) * INPUTS, tl.program_id(1) * ROWS
    next_words = _load(
        words_pointer, first_row, 0, rows_in_all, groups_in_all, 4, 4, ROWS, RUN, WARPS, WHOLE, "evict_first"
    )
    next_scales = _load(scales_pointer, first_row, 0, rows_in_all, groups_in_all, 1, 1, ROWS, RUN, WARPS, WHOLE, "")
    place, _, _ = _places(ROWS, 1, RUN, WARPS)
    bias = 127 + tl.load(row_exponent_pointer + tl.minimum(first_row + place, rows_in_all - 1))
    if OVERLAP:
        gdc_wait()
    next_first, next_second = _load_inputs(
        inputs_pointer, first_input, 0, inputs_in_all, groups_in_all, INPUTS, RUN, WARPS, WHOLE
    )
    total = tl.zeros([WARPS, ROWS, INPUTS], tl.float32)
    for start in tl.range(0, groups_in_all, STEP, num_stages=1):
        first, second, words, scales = next_first, next_second, next_words, next_scales
        after = start + STEP
        if after < groups_in_all:
            next_words = _load(
                words_pointer,
                first_row,
                after,
                rows_in_all,
                groups_in_all,
                4,
                4,
                ROWS,
                RUN,
                WARPS,
                WHOLE,
                "evict_first",
            )
            next_scales = _load(
                scales_pointer, first_row, after, rows_in_all, groups_in_all, 1, 1, ROWS, RUN, WARPS, WHOLE, ""
            )
            next_first, next_second = _load_inputs(
                inputs_pointer, first_input, after, inputs_in_all, groups_in_all, INPUTS, RUN, WARPS, WHOLE
            )
        exponents = scales.to(tl.int32) - bias
        for which in tl.static_range(4):
            weights = _weights(words, exponents, which, RUN, WARPS, ASSEMBLY)
            values = _values(first if which < 2 else second, which, RUN, WARPS, ASSEMBLY)
            total = _add_products(total, weights, values, ASSEMBLY)
    rows = first_row + tl.arange(0, ROWS)
    exponents = tl.load(row_exponent_pointer + tl.minimum(rows, rows_in_all - 1))
    sums = tl.sum(total, axis=0) * power_of_two(exponents + RAISED)[:, None]
    count = first_input + tl.arange(0, INPUTS)[None, :]
    inside = (rows[:, None] < rows_in_all) & (count < inputs_in_all)
    tl.store(out_pointer + count * rows_in_all + rows[:, None], sums.to(out_pointer.dtype.element_ty), mask=inside)


MOST_OUTPUTS = 2**31 - 1
"""The maximum number of outputs in one launch: their places are int32."""


@dataclass(frozen=True)
class Tile:
    """The work of a program, and how it is divided."""

    inputs: int
    """Rows of inputs, 8, 16 or 32."""
    rows: int
    """Rows of weights, a multiple of 16."""
    run: int
    """Blocks of a row that a thread handles at one time."""
    warps: int
    """Warps, each with a part of K."""
    registers: int = 128
    """The maximum number of registers per thread."""

    @property
    def groups(self) -> int:
        """Blocks of a row at one time."""
        return 4 * self.run * self.warps


def choose_tile(inputs: int, rows: int, groups: int, processors: int) -> Tile:
    """The tile for these numbers of rows of inputs, rows of weights, blocks in each, and multiprocessors; measured on
    an H100."""
    programs = triton.cdiv(rows, 16) / processors
    is_long = programs <= 2 and groups >= 256
    if inputs <= 8:
        return Tile(8, 16, 2, 8 if is_long else 4)
    if inputs <= 16:
        return Tile(16, 32, 1, 4) if programs > 4 else Tile(16, 32, 2, 8 if is_long else 4, registers=255)
    return Tile(32, 32, 1, 8 if is_long and inputs <= 32 else 4, registers=255)


def tile_for(inputs: int, rows: int, groups: int, device: torch.device) -> Tile:
    """`choose_tile` for the multiprocessors of a device."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return choose_tile(inputs, rows, groups, processors)


def fixed_product(inputs: Tensor, codes: Tensor, scales: Tensor, row_exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The function `plain_paired_product`, for any number of input rows, with the tile of many rows. One program sums
    over all of K, in one order, so the bits of a row do not depend on the other rows."""
    rows, groups = scales.shape
    tile = tile_for(MOST_ROWS, rows, groups, codes.device)
    flat = inputs.view(-1, inputs.shape[-1])
    parts = [
        product_by_tiles(part, codes, scales, row_exponents, dtype, tile) for part in flat.split(MOST_OUTPUTS // rows)
    ]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.view(*inputs.shape[:-1], rows)


def skinny_product(inputs: Tensor, codes: Tensor, scales: Tensor, row_exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """The function `plain_paired_product`, for at most `MOST_ROWS` rows of inputs."""
    assert inputs.numel() <= MOST_ROWS * inputs.shape[-1]
    rows, groups = scales.shape
    tile = tile_for(inputs.numel() // (32 * groups), rows, groups, codes.device)
    return product_by_tiles(inputs, codes, scales, row_exponents, dtype, tile)


def product_by_tiles(
    inputs: Tensor, codes: Tensor, scales: Tensor, row_exponents: Tensor, dtype: torch.dtype, tile: Tile
) -> Tensor:
    """`skinny_product` with a given tile."""
    rows, groups = scales.shape
    count = inputs.numel() // (32 * groups)
    assert count * rows <= MOST_OUTPUTS
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        overlaps = can_overlap(codes.device)
        _packed_product[(triton.cdiv(count, tile.inputs), triton.cdiv(rows, tile.rows))](
            inputs.view(count, -1).view(torch.int32),
            codes.view(torch.int32),
            scales,
            row_exponents,
            out,
            count,
            rows,
            groups,
            ASSEMBLY=codes.is_cuda,
            WHOLE=groups % tile.groups == 0,
            OVERLAP=overlaps,
            INPUTS=tile.inputs,
            ROWS=tile.rows,
            RUN=tile.run,
            WARPS=tile.warps,
            num_warps=tile.warps,
            maxnreg=tile.registers,
            launch_pdl=overlaps,
        )
    return out.view(*inputs.shape[:-1], rows)
