"""Middle rows of MXFP4 inputs times packed MXFP4 weights, on Hopper's FP8 matrix hardware (Triton).

From 17 rows on, a product in float16 is limited by arithmetic, and lifting the weights first writes and reads them in
FP8. Here codes become FP8 numbers in the registers from which the matrix hardware reads its first operand:

- The product is that of the weights, [N, K], and the transposed inputs, [K, M]. Its first operand may be in registers.
  The second one, the inputs, is in shared memory in the same order as in memory.
- Both are E5M2. The eight magnitudes of a block are eight bytes, two words. One product and one sum of its exponent
  give each word, because no number is subnormal if the weights can be lifted to E4M3 (`plain.lift_exponents`). A byte
  permutation looks up four codes at a time: 11 instructions for 8 codes, signs included.
- For K = 32 a thread provides columns 4 t to 4 t + 3 and 16 + 4 t to 19 + 4 t of its row, as thread t of four. A thread
  that loads a whole block of a row, 16 bytes, has all of them if the inputs are in the order of `plain.across_blocks`.
  Threads then exchange nothing, and a step has at least four blocks.
- Hopper's FP8 products are summed in fewer bits than float32. A step sums `Tile.step` products, and steps are added in
  float32 registers. A fast tile sums everything in the matrix hardware.
- If the grid is small, K is split. Each part writes its float32 sums, and a second launch adds them in order.

The assembly takes four neighbours in the last dimension as four codes of one word. Triton passes them together because
of how it numbers the registers of an 8-bit operand. A test checks this in the compiled code.

`plain_middle_product` is the specification, up to the order of the sums. Triton's interpreter has no inline assembly,
so bytes are looked up one by one and multiplied as float32 there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.fused.arithmetic import power_of_two

_LOOK_UP = tl.constexpr(
    """{
    .reg .b32 code, sign;
    and.b32 code, $1, 0x77777777;
    prmt.b32 sign, 0x80808080, 0x80808080, $1;
    shl.b32 sign, sign, 1;
    prmt.b32 $0, $5, $9, code;
    lop3.b32 $0, sign, 0x80808080, $0, 0xEA;
    }"""
)
"""Converts four codes, in the lower half of a word, to four bytes. Words and tables are the same for all four elements,
and the first is read. `lift` explains the signs."""
_OPERANDS = tl.constexpr("=&r" + 12 * ",r")
BLOCKS = tl.constexpr(4)
"""Neighbouring blocks of a row that four threads load."""


@triton.jit
def _table(exponents):
    """The bytes of |E2M1| 2^e in E5M2, int32: codes 0 to 3, and codes 4 to 7; for e from -13 to 13. For other e the
    byte of code 0 is still 0."""
    fields = exponents + 15
    return fields * 0x04040400 + (0x02000000 - 0x0400), fields * 0x04040404 + 0x0A080604


@triton.jit
def _numbers(words, low, high, ASSEMBLY: tl.constexpr):
    """The numbers of the four codes in the lower halves of `words` [..., 4], whose four entries are equal, from tables
    of this shape: E5M2, or float32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(_LOOK_UP, _OPERANDS, [words, low, high], tl.float8e5, True, 4)
    else:
        codes = words >> (4 * tl.arange(0, 4))[None, None, :]
        byte = (tl.where((codes & 4) != 0, high, low) >> ((codes & 3) << 3)) & 127
        return _value(byte | ((codes & 8) << 4))


@triton.jit
def _value(byte):
    """The float32 values of E5M2 bytes."""
    return (byte.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _places(EACH: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr):
    """Row, chunk of four blocks, block in the chunk, and index below EACH, of the elements of [ROWS / (16 WARPS),
    CHUNKS, 2, WARPS, 8, 4, EACH] in one dimension."""
    places = tl.arange(0, ROWS * CHUNKS * 4 * EACH)
    block, octet, warp = places // EACH % 4, places // (4 * EACH) % 8, places // (32 * EACH) % WARPS
    others = places // (32 * EACH * WARPS)
    row = (others // (2 * CHUNKS) * WARPS + warp) * 16 + others % 2 * 8 + octet
    return row, others // 2 % CHUNKS, block, places % EACH


@triton.jit
def _weights(
    words, scales, block, bias, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WARPS: tl.constexpr, ASSEMBLY: tl.constexpr
):
    """Numbers [ROWS, CHUNKS * 128] of words of codes and words of four scales, both in the order of `_places`."""
    TALL: tl.constexpr = ROWS // (16 * WARPS)
    COUNT: tl.constexpr = ROWS * CHUNKS * 4
    low, high = _table(((scales >> (block * 8)) & 255) - bias)
    low = tl.reshape(tl.broadcast_to(low[:, None, None], [COUNT, 8, 4]), [COUNT, 8, 4])
    high = tl.reshape(tl.broadcast_to(high[:, None, None], [COUNT, 8, 4]), [COUNT, 8, 4])
    halves = tl.reshape(tl.join(words, words >> 16), [COUNT, 8])
    halves = tl.broadcast_to(halves[:, :, None], [COUNT, 8, 4])
    numbers = tl.reshape(_numbers(halves, low, high, ASSEMBLY), [TALL, CHUNKS, 2, WARPS, 8, 4, 8, 4])
    return tl.reshape(tl.permute(numbers, [0, 3, 2, 4, 1, 6, 5, 7]), [ROWS, CHUNKS * 128])


@triton.jit(do_not_specialize=["inputs_in_all", "steps_each"])
def _middle(
    inputs_pointer,
    words_pointer,
    scales_pointer,
    row_exponent_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    chunks_in_all,
    steps_each,
    ASSEMBLY: tl.constexpr,
    FAST: tl.constexpr,
    WHOLE: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
    WARPS: tl.constexpr,
):
    first_input, first_row = tl.program_id(0) * INPUTS, tl.program_id(1) * ROWS
    part = tl.program_id(2)
    last_row = rows_in_all - 1 - first_row
    row, chunk, block, word = _places(4, ROWS, CHUNKS, WARPS)
    words_at = (tl.minimum(row, last_row) * chunks_in_all + chunk) * 16 + block * 4 + word
    words_pointer += first_row.to(tl.int64) * chunks_in_all * 16
    row, chunk, block, word = _places(1, ROWS, CHUNKS, WARPS)
    scales_at = tl.minimum(row, last_row) * chunks_in_all + chunk
    scales_pointer += first_row.to(tl.int64) * chunks_in_all
    bias = 127 + tl.load(row_exponent_pointer + first_row + tl.minimum(row, last_row))
    inputs = tl.minimum(tl.arange(0, INPUTS), inputs_in_all - 1 - first_input)
    columns = tl.arange(0, CHUNKS * 128)
    inputs_at = inputs[:, None] * (chunks_in_all * 128) + columns[None, :]
    inputs_pointer += first_input.to(tl.int64) * chunks_in_all * 128
    total = tl.zeros([ROWS, INPUTS], tl.float32)
    first = part * steps_each
    for step in tl.range(first, tl.minimum(first + steps_each, chunks_in_all // CHUNKS), num_stages=STAGES):
        words = tl.load(words_pointer + words_at + step * (CHUNKS * 16))
        scales = tl.load(scales_pointer + scales_at + step * CHUNKS)
        x = tl.load(inputs_pointer + inputs_at + step * (CHUNKS * 128))
        weights = _weights(words, scales, block, bias, ROWS, CHUNKS, WARPS, ASSEMBLY)
        if not ASSEMBLY:
            total += tl.dot(weights, tl.trans(_value(x)), input_precision="ieee")
        elif FAST:
            total = tl.dot(weights, tl.trans(x), total)
        else:
            total += tl.dot(weights, tl.trans(x))
    rows = first_row + tl.arange(0, ROWS)
    if WHOLE:
        exponents = tl.load(row_exponent_pointer + tl.minimum(rows, rows_in_all - 1))
        total *= power_of_two(exponents)[:, None]
    count = first_input + tl.arange(0, INPUTS)[None, :]
    inside = (rows[:, None] < rows_in_all) & (count < inputs_in_all)
    out_pointer += part.to(tl.int64) * inputs_in_all * rows_in_all
    at = count.to(tl.int64) * rows_in_all + rows[:, None]
    tl.store(out_pointer + at, total.to(out_pointer.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["outputs"])
def _add_parts(
    parts_pointer, row_exponent_pointer, out_pointer, outputs, rows_in_all, SPLIT: tl.constexpr, EACH: tl.constexpr
):
    """Add float32 sums [SPLIT, outputs], the first one first, and multiply by the power of two of their row."""
    at = tl.program_id(0).to(tl.int64) * EACH + tl.arange(0, EACH)
    inside = at < outputs
    total = tl.load(parts_pointer + at, mask=inside, other=0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts_pointer + outputs.to(tl.int64) * part + at, mask=inside, other=0)
    exponents = tl.load(row_exponent_pointer + at % rows_in_all, mask=inside, other=0)
    tl.store(out_pointer + at, (total * power_of_two(exponents)).to(out_pointer.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Tile:
    """The work of a program, and how it is divided."""

    inputs: int
    """Rows of inputs, 16 to 256."""
    rows: int
    """Rows of weights, a multiple of 16 times `warps`."""
    step: int
    """Columns that are summed in fewer bits than float32, a multiple of 128."""
    split: int
    """Parts of K."""
    warps: int = 4
    """4 or 8."""
    stages: int = 4
    """Steps whose bytes are being loaded or computed."""
    fast: bool = False
    """Sum all of K in the matrix hardware."""

    def __str__(self) -> str:
        name = f"{self.inputs}x{self.rows}x{self.step}, {self.split} parts, {self.warps} warps, {self.stages} stages"
        return f"{name}, fast" if self.fast else name


def default_tile(inputs: int, rows: int, groups: int, processors: int) -> Tile:
    """The tile for these numbers of rows of inputs, rows of weights, blocks in each, and multiprocessors; estimated,
    not measured."""
    tile = Tile(min(128, max(16, triton.next_power_of_2(inputs))), 64, 128, 1)
    programs = max(1, triton.cdiv(inputs, tile.inputs) * triton.cdiv(rows, tile.rows))
    steps = groups // BLOCKS.value
    split = max(1, min(2 * processors // programs, steps // (2 * tile.stages), 16))
    return replace(tile, split=split)


def candidates(inputs: int, rows: int, groups: int, processors: int) -> list[Tile]:
    """Tiles that are worth measuring for this shape, the default first, if the compiler has enough registers for them.

    Left out are tiles that spill registers to memory: four warps with sums [128, 128], or with 128 rows of weights and
    steps of 256 beside 64 rows of inputs; and 256 rows of inputs, except for fast tiles.
    """
    first = default_tile(inputs, rows, groups, processors)
    wide = replace(first, rows=128, warps=8)
    found = [first, wide, replace(first, stages=3), replace(first, fast=True), replace(wide, fast=True)]
    tall = [replace(first, rows=128)] if first.inputs <= 64 else []
    found += tall
    if groups % 8 == 0:
        long = [first, wide, *(tall if first.inputs <= 32 else [])]
        found += [replace(tile, step=256, stages=3) for tile in long]
    found += [replace(first, split=split) for split in (1, 2, 4, 8) if split * first.stages <= groups // BLOCKS.value]
    found += [replace(first, inputs=size) for size in (32, 64) if size < first.inputs]
    if inputs > 128:
        found.append(replace(wide, inputs=256, fast=True))
    return list(dict.fromkeys(found))


def middle_product(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_exponents: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:
    """The function `plain_middle_product`: `dtype` [..., N], with a given tile or the default one.

    K must be a multiple of the tile's step, which is 128 by default.
    """
    rows, groups = scales.shape
    count = inputs.numel() // (32 * groups)
    tile = tile or default_tile(count, rows, groups, processors_of(codes.device))
    if 32 * groups % tile.step:
        raise ValueError(f"a step of {tile.step} columns does not divide {32 * groups}")
    out = torch.empty(count, rows, dtype=dtype, device=codes.device)
    if not out.numel():
        return out.view(*inputs.shape[:-1], rows)
    on_gpu, chunks = codes.is_cuda, tile.step // 128
    split = tile.split
    parts = out if split == 1 else torch.empty(split, count, rows, dtype=torch.float32, device=codes.device)
    _middle[(triton.cdiv(count, tile.inputs), triton.cdiv(rows, tile.rows), split)](
        inputs.view(count, -1) if on_gpu else inputs.view(count, -1).view(torch.uint8),
        codes.view(torch.int32),
        scales.view(torch.int32),
        row_exponents,
        parts,
        count,
        rows,
        groups // BLOCKS.value,
        triton.cdiv(groups // BLOCKS.value // chunks, split),
        ASSEMBLY=on_gpu,
        FAST=tile.fast,
        WHOLE=split == 1,
        INPUTS=tile.inputs,
        ROWS=tile.rows,
        CHUNKS=chunks,
        STAGES=tile.stages,
        WARPS=tile.warps,
        num_warps=tile.warps,
    )
    if split > 1:
        _add_parts[(triton.cdiv(out.numel(), 1024),)](
            parts, row_exponents, out, out.numel(), rows, SPLIT=split, EACH=1024
        )
    return out.view(*inputs.shape[:-1], rows)


def processors_of(device: torch.device) -> int:
    """The number of multiprocessors of a device, 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
