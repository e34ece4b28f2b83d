"""One pass over an activation: block transform, scale, rounding (Triton).

Reads fp16, bf16 or fp32 [M, K], multiplies each block of 32 by its matrix with float32 sums, picks the exponent of
each row's block, rounds to the element, and writes what the product that follows reads:

- what the codes stand for, as bfloat16 (which holds it exactly) or as FP8 E5M2 under a static power of two;
- MXFP4 codes, two a byte, and E8M0 scales, row by row or in the order of a block-scaled product.

The plain twins are the specification. Given the same transformed values the kernel gives the same bits; its products
are summed in an order of their own, so with a transform a value next to a rounding boundary may fall on the other
side. A block that holds NaN or Inf, after the transform, becomes NaN.

Matrices that are bfloat16 are multiplied on matrix hardware: activations of 8, 11 or 24 significant bits are one, two
or three bfloat16 numbers, whose products with the matrix are exact in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.formats import Format, ScaleRule
from mxrot.formats.element import FloatElement
from mxrot.kernels.arithmetic import power_of_two, round_to_element, to_grid
from mxrot.kernels.plain import E5M2_EXPONENTS, PackedRows, swizzled_bytes

BLOCK = tl.constexpr(32)
ROWS = 128
GROUPS = 4
"""Blocks side by side that one program does one after the other."""
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def _block(
    x_pointer,
    matrix_pointer,
    rows,
    rows_in_all,
    group,
    x_stride,
    matrix_stride,
    HAS_MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The values of block `group` in these rows, transformed: float32 [ROWS, 32]."""
    place = rows[:, None] * x_stride + group * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_pointer + place, mask=(rows < rows_in_all)[:, None], other=0.0).to(tl.float32)
    if HAS_MATRIX:
        x = _transformed(x, matrix_pointer + group * matrix_stride, PARTS)
    return x


@triton.jit
def _transformed(x, matrix_pointer, PARTS: tl.constexpr):
    """float32 [ROWS, 32] times the matrix there; PARTS 0 is float32 arithmetic."""
    columns = tl.arange(0, BLOCK)
    matrix = tl.load(matrix_pointer + columns[:, None] * BLOCK + columns[None, :])
    if PARTS == 0:
        product = tl.dot(x, matrix.to(tl.float32), input_precision="ieee")
    else:
        first = x.to(tl.bfloat16)
        product = tl.dot(first, matrix)
        if PARTS > 1:
            rest = x - first.to(tl.float32)
            second = rest.to(tl.bfloat16)
            product = tl.dot(second, matrix, product)
            if PARTS > 2:
                product = tl.dot((rest - second.to(tl.float32)).to(tl.bfloat16), matrix, product)
    return product


@triton.jit
def _exponents(x, raises_from, max_exponent, least, most):
    """The exponent of each row's scale, and the bits of its largest magnitude."""
    # As integers the bits of |x| are ordered like the numbers, with NaN on top; a float maximum would drop NaN.
    bits = tl.max(tl.abs(x).to(tl.int32, bitcast=True), axis=1)
    exponents = (bits >> 23) - 127 - max_exponent + ((bits & 0x7FFFFF) >= raises_from).to(tl.int32)
    return tl.minimum(tl.maximum(exponents, least), most), bits


@triton.jit
def _values(
    x_pointer,
    matrix_pointer,
    out_pointer,
    rows_in_all,
    groups_in_all,
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
    HAS_MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    for step in tl.static_range(GROUPS):
        group = tl.program_id(1) * GROUPS + step
        if group < groups_in_all:
            inside = (rows < rows_in_all)[:, None]
            place = group * BLOCK + columns[None, :]
            x = _block(x_pointer, matrix_pointer, rows, rows_in_all, group, x_stride, matrix_stride, HAS_MATRIX, PARTS)
            exponents, bits = _exponents(x, raises_from, max_exponent, least, most)
            rounded = round_to_element(x * power_of_two(-exponents)[:, None], smallest_normal, fraction_bits, largest)
            scales = tl.where(bits < 0x7F800000, power_of_two(exponents - shift), float("nan"))
            values = rounded * scales[:, None]
            tl.store(
                out_pointer + rows[:, None] * out_stride + place, values.to(out_pointer.dtype.element_ty), mask=inside
            )


@triton.jit
def _packed(
    x_pointer,
    matrix_pointer,
    codes_pointer,
    scales_pointer,
    rows_in_all,
    groups_in_all,
    x_stride,
    matrix_stride,
    raises_from,
    max_exponent,
    smallest_normal,
    fraction_bits,
    largest,
    HAS_MATRIX: tl.constexpr,
    PARTS: tl.constexpr,
    SWIZZLED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    pairs = tl.arange(0, BLOCK // 2)
    for step in tl.static_range(GROUPS):
        group = tl.program_id(1) * GROUPS + step
        if group < groups_in_all:
            is_row = rows < rows_in_all
            inside = is_row[:, None]
            x = _block(x_pointer, matrix_pointer, rows, rows_in_all, group, x_stride, matrix_stride, HAS_MATRIX, PARTS)
            exponents, bits = _exponents(x, raises_from, max_exponent, -127, 127)
            is_finite = bits < 0x7F800000
            scaled = x * power_of_two(-exponents)[:, None]
            raised, power = to_grid(tl.minimum(tl.abs(scaled), largest), smallest_normal, fraction_bits)
            # Steps of half a binade, 0 to 4 of them, and two codes for each binade from 1 on.
            steps = raised.to(tl.int32, bitcast=True) & 7
            codes = steps + ((power.to(tl.int32, bitcast=True) >> 22) - 2 * (127 + 23 - fraction_bits))
            codes = codes | ((scaled.to(tl.int32, bitcast=True) >> 28) & 8)
            codes = tl.where(is_finite[:, None], codes, 0)
            even, odd = tl.split(tl.reshape(codes, [ROWS, BLOCK // 2, 2]))
            packed = (even | (odd << 4)).to(tl.uint8)
            tl.store(
                codes_pointer + (rows[:, None] * groups_in_all + group) * (BLOCK // 2) + pairs[None, :],
                packed,
                mask=inside,
            )
            scale = tl.where(is_finite, exponents + 127, 255).to(tl.uint8)
            if SWIZZLED:
                tile = (rows // 128) * ((groups_in_all + 3) // 4) + group // 4
                target = tile * 512 + (rows % 32) * 16 + (rows % 128) // 32 * 4 + group % 4
            else:
                target = rows * groups_in_all + group
            tl.store(scales_pointer + target, scale, mask=is_row)


def rotate_quantize(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) as bfloat16, the shape of `x` [..., K]; `matrices` [1 | G, 32, 32] float32 or bfloat16, or None.

    For 32-element blocks of a FloatElement under a rule with `raises_from`.
    """
    flat = _rows(x)
    out = torch.empty(flat.shape, dtype=torch.bfloat16, device=x.device)
    _write_values(flat, matrices, format, rule, out, (-127, 127), 0)
    return out.view(x.shape)


def rotate_quantize_e5m2(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, shift: int = 0) -> Tensor:
    """As `plain_rotate_quantize_e5m2` defines it."""
    flat = _rows(x)
    out = torch.empty(flat.shape, dtype=torch.float8_e5m2, device=x.device)
    least, most = E5M2_EXPONENTS
    _write_values(flat, matrices, format, rule, out, (least + shift, most + shift), shift)
    return out.view(x.shape)


def rotate_quantize_packed(
    x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule, swizzled: bool = False
) -> PackedRows:
    """As `plain_rotate_quantize_packed` defines it."""
    flat = _rows(x)
    rows, groups = len(flat), flat.shape[1] // BLOCK.value
    codes = torch.empty(rows, groups * 16, dtype=torch.uint8, device=x.device)
    size = swizzled_bytes(rows, groups) if swizzled else rows * groups
    # What the swizzled order holds beyond the rows and blocks that there are counts as scales of 2^-127.
    scales = (torch.zeros if swizzled else torch.empty)(size, dtype=torch.uint8, device=x.device)
    if codes.numel():
        _packed[_grid(rows, groups)](
            flat,
            flat if matrices is None else matrices.contiguous(),
            codes,
            scales,
            rows,
            groups,
            flat.stride(0),
            _matrix_stride(matrices),
            *_numbers(format, rule),
            HAS_MATRIX=matrices is not None,
            PARTS=_parts(x, matrices),
            SWIZZLED=swizzled,
            **_tile(rows),
        )
    shape = x.shape[:-1]
    return PackedRows(codes.view(*shape, groups * 16), scales if swizzled else scales.view(*shape, groups))


def _write_values(
    flat: Tensor,
    matrices: Tensor | None,
    format: Format,
    rule: ScaleRule,
    out: Tensor,
    exponents: tuple[int, int],
    shift: int,
) -> None:
    rows, groups = len(flat), flat.shape[1] // BLOCK.value
    if not out.numel():
        return
    _values[_grid(rows, groups)](
        flat,
        flat if matrices is None else matrices.contiguous(),
        out,
        rows,
        groups,
        flat.stride(0),
        out.stride(0),
        _matrix_stride(matrices),
        *_numbers(format, rule),
        *exponents,
        shift,
        HAS_MATRIX=matrices is not None,
        PARTS=_parts(flat, matrices),
        **_tile(rows),
    )


def _rows(x: Tensor) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _tile(rows: int) -> dict[str, int]:
    """Rows and blocks a program: few of both where there are few rows, so that the device has enough programs."""
    return {"ROWS": min(ROWS, max(16, triton.next_power_of_2(rows))), "GROUPS": GROUPS if rows > ROWS else 1}


def _grid(rows: int, groups: int) -> tuple[int, int]:
    tile = _tile(rows)
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(groups, tile["GROUPS"])


def _matrix_stride(matrices: Tensor | None) -> int:
    return 0 if matrices is None or len(matrices) == 1 else BLOCK.value**2


def _parts(x: Tensor, matrices: Tensor | None) -> int:
    """How many bfloat16 numbers `x` is split into; 0 for float32 arithmetic, all that Triton's interpreter has."""
    on_matrix_hardware = matrices is not None and matrices.dtype == torch.bfloat16 and x.is_cuda
    return _PARTS[x.dtype] if on_matrix_hardware else 0


def _numbers(format: Format, rule: ScaleRule) -> tuple[float, ...]:
    """What the kernels need to know of an element and a rule."""
    element = format.element
    assert isinstance(element, FloatElement) and rule.raises_from is not None and format.block == BLOCK.value
    smallest = 2.0**element.min_exponent
    return rule.raises_from(element), element.max_exponent, smallest, element.fraction_bits, element.max
