"""A few rows of MXFP4 times MXFP4 weights, from packed codes on both sides, on bfloat16 matrix hardware (Triton).

For generation the weights are read once and little is computed with them, so memory sets the pace as long as a code
costs few instructions and enough bytes are on their way at any time. Hence:

- Weights and inputs are loaded a step ahead of what is done with them. The branch around these loads keeps a compiler
  from moving them behind the arithmetic. The first weights are on their way before the inputs are there: the kernel is
  launched while the one that writes them runs.
- A program goes along a few rows, all of K. Each warp takes its own share of the blocks, and shares are added up at the
  end, in a fixed order: a small layer still fills a device.
- A code becomes a bfloat16 number, which holds code and scale exactly. The three bits of a magnitude, put where
  exponent and fraction of bfloat16 meet, are 2^-126 of it; one product, of two numbers at a time, raises them and
  applies the scale of the block. So a sum goes over all of K in float32, with nothing to do for each block. Scales
  above 2 times 2^126 are too large for a bfloat16 number: a program that has seen one begins again, with two products.
- Inputs are packed codes too: as bfloat16 they would be more bytes than the weights, for 16 rows of inputs and 32 rows
  of weights a program.
- A sum may run over K in any order. Each thread loads whole blocks, 16 bytes at a time, and the order is the one in
  which the matrix hardware wants its operands: nothing is exchanged between threads. This rests on how Triton deals
  out what is loaded; where it deals otherwise the result is the same, through shared memory and slower.

`plain_packed_product` is the specification, up to the order of the sums. Triton's interpreter has no inline assembly:
there the numbers are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from mxrot.kernels.crossovers import MOST_ROWS
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain import PackedRows


def _decoder(sign: str, magnitude: str, lift: str) -> tl.constexpr:
    """Assembly that takes one code of each of two 16-bit units ($1), and the factor of their block twice ($2), to two
    bfloat16 numbers; `sign` and `magnitude` move the code's sign to bit 15 and its magnitude to bits 8 to 6.

    fma with -0 keeps the sign of zero; lop3 0xEA is (sign & 0x80008000) | magnitude.
    """
    return tl.constexpr(
        f"""{{
        .reg .b32 sign, number, power, zero;
        mov.b32 zero, 0x80008000;
        {sign}
        {magnitude}
        and.b32 number, number, 0x01C001C0;
        lop3.b32 number, sign, 0x80008000, number, 0xEA;
        {lift}
        fma.rn.bf16x2 $0, number, $2, zero;
        }}"""
    )


_MOVES = (
    ("shl.b32 sign, $1, 12;", "shl.b32 number, $1, 6;"),
    ("shl.b32 sign, $1, 8;", "shl.b32 number, $1, 2;"),
    ("shl.b32 sign, $1, 4;", "shr.u32 number, $1, 2;"),
    ("mov.b32 sign, $1;", "shr.u32 number, $1, 6;"),
)
_LIFT = "mov.b32 power, 0x7E807E80; fma.rn.bf16x2 number, number, power, zero;"
_FIRST, _SECOND, _THIRD, _FOURTH = (_decoder(*moves, lift="") for moves in _MOVES)
_LIFT_FIRST, _LIFT_SECOND, _LIFT_THIRD, _LIFT_FOURTH = (_decoder(*moves, lift=_LIFT) for moves in _MOVES)


@triton.jit
def _decode(units, factors, PLACE: tl.constexpr, ANY: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The numbers of the codes in bits 4 PLACE to 4 PLACE + 3 of 16-bit units, with their `_factors`: bfloat16, or
    float32."""
    if not ASSEMBLY:
        codes = (units.to(tl.int32) >> (4 * PLACE)) & 15
        numbers = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True)
        return (numbers * 2.0**126 if ANY else numbers) * factors
    elif ANY:
        if PLACE == 0:
            return tl.inline_asm_elementwise(_LIFT_FIRST, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
        elif PLACE == 1:
            return tl.inline_asm_elementwise(_LIFT_SECOND, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
        elif PLACE == 2:
            return tl.inline_asm_elementwise(_LIFT_THIRD, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
        else:
            return tl.inline_asm_elementwise(_LIFT_FOURTH, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
    elif PLACE == 0:
        return tl.inline_asm_elementwise(_FIRST, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
    elif PLACE == 1:
        return tl.inline_asm_elementwise(_SECOND, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
    elif PLACE == 2:
        return tl.inline_asm_elementwise(_THIRD, "=r,r,r", [units, factors], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(_FOURTH, "=r,r,r", [units, factors], tl.bfloat16, True, 2)


@triton.jit
def _factors(exponents, ANY: tl.constexpr, ASSEMBLY: tl.constexpr):
    """What codes are multiplied with, bfloat16 or float32, by E8M0 bytes as int32.

    Where ANY byte may come these are scales, NaN for 255; the code is lifted by 2^126 before. Otherwise they are scales
    times 2^126, right for bytes up to 128.
    """
    bits = tl.maximum(exponents << 7, 0x40) if ANY else (exponents << 7) + (126 << 7)
    if ANY:
        bits = tl.where(exponents == 255, 0x7FC0, bits)
    if ASSEMBLY:
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _places(ROWS: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr):
    """Row, block and which of EACH in it, of the elements of [ROWS / 8, RUN, WARPS, 8, 4, EACH] in one dimension."""
    places = tl.arange(0, ROWS * RUN * WARPS * 4 * EACH)
    threads, octets, warps = places // EACH % 4, places // (4 * EACH) % 8, places // (32 * EACH) % WARPS
    others = places // (32 * EACH * WARPS)
    return others // RUN * 8 + octets, (warps * RUN + others % RUN) * 4 + threads, places % EACH


@triton.jit
def _load(
    words_pointer,
    scales_pointer,
    first_row,
    first_block,
    rows_in_all,
    groups_in_all,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    WHOLE: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Words of eight codes, int32 [1, ...] of [ROWS / 8, RUN, WARPS, 8, 4, 4]; E8M0 bytes as int32, one for four words.

    Of rows beyond the end the last one instead, of blocks beyond the end zeros.
    """
    last = rows_in_all - 1 - first_row
    start = first_row.to(tl.int64) * groups_in_all + first_block
    row, block, word = _places(ROWS, 4, RUN, WARPS)
    # Of two dimensions, so that the layout of bytes below is never that of words.
    at, block = ((tl.minimum(row, last) * groups_in_all + block) * 4 + word)[None, :], block[None, :]
    inside = None if WHOLE else first_block + block < groups_in_all
    words = tl.load(words_pointer + start * 4 + at, mask=inside, other=None if WHOLE else 0, eviction_policy=POLICY)
    row, block, _ = _places(ROWS, 1, RUN, WARPS)
    at = tl.max_contiguous(tl.minimum(row, last) * groups_in_all + block, 1)  # one byte a thread
    inside = None if WHOLE else first_block + block < groups_in_all
    scales = tl.load(scales_pointer + start + at, mask=inside, other=None if WHOLE else 0)
    return words, scales.to(tl.int32)


@triton.jit
def _numbers(
    words,
    scales,
    PLACE: tl.constexpr,
    ANY: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One code of each half of the words that `_load` gave, as numbers [WARPS, ROWS, RUN * 32].

    A thread holds four of K side by side, then come the four threads of a row: the order in which Triton gives operands
    to the matrix hardware, where it sees 16 bits and no load in the same loop.
    """
    EIGHTS: tl.constexpr = words.shape[1] // (RUN * WARPS * 128)
    units = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    factors = tl.reshape(_factors(scales, ANY, ASSEMBLY), [EIGHTS, RUN, WARPS, 8, 4, 1])
    factors = tl.broadcast_to(factors, [EIGHTS, RUN, WARPS, 8, 4, 8])
    numbers = _decode(tl.reshape(units, [EIGHTS, RUN, WARPS, 8, 4, 8]), factors, PLACE, ANY, ASSEMBLY)
    numbers = tl.reshape(numbers, [EIGHTS, RUN, WARPS, 8, 4, 2, 4])
    return tl.reshape(tl.permute(numbers, [2, 0, 3, 1, 5, 4, 6]), [WARPS, EIGHTS * 8, RUN * 32])


@triton.jit
def _largest(scales, WARPS: tl.constexpr):
    """For each thread, of the scales that it has loaded."""
    return tl.max(tl.reshape(scales, [scales.shape[0] // (WARPS * 32), WARPS * 32]), axis=0)


@triton.jit
def _add_products(total, weights, inputs, ASSEMBLY: tl.constexpr):
    """total + weights inputs^T: [WARPS, ROWS, K] by [WARPS, INPUTS, K]."""
    if ASSEMBLY:
        return tl.dot(weights, tl.permute(inputs, [0, 2, 1]), total)
    else:
        return total + tl.dot(weights, tl.permute(inputs, [0, 2, 1]), input_precision="ieee")


@triton.jit
def _products(
    inputs_pointer,
    input_scales_pointer,
    words_pointer,
    scales_pointer,
    first_input,
    first_row,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
    ANY: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WHOLE: tl.constexpr,
    OVERLAP: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Some rows, all of K: each warp's share, float32 [WARPS, ROWS, INPUTS], and the largest scales of weights."""
    STEP: tl.constexpr = 4 * RUN * WARPS
    next_words, next_scales = _load(
        words_pointer, scales_pointer, first_row, 0, rows_in_all, groups_in_all, ROWS, RUN, WARPS, WHOLE, "evict_first"
    )
    if OVERLAP:
        gdc_wait()
    next_inputs, next_input_scales = _load(
        inputs_pointer,
        input_scales_pointer,
        first_input,
        0,
        inputs_in_all,
        groups_in_all,
        INPUTS,
        RUN,
        WARPS,
        WHOLE,
        "",
    )
    largest = _largest(next_scales, WARPS)
    total = tl.zeros([WARPS, ROWS, INPUTS], tl.float32)
    for start in tl.range(0, groups_in_all, STEP, num_stages=1):
        inputs, input_scales = next_inputs, next_input_scales
        words, scales = next_words, next_scales
        after = start + STEP
        if after < groups_in_all:
            next_words, next_scales = _load(
                words_pointer,
                scales_pointer,
                first_row,
                after,
                rows_in_all,
                groups_in_all,
                ROWS,
                RUN,
                WARPS,
                WHOLE,
                "evict_first",
            )
            next_inputs, next_input_scales = _load(
                inputs_pointer,
                input_scales_pointer,
                first_input,
                after,
                inputs_in_all,
                groups_in_all,
                INPUTS,
                RUN,
                WARPS,
                WHOLE,
                "",
            )
        largest = tl.maximum(largest, _largest(scales, WARPS))
        for place in tl.static_range(4):
            weights = _numbers(words, scales, place, ANY, RUN, WARPS, ASSEMBLY)
            values = _numbers(inputs, input_scales, place, True, RUN, WARPS, ASSEMBLY)
            total = _add_products(total, weights, values, ASSEMBLY)
    return total, largest


@triton.jit(do_not_specialize=["inputs_in_all"])
def _packed_product(
    inputs_pointer,
    input_scales_pointer,
    words_pointer,
    scales_pointer,
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
    first_input, first_row = tl.program_id(0) * INPUTS, tl.program_id(1) * ROWS
    total, largest = _products(
        inputs_pointer,
        input_scales_pointer,
        words_pointer,
        scales_pointer,
        first_input,
        first_row,
        inputs_in_all,
        rows_in_all,
        groups_in_all,
        False,
        ASSEMBLY,
        WHOLE,
        OVERLAP,
        INPUTS,
        ROWS,
        RUN,
        WARPS,
    )
    if tl.max(largest) > 128:
        total, largest = _products(
            inputs_pointer,
            input_scales_pointer,
            words_pointer,
            scales_pointer,
            first_input,
            first_row,
            inputs_in_all,
            rows_in_all,
            groups_in_all,
            True,
            ASSEMBLY,
            WHOLE,
            False,
            INPUTS,
            ROWS,
            RUN,
            WARPS,
        )
    rows = first_row + tl.arange(0, ROWS)[:, None]
    count = first_input + tl.arange(0, INPUTS)[None, :]
    inside = (rows < rows_in_all) & (count < inputs_in_all)
    sums = tl.sum(total, axis=0).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + count * rows_in_all + rows, sums, mask=inside)


@dataclass(frozen=True)
class Tile:
    """What a program computes, and how."""

    inputs: int
    """Rows of inputs, 8, 16 or 32."""
    rows: int
    """Rows of weights, 16 or a multiple."""
    run: int
    """Blocks of a row that a thread takes at a time."""
    warps: int
    """Each has its part of K."""
    registers: int = 128
    """The most that a thread may have."""

    @property
    def groups(self) -> int:
        """Blocks of a row at a time."""
        return 4 * self.run * self.warps


def choose_tile(inputs: int, rows: int, groups: int, processors: int) -> Tile:
    """For so many rows of inputs and of weights, blocks in each, and multiprocessors; measured on an H100."""
    programs = triton.cdiv(rows, 16) / processors
    is_long = programs <= 2 and groups >= 256
    if inputs <= 8:
        return Tile(8, 16, 2, 8 if is_long else 4)
    if inputs <= 16:
        return Tile(16, 32, 1, 4) if programs > 4 else Tile(16, 32, 2, 8 if is_long else 4, registers=255)
    return Tile(32, 32, 1, 8 if is_long and inputs <= 32 else 4, registers=255)


def skinny_product(inputs: PackedRows, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain_packed_product` defines it, for at most `MOST_ROWS` rows of inputs."""
    processors = torch.cuda.get_device_properties(codes.device).multi_processor_count if codes.is_cuda else 1
    rows, groups = scales.shape
    tile = choose_tile(inputs.scales.numel() // groups, rows, groups, processors)
    return product_by_tiles(inputs, codes, scales, dtype, tile)


def product_by_tiles(inputs: PackedRows, codes: Tensor, scales: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """`skinny_product` by tiles of a given kind."""
    rows, groups = scales.shape
    count = inputs.scales.numel() // groups
    assert count <= MOST_ROWS and MOST_ROWS * rows < 2**31
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        overlaps = can_overlap(codes.device)
        _packed_product[(triton.cdiv(count, tile.inputs), triton.cdiv(rows, tile.rows))](
            inputs.codes.view(count, -1).view(torch.int32),
            inputs.scales,
            codes.view(torch.int32),
            scales,
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
    return out.view(*inputs.codes.shape[:-1], rows)
