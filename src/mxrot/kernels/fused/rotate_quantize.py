"""Block transform, scale and rounding in one pass over an activation (Triton).

The kernel reads fp16, bf16 or fp32 [M, K], multiplies each block of 32 by its matrix with float32 sums, chooses the
exponent of each row's block, rounds to the element, and writes the input of the next product:

- the values of the codes, as bfloat16 (which is exact) or as FP8 E5M2 with a static power of two;
- MXFP4 codes, two per byte, and E8M0 scales, row by row or in the order of a block-scaled product.

The plain functions are the specification. For the same transformed values the kernel gives the same bits. Its products
are summed in a different order, so with a transform a value next to a rounding boundary may fall on the other side. A
block that holds NaN or Inf after the transform becomes NaN.

Memory limits the speed as long as a value costs few instructions and memory is written in whole sectors of 32 bytes. A
program is one warp. Its blocks stay in registers from transform to store, with four threads per block. If each column
of blocks has its own matrix, a program handles several neighbouring columns: the codes of one block are half a sector,
and its scale is one byte of a sector that 32 programs would write.

bfloat16 matrices are multiplied on matrix hardware. Activations of 8, 11 or 24 significant bits are one, two or three
bfloat16 numbers, whose products with the matrix are exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.formats import Format, ScaleRule
from mxrot.formats.element import E2M1, FloatElement
from mxrot.kernels.fused.arithmetic import power_of_field, power_of_two, round_to_element
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain import E5M2_EXPONENTS, PackedRows, swizzled_bytes

BLOCK = tl.constexpr(32)
AFTER_IT, AT_ONCE = tl.constexpr(1), tl.constexpr(2)
"""When the next kernel may start: after the wait for the previous one, or before it."""
MOST_STEPS = 64
MOST_PROGRAMS_DOWN = 65535
"""CUDA's limit of the second dimension of a grid."""
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def _place(rows_in_all, groups_in_all, steps, ROWS: tl.constexpr, GROUPS: tl.constexpr, FLAT: tl.constexpr):
    """The first column of blocks of this program, its first row (int64), and its numbers of columns and rows."""
    group = 0 if FLAT else tl.program_id(0) * GROUPS
    first = tl.program_id(0 if FLAT else 1).to(tl.int64) * (steps * ROWS)
    return group, first, groups_in_all - group, tl.minimum(rows_in_all - first, steps * ROWS).to(tl.int32)


@triton.jit
def _matrix(pointer, columns, EVEN: tl.constexpr):
    """The matrix at `pointer` for `_transformed`, [32, 32]. Undefined unless there are `columns`.

    It is numbered first by what a thread holds, 8 rows of 4 columns, then by the threads of rows and of columns. This
    is the order of the load, and of the matrix hardware's operand.
    """
    place = tl.arange(0, 1024)
    row, column = place // 4 % 4 * 8 + place // 128, place // 16 % 8 * 4 + place % 4
    at = tl.max_contiguous(tl.multiple_of(row * BLOCK + column, 4), 4)
    matrix = tl.load(pointer + at, mask=None if EVEN else place < columns * 1024)
    return tl.reshape(tl.permute(tl.reshape(matrix, [2, 2, 2, 8, 4, 4]), [1, 0, 4, 2, 5, 3]), [BLOCK, BLOCK])


@triton.jit
def _transformed(x, matrix, PARTS: tl.constexpr):
    """float32 [ROWS, 32] of x [ROWS, 32] times the result of `_matrix`. PARTS 0 is float32 arithmetic.

    In a row on matrix hardware, thread t of four holds columns 2 t, 2 t + 1, 2 t + 8, 2 t + 9, 2 t + 16 and so on. The
    columns can be numbered freely if the matrix agrees. Here they are 8 t to 8 t + 7, before and after, so that a
    thread loads and stores them at once and threads exchange nothing.
    """
    ROWS: tl.constexpr = x.shape[0]
    x = tl.reshape(tl.permute(tl.reshape(x, [ROWS, 4, 2, 2, 2]), [0, 3, 2, 1, 4]), [ROWS, BLOCK])
    if PARTS == 0:
        product = tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision="ieee")
    elif PARTS == 1:
        product = tl.dot(_times_one(x), matrix)
    else:
        first = x.to(tl.bfloat16)
        product = tl.dot(first, matrix)
        rest = x.to(tl.float32) - first.to(tl.float32)
        second = rest.to(tl.bfloat16)
        product = tl.dot(second, matrix, product)
        if PARTS > 2:
            product = tl.dot((rest - second.to(tl.float32)).to(tl.bfloat16), matrix, product)
    product = tl.permute(tl.reshape(product, [ROWS, 4, 4, 2]), [0, 2, 3, 1])
    # Registers in the order of columns, for the steps that pack two and four at a time.
    first, second = tl.split(tl.reshape(product, [ROWS, 16, 2]))
    return tl.reshape(tl.join(first, second), [ROWS, BLOCK])


@triton.jit
def _times_one(x):
    """bfloat16 x. Matrix hardware needs four consecutive registers: the result of a load is copied there, this result
    is not."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 one, zero; mov.b32 one, 0x3F803F80; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, one, zero; }",
        "=r,r",
        [x],
        tl.bfloat16,
        True,
        2,
    )


@triton.jit
def _block(pointer, stride, count, ROWS: tl.constexpr, EVEN: tl.constexpr):
    """Blocks from `pointer` on, one per row, [ROWS, 32]. Undefined from row `count` on."""
    rows = tl.arange(0, ROWS)[:, None]
    return tl.load(pointer + rows * stride + tl.arange(0, BLOCK)[None, :], mask=None if EVEN else rows < count)


@triton.jit
def _blocks(pointer, stride, columns, count, ROWS: tl.constexpr, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """`_block` for each of GROUPS columns of blocks. Undefined from `columns` on."""
    blocks: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        rows = _rows(group, columns, count)
        blocks += (_block(pointer + group * BLOCK, stride, rows, ROWS, EVEN),)
    return blocks


@triton.jit
def _matrices(pointer, stride, columns, GROUPS: tl.constexpr, EVEN: tl.constexpr):
    """`_matrix` for each of GROUPS columns of blocks. Undefined from `columns` on."""
    matrices: tl.tuple = ()
    for group in tl.static_range(GROUPS):
        matrices += (_matrix(pointer + group * stride, columns - group, EVEN or group == 0),)
    return matrices


@triton.jit
def _rows(group: tl.constexpr, columns, count):
    """The number of rows in a column of blocks."""
    return count if group == 0 else tl.where(group < columns, count, 0)


@triton.jit
def _maxima(x, ROWS: tl.constexpr):
    """The bits of the largest magnitude in each row of x [ROWS, 32]. With NaN they are above those of Inf."""
    first, second = tl.split(tl.reshape(x, [ROWS, 4, 2, 2, 2]))
    first, second = tl.split(tl.maximum(tl.abs(first), tl.abs(second), propagate_nan=tl.PropagateNan.ALL))
    first, second = tl.split(tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL))
    largest = tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)
    # As integers, the bits have the order of the numbers, with NaN at the top; tl.max of floats would drop NaN.
    return tl.max(largest.to(tl.int32, bitcast=True), axis=1)


@triton.jit
def _along(numbers, ROWS: tl.constexpr):
    """[ROWS, 32] of [ROWS], in the threads that hold a row."""
    return tl.reshape(tl.broadcast_to(numbers[:, None, None], [ROWS, 4, 8]), [ROWS, BLOCK])


@triton.jit
def _scale_fields(bits, raises_from, max_exponent):
    """(e + 127) << 23 for the exponents e of the scales of blocks with these maxima. e may be below -127."""
    # A fraction of at least `raises_from` carries into the exponent.
    return ((bits + (0x800000 - raises_from)) & 0x7F800000) - (max_exponent << 23)


@triton.jit
def _rounded(x, bits, fields, smallest_normal, fraction_bits, largest, ROWS: tl.constexpr):
    """Round x [ROWS, 32] to the nearest multiples of elements, as `round_to_element` does, without a division by the
    scale. Blocks with NaN or Inf give NaN. For scales of 2^-126 to 2^100."""
    scales = fields.to(tl.float32, bitcast=True)
    magnitude = tl.minimum(tl.abs(x), _along(scales * largest, ROWS))
    binade = tl.maximum(magnitude, _along(scales * smallest_normal, ROWS)).to(tl.int32, bitcast=True) & 0x7F800000
    steps = tl.where(bits < 0x7F800000, power_of_two(23 - fraction_bits), float("nan"))
    power = binade.to(tl.float32, bitcast=True) * _along(steps, ROWS)
    rounded = (magnitude + power) - power
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["rows_in_all"], do_not_specialize_on_alignment=["steps"])
def _values(
    x_pointer,
    matrix_pointer,
    out_pointer,
    rows_in_all,
    groups_in_all,
    steps,
    x_stride,
    out_stride,
    matrix_stride,
    raises_from,
    max_exponent,
    smallest_normal,
    fraction_bits,
    largest,
    least,
    most,
    shift,
    IN_PLACE: tl.constexpr,
    SHIFTED: tl.constexpr,
    IN_PAIRS: tl.constexpr,
    ACROSS: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    ONCE: tl.constexpr,
    EVEN: tl.constexpr,
    FLAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP == AT_ONCE:
        gdc_launch_dependents()
    if OVERLAP:
        gdc_wait()
    if OVERLAP == AFTER_IT:
        gdc_launch_dependents()
    first_group, first, columns, count = _place(rows_in_all, groups_in_all, steps, ROWS, GROUPS, FLAT)
    from_stride = BLOCK if FLAT else x_stride
    to_stride = BLOCK if FLAT else out_stride
    x_pointer += first * from_stride + first_group * BLOCK
    out_pointer += first * to_stride + first_group * BLOCK
    rows, places = tl.arange(0, ROWS)[:, None], tl.max_contiguous(tl.arange(0, BLOCK), 8)[None, :]
    if ACROSS:
        places = tl.max_contiguous(places // 4 * 16 + places % 4, (1, 4))
    tl.assume(count > 0)
    # Load before the matrices: converting these to operands waits for them.
    if ONCE:
        loaded = _blocks(x_pointer, from_stride, columns, count, ROWS, GROUPS, EVEN)
    if HAS_MATRIX:
        matrices = _matrices(matrix_pointer + first_group * matrix_stride, matrix_stride, columns, GROUPS, EVEN)
    for start in tl.range(0, ROWS if ONCE else count, ROWS, num_stages=STAGES):
        if not ONCE:
            loaded = _blocks(x_pointer, from_stride, columns, count - start, ROWS, GROUPS, EVEN)
        for group in tl.static_range(GROUPS):
            x = _transformed(loaded[group], matrices[group], PARTS) if HAS_MATRIX else loaded[group].to(tl.float32)
            bits = _maxima(x, ROWS)
            fields = _scale_fields(bits, raises_from, max_exponent)
            fields = tl.minimum(tl.maximum(fields, (least + 127) << 23), (most + 127) << 23)
            if IN_PLACE:
                values = _rounded(x, bits, fields, smallest_normal, fraction_bits, largest, ROWS)
                values = values * power_of_two(-shift) if SHIFTED else values
            else:
                scaled = x * _along(power_of_field((254 << 23) - fields), ROWS)
                scales = tl.where(bits < 0x7F800000, power_of_field(fields - (shift << 23)), float("nan"))
                values = round_to_element(scaled, smallest_normal, fraction_bits, largest) * _along(scales, ROWS)
            if IN_PAIRS:
                pairs = tl.permute(tl.reshape(values, [ROWS, 4, 2, 2, 2]), [0, 3, 1, 2, 4])
                values = tl.reshape(pairs, [ROWS, BLOCK])
            # A thread stores its eight columns at once, or in two fours.
            place = out_pointer + group * BLOCK + rows * to_stride + places
            if ACROSS:
                block = (first + start + rows) % 4 if FLAT else (first_group + group) % 4
                place -= 28 * block
            inside = rows < _rows(group, columns, count - start)
            tl.store(place, values.to(out_pointer.dtype.element_ty), mask=None if EVEN else inside)
        x_pointer += ROWS * from_stride
        out_pointer += ROWS * to_stride


@triton.jit
def _words(x, inverses, ROWS: tl.constexpr):
    """E2M1 codes of x [ROWS, 32] times `inverses` [ROWS], which are below 8, eight per word, the first one lowest:
    [ROWS, 4].

    Codes have steps of 1/2 up to 2, of 1 up to 4 and of 2 up to 8, so the lowest of the lines 2 v, v + 2 and v / 2 + 4
    gives the code. Near 2^23, float32 rounds to integers, ties to even. The lowest after rounding is the rounded
    lowest.
    """
    v = tl.abs(x * _along(inverses, ROWS))
    codes = tl.minimum(tl.minimum(v * 2 + 8388608.0, v + 8388610.0), v * 0.5 + 8388612.0)
    first, second = tl.split(tl.reshape(codes.to(tl.uint32, bitcast=True), [ROWS, 4, 2, 2, 2]))
    first, second = tl.split(first + (second << 4))
    first, second = tl.split(first + (second << 8))
    # 2^23 is 0x4B000000. 1 + 2^4 times this remains here: 0xFB000000 without the overflow of the word.
    codes = first + (second << 16) + 0x05000000
    # What rounds to 8 is clipped to 7, the code of 6.
    eights = codes & 0x88888888
    codes = codes | (eights - (eights >> 3))
    return ((codes & 0x77777777) | (_signs(x, ROWS) & 0x88888888)).to(tl.int32, bitcast=True)


@triton.jit
def _signs(x, ROWS: tl.constexpr):
    """The signs of x [ROWS, 32] in the top bits of halves of bytes, in the order of `_words`. Other bits are
    undefined."""
    x = tl.reshape(x.to(tl.uint32, bitcast=True), [ROWS, 4, 2, 2, 2])
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    x0, x4 = tl.split(x0)
    x1, x5 = tl.split(x1)
    x2, x6 = tl.split(x2)
    x3, x7 = tl.split(x3)
    # From the last one on: each step shifts the word by four bits and appends its own four, in one instruction.
    word = x7 >> 28
    word = (word << 4) | (x6 >> 28)
    word = (word << 4) | (x5 >> 28)
    word = (word << 4) | (x4 >> 28)
    word = (word << 4) | (x3 >> 28)
    word = (word << 4) | (x2 >> 28)
    word = (word << 4) | (x1 >> 28)
    return (word << 4) | (x0 >> 28)


@triton.jit
def _swizzled_place(rows, group, groups_in_all):
    """The places, in int64 bytes, where `swizzle_scales` puts the scales of these rows in one group."""
    tile = (rows // 128) * ((groups_in_all + 3) // 4) + group // 4
    return tile * 512 + (rows % 32) * 16 + (rows % 128) // 32 * 4 + group % 4


@triton.jit
def _runs(pointer, places, COUNT: tl.constexpr, BYTES: tl.constexpr):
    """Pointers [ROWS, COUNT] from `places` [ROWS] on, with hints that a thread handles BYTES bytes of a row."""
    place = pointer + places[:, None] + tl.arange(0, COUNT)[None, :]
    return tl.multiple_of(tl.max_contiguous(place, (1, COUNT)), (BYTES, BYTES))


@triton.jit
def _side_by_side(words, GROUPS: tl.constexpr, ROWS: tl.constexpr):
    """1, 2 or 4 tensors [ROWS, 4] as [ROWS, 4 GROUPS]."""
    if GROUPS == 1:
        return words[0]
    elif GROUPS == 2:
        return tl.reshape(tl.permute(tl.join(words[0], words[1]), [0, 2, 1]), [ROWS, 8])
    else:
        joined = tl.join(tl.join(words[0], words[1]), tl.join(words[2], words[3]))
        return tl.reshape(tl.permute(joined, [0, 3, 2, 1]), [ROWS, 16])


@triton.jit(do_not_specialize=["rows_in_all"], do_not_specialize_on_alignment=["steps"])
def _packed(
    x_pointer,
    matrix_pointer,
    words_pointer,
    scales_pointer,
    rows_in_all,
    groups_in_all,
    steps,
    x_stride,
    matrix_stride,
    raises_from,
    max_exponent,
    HAS_MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    STAGES: tl.constexpr,
    ONCE: tl.constexpr,
    EVEN: tl.constexpr,
    FLAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    first_group, first, columns, count = _place(rows_in_all, groups_in_all, steps, ROWS, GROUPS, FLAT)
    from_stride = BLOCK if FLAT else x_stride
    to_stride = 1 if FLAT else groups_in_all
    x_pointer += first * from_stride + first_group * BLOCK
    words_pointer += (first * to_stride + first_group) * 4
    if not SWIZZLED:
        scales_pointer += first * to_stride + first_group
    rows = tl.arange(0, ROWS)
    word, byte = tl.arange(0, GROUPS * 4)[None, :], tl.arange(0, 4)[None, :]
    tl.assume(count > 0)
    # Load before the matrices: converting these to operands waits for them.
    if ONCE:
        loaded = _blocks(x_pointer, from_stride, columns, count, ROWS, GROUPS, EVEN)
    if HAS_MATRIX:
        matrices = _matrices(matrix_pointer + first_group * matrix_stride, matrix_stride, columns, GROUPS, EVEN)
    for start in tl.range(0, ROWS if ONCE else count, ROWS, num_stages=STAGES):
        if not ONCE:
            loaded = _blocks(x_pointer, from_stride, columns, count - start, ROWS, GROUPS, EVEN)
        words: tl.tuple = ()
        scales = tl.zeros([ROWS], tl.int32)
        for group in tl.static_range(GROUPS):
            x = _transformed(loaded[group], matrices[group], PARTS) if HAS_MATRIX else loaded[group].to(tl.float32)
            bits = _maxima(x, ROWS)
            is_finite = bits < 0x7F800000
            fields = tl.maximum(_scale_fields(bits, raises_from, max_exponent), 0)
            codes = _words(x, power_of_field((254 << 23) - fields), ROWS)
            words += (tl.where(is_finite[:, None], codes, 0),)
            scales |= tl.where(is_finite, fields >> 23, 255) << (8 * group)
        inside = rows[:, None] < count - start
        place = _runs(words_pointer, rows * (to_stride * 4), GROUPS * 4, GROUPS * 4)
        tl.store(place, _side_by_side(words, GROUPS, ROWS), mask=None if EVEN else inside & (word < columns * 4))
        # Each of the four threads of a row has its scales, and stores one.
        place = _swizzled_place(first + start + rows, first_group, groups_in_all) if SWIZZLED else rows * to_stride
        has_one = byte < (GROUPS if EVEN else tl.minimum(columns, GROUPS))
        scales = (scales[:, None] >> (byte * 8)).to(tl.uint8)
        tl.store(_runs(scales_pointer, place, 4, 1), scales, mask=has_one if EVEN else has_one & inside)
        x_pointer += ROWS * from_stride
        words_pointer += ROWS * to_stride * 4
        if not SWIZZLED:
            scales_pointer += ROWS * to_stride


def rotate_quantize(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, has_fixed_tile: bool = False
) -> Tensor:
    """Q(x T) as bfloat16, in the shape of `x` [..., K]. `matrices` [1 | G, 32, 32] are float32 or bfloat16, or None.

    For 32-element blocks of a FloatElement under a rule with `raises_from`. With a fixed tile the bits of a row do not
    depend on the other rows.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    _write_values(_Blocks.of(x, matrices, has_fixed_tile=has_fixed_tile), matrices, format, rule, out, (-127, 127), 0)
    return out


def rotate_quantize_e5m2(
    x: Tensor,
    matrices: Tensor | None,
    format: Format,
    rule: ScaleRule,
    shift: int = 0,
    are_in_pairs: bool = False,
    has_fixed_tile: bool = False,
    are_across_blocks: bool = False,
    allows_next_at_once: bool = False,
) -> Tensor:
    """The function `plain_rotate_quantize_e5m2`. With the flags, the values are in the order of `plain.in_pairs` or
    `plain.across_blocks`. With `allows_next_at_once`, the next kernel may start before this one has waited for the
    previous one; before its own wait it must touch only what is older than both."""
    out = torch.empty(x.shape, dtype=torch.float8_e5m2, device=x.device)
    least, most = E5M2_EXPONENTS
    blocks = _Blocks.of(x, matrices, has_fixed_tile=has_fixed_tile)
    exponents = least + shift, most + shift
    order = are_in_pairs, are_across_blocks
    _write_values(blocks, matrices, format, rule, out, exponents, shift, order, allows_next_at_once)
    return out


def rotate_quantize_packed(
    x: Tensor,
    matrices: Tensor | None,
    format: Format,
    rule: ScaleRule,
    swizzled: bool = False,
    has_fixed_tile: bool = False,
) -> PackedRows:
    """The function `plain_rotate_quantize_packed`."""
    assert format.element == E2M1
    shape, groups = x.shape[:-1], x.shape[-1] // BLOCK.value
    codes = torch.empty(*shape, groups * 16, dtype=torch.uint8, device=x.device)
    size = swizzled_bytes(math.prod(shape), groups) if swizzled else math.prod(shape) * groups
    # In the swizzled order, padding beyond the rows and blocks counts as scales of 2^-127.
    scales = (torch.zeros if swizzled else torch.empty)(size, dtype=torch.uint8, device=x.device)
    if codes.numel():
        blocks = _Blocks.of(x, matrices, is_packed=True, in_order=swizzled, has_fixed_tile=has_fixed_tile)
        raises_from, max_exponent, *_ = _numbers(format, rule)
        _packed[blocks.grid](
            blocks.x,
            x if matrices is None else matrices.contiguous(),
            codes.view(torch.int32),
            scales,
            blocks.rows,
            blocks.groups,
            blocks.steps,
            blocks.x.stride(0),
            _matrix_stride(matrices),
            raises_from,
            max_exponent,
            SWIZZLED=swizzled,
            **blocks.constants(matrices),
        )
    return PackedRows(codes, scales if swizzled else scales.view(*shape, groups))


def _write_values(
    blocks: _Blocks,
    matrices: Tensor | None,
    format: Format,
    rule: ScaleRule,
    out: Tensor,
    exponents: tuple[int, int],
    shift: int,
    order: tuple[bool, bool] = (False, False),
    allows_next_at_once: bool = False,
) -> None:
    if not out.numel():
        return
    constants = blocks.constants(matrices)
    if allows_next_at_once and constants["OVERLAP"]:
        constants["OVERLAP"] = AT_ONCE.value
    are_in_pairs, are_across_blocks = order
    _values[blocks.grid](
        blocks.x,
        blocks.x if matrices is None else matrices.contiguous(),
        out,
        blocks.rows,
        blocks.groups,
        blocks.steps,
        blocks.x.stride(0),
        out.shape[-1],
        _matrix_stride(matrices),
        *_numbers(format, rule),
        *exponents,
        shift,
        IN_PLACE=exponents[0] >= -126 and exponents[1] <= 100,
        SHIFTED=shift != 0,
        IN_PAIRS=are_in_pairs,
        ACROSS=are_across_blocks,
        **constants,
    )


@dataclass(frozen=True)
class Tile:
    """The work of a program at one time."""

    rows: int
    groups: int = 1
    """Columns of blocks, each with its matrix: 1, 2 or 4."""
    stages: int = 3
    """Steps whose blocks are copied to shared memory or computed at one time. With 1 they are loaded into registers."""
    programs: int = 8192
    """From this many programs on, each program takes several steps."""


def choose_tile(blocks: int, is_flat: bool, is_packed: bool) -> Tile:
    """The tile for `blocks` blocks; `is_flat`: they are one column of blocks; `is_packed`: the result is codes and
    scales.

    Measured on an H100 and an H200 with bfloat16 inputs of 1 to 8192 rows of 4096 and 14336. With few blocks, up to
    [128, 4096], the time is that of one program, so a program does little, once. With some more, launching programs
    takes the time, so there are few programs.
    """
    if blocks <= 16384:
        return Tile(8 if blocks <= 4096 else 16, groups=2 if is_packed and not is_flat else 1)
    is_large = blocks >= 2**19
    if is_flat:
        if is_large:
            return Tile(16 if is_packed else 32, programs=8192)
        return Tile(16, programs=1024 if blocks <= 2**17 and not is_packed else 4096)
    if is_packed:
        return Tile(16, groups=4 if is_large else 2, programs=4096)
    return Tile(16, groups=2, programs=8192) if is_large else Tile(16, programs=4096)


FIXED_TILE = Tile(16, programs=4096)


@dataclass(frozen=True)
class _Blocks:
    """The blocks of an input as rows and columns of blocks, and their division among programs."""

    x: Tensor
    """[rows, 32 groups], the last dimension contiguous."""
    is_flat: bool
    """True if all blocks are one column: they are contiguous, and nothing depends on a block's group."""
    tile: Tile

    @classmethod
    def of(
        cls,
        x: Tensor,
        matrices: Tensor | None,
        is_packed: bool = False,
        in_order: bool = False,
        has_fixed_tile: bool = False,
    ) -> _Blocks:
        """With `in_order`, the place of a result depends on its row and group. A fixed tile does not depend on the
        rows."""
        flat = x.reshape(-1, x.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        is_flat = flat.is_contiguous() and (matrices is None or len(matrices) == 1) and not in_order
        tile = FIXED_TILE if has_fixed_tile else choose_tile(x.numel() // BLOCK.value, is_flat, is_packed)
        return cls(flat.view(-1, BLOCK.value) if is_flat else flat, is_flat, tile)

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def groups(self) -> int:
        return self.x.shape[1] // BLOCK.value

    @property
    def columns(self) -> int:
        """Columns of programs, each with `tile.groups` columns of blocks."""
        return triton.cdiv(self.groups, self.tile.groups)

    @property
    def steps(self) -> int:
        """The number of steps of a program, of `tile.rows` rows each."""
        tiles = triton.cdiv(self.rows, self.tile.rows)
        wanted = min(MOST_STEPS, tiles * self.columns // self.tile.programs)
        return max(1, wanted, triton.cdiv(tiles, MOST_PROGRAMS_DOWN))

    @property
    def grid(self) -> tuple[int, ...]:
        down = triton.cdiv(self.rows, self.steps * self.tile.rows)
        return (down,) if self.is_flat else (self.columns, down)

    def constants(self, matrices: Tensor | None) -> dict[str, int | bool]:
        """The compile-time constants of the kernels."""
        overlaps = can_overlap(self.x.device)
        return {
            "HAS_MATRIX": matrices is not None,
            "PARTS": _parts(self.x, matrices),
            "ROWS": self.tile.rows,
            "GROUPS": self.tile.groups,
            "STAGES": 1 if self.steps == 1 else self.tile.stages,
            "ONCE": self.steps == 1,
            "EVEN": self.rows % self.tile.rows == 0 and self.groups % self.tile.groups == 0,
            "FLAT": self.is_flat,
            "OVERLAP": AFTER_IT.value if overlaps else 0,
            "num_warps": 1,
            "launch_pdl": overlaps,
        }


def compiled_for(
    rows: int, width: int, matrices: Tensor | None, is_packed: bool = False, has_fixed_tile: bool = False
) -> Hashable:
    """The key of what the quantizer of contiguous inputs [rows, width] is compiled for, as far as it depends on the
    rows."""
    x = torch.empty(rows, width, device="meta")
    blocks = _Blocks.of(x, matrices, is_packed, in_order=is_packed, has_fixed_tile=has_fixed_tile)
    return blocks.is_flat, tuple(blocks.constants(None).items())


def _matrix_stride(matrices: Tensor | None) -> int:
    return 0 if matrices is None or len(matrices) == 1 else BLOCK.value**2


def _parts(x: Tensor, matrices: Tensor | None) -> int:
    """The number of bfloat16 numbers that `x` is split into. 0 for float32 arithmetic, the only one in Triton's
    interpreter."""
    on_matrix_hardware = matrices is not None and matrices.dtype == torch.bfloat16 and x.is_cuda
    return _PARTS[x.dtype] if on_matrix_hardware else 0


def _numbers(format: Format, rule: ScaleRule) -> tuple[float, ...]:
    """The numbers of an element and a rule that the kernels need."""
    element = format.element
    assert isinstance(element, FloatElement) and rule.raises_from is not None and format.block == BLOCK.value
    smallest = 2.0**element.min_exponent
    return rule.raises_from(element), element.max_exponent, smallest, element.fraction_bits, element.max
