"""A few rows of values times packed MXFP4 weights, on bfloat16 matrix hardware (Triton).

For generation the weights are read once and little is computed with them, so memory sets the pace as long as a code
costs three or four instructions and enough bytes are on their way. Hence:

- Each warp takes its own share of the blocks of a tile of rows, and shares are added up once, at the end: a small
  layer still fills a device, and there is no second pass.
- A weight becomes a bfloat16 number, which holds code and scale exactly. The three bits of a magnitude, put where
  exponent and fraction of bfloat16 meet, are 2^-126 of it; a product of two numbers at a time raises them, and another
  one applies the scale of the block. So a product sums over all of K in float32, with nothing to do for each block.
- A sum may run over K in any order. Each thread loads whole blocks, 16 bytes at a time, and the order is the one in
  which the matrix hardware wants its operands: nothing is exchanged between threads. This rests on how Triton deals
  out what is loaded; where it deals otherwise the result is the same, through shared memory and slower.

`plain_values_product` is the specification, up to the order of the sums. Triton's interpreter has no inline assembly:
there the weights are float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 128


def _decoder(sign: str, magnitude: str) -> tl.constexpr:
    """Assembly that takes one code of each of two 16-bit units ($1), and the scale of their block twice ($2), to two
    bfloat16 numbers; `sign` and `magnitude` move the code's sign to bit 15 and its magnitude to bits 8 to 6.

    fma with -0 keeps the sign of zero; lop3 0xEA is (sign & 0x80008000) | magnitude.
    """
    return tl.constexpr(
        f"""{{
        .reg .b32 sign, number, raise, zero;
        mov.b32 raise, 0x7E807E80;
        mov.b32 zero, 0x80008000;
        {sign}
        {magnitude}
        and.b32 number, number, 0x01C001C0;
        lop3.b32 number, sign, 0x80008000, number, 0xEA;
        fma.rn.bf16x2 number, number, raise, zero;
        fma.rn.bf16x2 $0, number, $2, zero;
        }}"""
    )


_FIRST = _decoder("shl.b32 sign, $1, 12;", "shl.b32 number, $1, 6;")
_SECOND = _decoder("shl.b32 sign, $1, 8;", "shl.b32 number, $1, 2;")
_THIRD = _decoder("shl.b32 sign, $1, 4;", "shr.u32 number, $1, 2;")
_FOURTH = _decoder("mov.b32 sign, $1;", "shr.u32 number, $1, 6;")


@triton.jit
def _decode(units, scales, PLACE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The weights of the codes in bits 4 PLACE to 4 PLACE + 3 of 16-bit units, scaled: bfloat16, or float32."""
    if not ASSEMBLY:
        codes = (units.to(tl.int32) >> (4 * PLACE)) & 15
        numbers = (((codes & 8) << 28) | ((codes & 7) << 22)).to(tl.float32, bitcast=True)
        return numbers * 2.0**126 * scales
    elif PLACE == 0:
        return tl.inline_asm_elementwise(_FIRST, "=r,r,r", [units, scales], tl.bfloat16, True, 2)
    elif PLACE == 1:
        return tl.inline_asm_elementwise(_SECOND, "=r,r,r", [units, scales], tl.bfloat16, True, 2)
    elif PLACE == 2:
        return tl.inline_asm_elementwise(_THIRD, "=r,r,r", [units, scales], tl.bfloat16, True, 2)
    else:
        return tl.inline_asm_elementwise(_FOURTH, "=r,r,r", [units, scales], tl.bfloat16, True, 2)


@triton.jit
def _scale(exponents, ASSEMBLY: tl.constexpr):
    """E8M0 bytes to bfloat16, or float32."""
    wide = exponents.to(tl.int32)
    bits = tl.where(wide == 255, 0x7FC0, tl.where(wide == 0, 0x40, wide << 7))
    if ASSEMBLY:
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _places(ALL: tl.constexpr, EACH: tl.constexpr, RUN: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr):
    """Where in a tile each of ALL elements is, of [more, RUN, WARPS, 8, 4, EACH] in one dimension.

    Its block in the step; which group of warps that share rows; which of eight rows; more; which of EACH.
    """
    places = tl.arange(0, ALL)
    threads, octets, warps = places // EACH % 4, places // (4 * EACH) % 8, places // (32 * EACH) % WARPS
    others = places // (32 * EACH * WARPS)
    blocks = (warps % SPLIT * RUN + others % RUN) * 4 + threads
    return blocks, warps // SPLIT, octets, others // RUN, places % EACH


@triton.jit
def _row(first, rows, rows_in_all):
    """Rows counted from `first`; instead of those beyond the end the last one."""
    return tl.minimum(first + rows, rows_in_all - 1).to(tl.int64)


@triton.jit
def _load(pointer, blocks, groups_in_all, WHOLE: tl.constexpr):
    """Values at `pointer`; 0 for blocks beyond the end."""
    if WHOLE:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=blocks < groups_in_all, other=0)


@triton.jit
def _load_once(pointer, blocks, groups_in_all, WHOLE: tl.constexpr):
    """The same, of what no other program reads; the cache beside a multiprocessor is left to the rest."""
    if WHOLE:
        return tl.load(pointer, eviction_policy="evict_first")
    else:
        return tl.load(pointer, mask=blocks < groups_in_all, other=0, eviction_policy="evict_first")


@triton.jit
def _accumulate(units, scales, inputs, total, PLACE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Adds the products of one code of each unit to [WARPS, ROWS, INPUTS].

    `units` and `scales` [rows / 8, RUN, WARPS, 8, 4, 8], `inputs` [inputs / 8, 4, RUN, WARPS, 8, 4, 2]. Of K two units
    in a row are the innermost, then the four threads: as the matrix hardware takes its operands.
    """
    OCTETS: tl.constexpr = units.shape[0]
    RUN: tl.constexpr = units.shape[1]
    WARPS: tl.constexpr = units.shape[2]
    weights = tl.reshape(_decode(units, scales, PLACE, ASSEMBLY), [OCTETS, RUN, WARPS, 8, 4, 4, 2])
    weights = tl.reshape(tl.permute(weights, [2, 0, 3, 1, 5, 4, 6]), [WARPS, OCTETS * 8, RUN * 32])
    inputs = tl.permute(inputs, [3, 2, 1, 5, 6, 0, 4])
    inputs = tl.reshape(inputs, [WARPS, RUN * 32, inputs.shape[5] * 8])
    if ASSEMBLY:
        return tl.dot(weights, inputs, total)
    else:
        return total + tl.dot(weights, inputs.to(tl.float32), input_precision="ieee")


@triton.jit(do_not_specialize=["inputs_in_all"])
def _skinny(
    inputs_pointer,
    units_pointer,
    scales_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    groups_in_all,
    ASSEMBLY: tl.constexpr,
    WHOLE: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    WARPS: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    # All that is loaded is numbered by what a thread holds, four threads of a row, eight rows, warps, and what they
    # repeat: so Triton deals it out, and so the matrix hardware takes it.
    OCTETS: tl.constexpr = ROWS // 8
    STEP: tl.constexpr = 4 * SPLIT * RUN
    HEIGHT: tl.constexpr = ROWS * (WARPS // SPLIT)
    first_input, first_row = tl.program_id(0) * INPUTS, tl.program_id(1) * HEIGHT
    # Units of four codes, eight a block.
    block, group, octet, more, unit = _places(OCTETS * RUN * WARPS * 256, 8, RUN, WARPS, SPLIT)
    row = _row(first_row, group * ROWS + more * 8 + octet, rows_in_all)
    units_at = (row * groups_in_all + block) * 8 + unit
    scale_block, group, octet, more, _ = _places(OCTETS * RUN * WARPS * 32, 1, RUN, WARPS, SPLIT)
    row = _row(first_row, group * ROWS + more * 8 + octet, rows_in_all)
    scales_at = tl.max_contiguous(row * groups_in_all + scale_block, 1)  # one byte a thread
    # Values, four times eight a block.
    input_block, group, octet, more, value = _places(INPUTS * RUN * WARPS * 128, 8, RUN, WARPS, SPLIT)
    row = _row(first_input, more // 4 * 8 + octet, inputs_in_all)
    inputs_at = (row * groups_in_all + input_block) * 32 + more % 4 * 8 + value
    total = tl.zeros([WARPS, ROWS, INPUTS], tl.float32)
    exponents = _load(scales_pointer + scales_at, scale_block, groups_in_all, WHOLE)
    for start in tl.range(0, groups_in_all, STEP, num_stages=STAGES):
        units = _load_once(units_pointer + start * 8 + units_at, start + block, groups_in_all, WHOLE)
        inputs = _load(inputs_pointer + start * 32 + inputs_at, start + input_block, groups_in_all, WHOLE)
        units = tl.reshape(units, [OCTETS, RUN, WARPS, 8, 4, 8])
        scales = tl.reshape(_scale(exponents, ASSEMBLY), [OCTETS, RUN, WARPS, 8, 4, 1])
        scales = tl.broadcast_to(scales, [OCTETS, RUN, WARPS, 8, 4, 8])
        # Single bytes cannot be copied ahead as the other two are: the next step's are loaded here.
        following = tl.minimum(start + STEP, groups_in_all - STEP) if WHOLE else start + STEP
        exponents = _load(scales_pointer + following + scales_at, following + scale_block, groups_in_all, WHOLE)
        even, odd = tl.split(tl.reshape(inputs, [INPUTS // 8, 4, RUN, WARPS, 8, 4, 2, 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        total = _accumulate(units, scales, first, total, 0, ASSEMBLY)
        total = _accumulate(units, scales, second, total, 1, ASSEMBLY)
        total = _accumulate(units, scales, third, total, 2, ASSEMBLY)
        total = _accumulate(units, scales, fourth, total, 3, ASSEMBLY)
    sums = tl.sum(tl.reshape(total, [WARPS // SPLIT, SPLIT, ROWS, INPUTS]), axis=1)
    rows = first_row.to(tl.int64) + tl.arange(0, HEIGHT)[:, None]
    count = first_input + tl.arange(0, INPUTS)[None, :]
    sums = tl.reshape(sums, [HEIGHT, INPUTS]).to(out_pointer.dtype.element_ty)
    tl.store(out_pointer + count * rows_in_all + rows, sums, mask=(rows < rows_in_all) & (count < inputs_in_all))


@dataclass(frozen=True)
class Tile:
    """What a program computes, and how."""

    inputs: int
    """Rows of inputs, 8, 16 or 32."""
    rows: int
    """Rows of weights that a warp computes, 16 or a multiple."""
    run: int
    """Blocks of a row that a thread takes in a step."""
    warps: int
    split: int
    """Warps that share rows, each with its part of K."""
    stages: int = 1
    """Steps that are copied ahead to shared memory; 1 to load into registers."""

    @property
    def height(self) -> int:
        """Rows of weights in all."""
        return self.rows * self.warps // self.split


FULL = 0.8
"""Programs are small enough if this share of multiprocessors has work at any time."""


def choose_tile(inputs: int, rows: int, processors: int) -> Tile:
    """For so many rows of inputs and of weights, and multiprocessors."""
    height = next((h for h in (32, 16) if _share_at_work(triton.cdiv(rows, h), processors) >= FULL), 16)
    programs = triton.cdiv(rows, height) / processors
    warps = 4 if programs > 4 else 8 if programs > 1 else 16
    return Tile(inputs=8 if inputs <= 8 else 16, rows=height, run=1, warps=warps, split=warps)


def _share_at_work(programs: int, processors: int) -> float:
    return programs / (triton.cdiv(programs, processors) * processors)


def skinny_product(inputs: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `plain_values_product` defines it, of bfloat16 inputs, at most `MOST_ROWS` rows of them."""
    processors = torch.cuda.get_device_properties(codes.device).multi_processor_count if codes.is_cuda else 1
    count = inputs.numel() // (scales.shape[1] * 32)
    return product_by_tiles(inputs, codes, scales, dtype, choose_tile(count, len(scales), processors))


def product_by_tiles(inputs: Tensor, codes: Tensor, scales: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """`skinny_product` by tiles of a given kind."""
    rows, groups = scales.shape
    count = inputs.numel() // (groups * 32)
    assert inputs.dtype == torch.bfloat16, inputs.dtype
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if out.numel():
        _skinny[(triton.cdiv(count, tile.inputs), triton.cdiv(rows, tile.height))](
            inputs.contiguous(),
            codes.view(torch.int16),
            scales,
            out,
            count,
            rows,
            groups,
            ASSEMBLY=codes.is_cuda,
            WHOLE=groups % (4 * tile.split * tile.run) == 0,
            INPUTS=tile.inputs,
            ROWS=tile.rows,
            RUN=tile.run,
            WARPS=tile.warps,
            SPLIT=tile.split,
            STAGES=tile.stages,
            num_warps=tile.warps,
        )
    return out.view(*inputs.shape[:-1], rows)
