"""One token of every sequence attends to a packed cache (Triton).

Tokens are split among programs, each of which goes through its share for all queries that read one head of the cache:
codes become numbers in registers (`fused.packed_rows`), scores and what they sum up are products on matrix hardware,
and the softmax goes along with the sums (Flash-Decoding; arXiv 2205.14135). A second launch puts the shares together.

Products have bfloat16 operands for bfloat16 queries, as in PyTorch's own attention: probabilities are rounded to them,
and integers with several scales a row. For float16 queries both queries and probabilities are sums of two bfloat16
numbers. For float32, and by Triton's interpreter, all is float32. Sums are float32. `plain_decode_attention` is the
specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.append_tokens import matrix_stride, strides_of
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.fused.packed_rows import RowLayout, are_in_range, columns_of, numbers_of
from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows, times_each

LOG2_E = 1.4426950408889634
UNIT_BYTES = 2


@triton.jit
def _dot(a, b, total, DTYPE: tl.constexpr):
    if tl.float32 == DTYPE:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)


@triton.jit
def _product(x, y, total, PARTS: tl.constexpr, DTYPE: tl.constexpr):
    """total + x y, where float32 y becomes so many numbers of DTYPE, and x is of that."""
    first = y.to(DTYPE)
    total = _dot(x, first, total, DTYPE)
    if PARTS == 2:
        total = _dot(x, (y - first.to(tl.float32)).to(DTYPE), total, DTYPE)
    return total


@triton.jit
def _load(
    codes_pointer,
    scale_pointer,
    zero_pointer,
    code_stride,
    part_stride,
    start,
    count,
    UNITS: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Units, scales and zero points of TOKENS tokens from `start` on; zeros from `count` on."""
    token = start + tl.arange(0, TOKENS)
    inside = (token < count)[:, None]
    row = token.to(tl.int64)[:, None]
    units = tl.load(codes_pointer + row * code_stride + tl.arange(0, UNITS)[None, :], mask=inside, other=0)
    place = row * part_stride + tl.arange(0, GROUPS)[None, :]
    scales = tl.load(scale_pointer + place, mask=inside, other=0)
    zeros = scales
    if HAS_ZEROS:
        zeros = tl.load(zero_pointer + place, mask=inside, other=0)
    return units, scales, zeros


@triton.jit
def _fetch(codes_pointer, scale_pointer, code_stride, part_stride, start, count, TOKENS: tl.constexpr):
    """Let rows and scales of TOKENS tokens from `start` on be brought to the L2 cache."""
    row = tl.maximum(tl.minimum(start + tl.arange(0, TOKENS), count - 1), 0).to(tl.int64)
    assembly: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(assembly, "=r,l", [codes_pointer + row * code_stride], tl.int32, False, 1)
    tl.inline_asm_elementwise(assembly, "=r,l", [scale_pointer + row * part_stride], tl.int32, False, 1)


@triton.jit
def _row_scales(scales, TOKENS: tl.constexpr):
    """float32 [TOKENS] of the only scale of each row."""
    return tl.reshape(scales, [TOKENS]).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def _share(
    query_pointer,
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    key_codes,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
    visible_pointer,
    length,
    kv_heads,
    query_batch,
    query_head,
    kc_batch,
    kc_head,
    kc_token,
    kp_batch,
    kp_head,
    kp_token,
    vc_batch,
    vc_head,
    vc_token,
    vp_batch,
    vp_head,
    vp_token,
    visible_batch,
    scaling,
    softcap,
    LENGTH_AT_POINTER: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    OVERLAP: tl.constexpr,
    STAGES: tl.constexpr,
    FETCHES: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_FRACTION: tl.constexpr,
    K_MIN_EXPONENT: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_FRACTION: tl.constexpr,
    V_MIN_EXPONENT: tl.constexpr,
):
    K_UNITS: tl.constexpr = WIDTH * K_BITS // 16
    V_UNITS: tl.constexpr = WIDTH * V_BITS // 16
    batch, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    split, splits = tl.program_id(1), tl.num_programs(1)
    count = (tl.load(length) if LENGTH_AT_POINTER else length).to(tl.int32)
    each = (count + TOKENS * splits - 1) // (TOKENS * splits) * TOKENS
    key_codes += batch * kc_batch + kv_head * kc_head
    key_scales += batch * kp_batch + kv_head * kp_head
    key_zeros += batch * kp_batch + kv_head * kp_head
    value_codes += batch * vc_batch + kv_head * vc_head
    value_scales += batch * vp_batch + kv_head * vp_head
    value_zeros += batch * vp_batch + kv_head * vp_head
    if FETCHES:
        # Of these the kernel before writes the newest token at most, and nothing is read yet.
        _fetch(key_codes, key_scales, kc_token, kp_token, split * each, count, TOKENS)
        _fetch(value_codes, value_scales, vc_token, vp_token, split * each, count, TOKENS)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    heads = tl.arange(0, HEADS)
    of_query = heads[None, :] * query_head + columns_of(WIDTH, K_BITS)[:, None]
    query_pointer += batch * query_batch + kv_head * GROUP * query_head
    query = tl.load(query_pointer + of_query, mask=heads[None, :] < GROUP, other=0).to(tl.float32)
    if K_FRACTION >= 0:
        query = query * 2.0**60
    largest = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    sums = tl.zeros([WIDTH, HEADS], tl.float32)
    for start in tl.range(split * each, tl.minimum(split * each + each, count), TOKENS, num_stages=STAGES):
        units, scales, zeros = _load(
            key_codes,
            key_scales,
            key_zeros,
            kc_token,
            kp_token,
            start,
            count,
            K_UNITS,
            K_GROUPS,
            TOKENS,
            K_FRACTION < 0,
        )
        v_units, v_scales, v_zeros = _load(
            value_codes,
            value_scales,
            value_zeros,
            vc_token,
            vp_token,
            start,
            count,
            V_UNITS,
            V_GROUPS,
            TOKENS,
            V_FRACTION < 0,
        )
        if FETCHES > 1:
            after = start + TOKENS
            _fetch(key_codes, key_scales, kc_token, kp_token, after, count, TOKENS)
            _fetch(value_codes, value_scales, vc_token, vp_token, after, count, TOKENS)
        keys = numbers_of(units, scales, zeros, K_BITS, K_FRACTION, K_MIN_EXPONENT, DTYPE)
        scores = _product(keys, query, tl.zeros([TOKENS, HEADS], tl.float32), PARTS, DTYPE)
        if K_FRACTION < 0 and K_GROUPS == 1:
            scores = scores * _row_scales(scales, TOKENS)[:, None]
        token = start + tl.arange(0, TOKENS)
        seen = token < count
        if HAS_VISIBLE:
            flags = tl.load(visible_pointer + batch * visible_batch + token, mask=seen, other=0)
            seen = seen & (flags != 0)
        if HAS_SOFTCAP:
            # tanh x = 2 sigmoid(2 x) - 1; `scaling` is over the cap here, and `softcap` in units of log 2.
            scores = (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) * scaling)) - 1.0) * softcap
        else:
            scores = scores * scaling
        if K_FRACTION >= 0:
            scores = tl.where(are_in_range(scales, K_FRACTION)[:, None], scores, float("nan"))
        scores = tl.where(seen[:, None], scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, axis=0))
        # Where nothing was seen so far, anything finite will do.
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(scores - origin[None, :])
        shrink = tl.exp2(before - origin)
        total = total * shrink + tl.sum(p, axis=0)
        if V_FRACTION < 0 and V_GROUPS == 1:
            p = p * _row_scales(v_scales, TOKENS)[:, None]
        if V_FRACTION >= 0:
            p = tl.where(are_in_range(v_scales, V_FRACTION)[:, None], p, float("nan"))
        values = numbers_of(v_units, v_scales, v_zeros, V_BITS, V_FRACTION, V_MIN_EXPONENT, DTYPE)
        sums = _product(tl.trans(values), p, sums * shrink[None, :], PARTS, DTYPE)
    if V_FRACTION >= 0:
        sums = sums * 2.0**60
    row = (tl.program_id(0).to(tl.int64) * GROUP + heads) * splits + split
    tl.store(maxima_pointer + row, largest, mask=heads < GROUP)
    tl.store(totals_pointer + row, total, mask=heads < GROUP)
    place = row[None, :] * WIDTH + columns_of(WIDTH, V_BITS)[:, None]
    tl.store(sums_pointer + place, sums, mask=heads[None, :] < GROUP)


@triton.jit
def _combine(
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    out_pointer,
    matrix_pointer,
    matrix_stride,
    splits,
    kv_heads,
    group,
    HAS_MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The shares of one head of one sequence, some columns of them, and what they give times the matrix of its kv
    head."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    split = tl.arange(0, SPLITS)
    maxima = tl.load(maxima_pointer + row * splits + split, mask=split < splits, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([AT_ONCE], tl.float32)
    found = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        at = row * splits + split
        factors = tl.exp2(tl.load(maxima_pointer + at, mask=split < splits, other=float("-inf")) - largest)
        total += factors * tl.load(totals_pointer + at, mask=split < splits, other=0)
        place = at[:, None] * WIDTH + columns[None, :]
        found += factors[:, None] * tl.load(sums_pointer + place, mask=(split < splits)[:, None], other=0)
    total = tl.sum(total, axis=0)
    found = tl.sum(found, axis=0) / tl.where(total > 0, total, 1.0)
    if HAS_MATRIX:
        matrix_pointer += row // group % kv_heads * matrix_stride
        matrix = tl.load(matrix_pointer + columns[:, None] * WIDTH + columns[None, :])
        found = tl.sum(found.to(matrix.dtype)[:, None] * matrix, axis=0)
    tl.store(out_pointer + row * WIDTH + columns, found.to(out_pointer.dtype.element_ty))


@dataclass(frozen=True)
class Tile:
    """How tokens are shared out."""

    tokens: int
    """That a program takes at a time."""
    splits: int
    """Programs for one head of the cache of one sequence."""
    warps: int = 1
    stages: int = 1
    fetches: int = 0
    """Bring tokens to the L2 cache before they are loaded: 1 for the first ones of a program, 2 for all."""
    registers: int | None = None
    """The most that a thread may have."""


MOST_COMBINED = 128
"""Up to this width a matrix is in the registers of one program."""
MOST_SPLITS = 256
"""What one program puts together."""
COLUMNS = 32
"""That it does so for, where no matrix wants them all."""
PROGRAMS = 8
"""For each multiprocessor, of one warp each."""


def choose_tile(pairs: int, tokens: int, processors: int, is_float32: bool = False) -> Tile:
    """For so many pairs of a sequence and a head of the cache, of up to so many tokens each, and multiprocessors."""
    size = 16 if is_float32 else 32  # operands of 32 bits take twice the registers
    splits = min(triton.cdiv(tokens, size), triton.cdiv(PROGRAMS * processors, pairs), MOST_SPLITS)
    return Tile(size, max(1, splits), fetches=1)


def decode_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """As `plain_decode_attention` defines it, for rows that `RowLayout` knows, of a power of two from 64 on."""
    batch, kv_heads = cached.keys.codes.shape[:2]
    tokens = length if isinstance(length, int) else cached.keys.capacity
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 4
    tile = choose_tile(batch * kv_heads, tokens, processors, query.dtype == torch.float32)
    return attend_by_tiles(query, cached, length, visible, scaling, softcap, tile)


def attend_by_tiles(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None,
    tile: Tile,
) -> Tensor:
    """`decode_attention` by a given tile."""
    batch, heads, _, width = query.shape
    kv_heads, device = cached.keys.codes.shape[1], query.device
    query = query if query.stride(-1) == 1 else query.contiguous()
    layouts = [RowLayout.of(rows.quantizer, width) for rows in (cached.keys, cached.values)]
    assert layouts[0] is not None and layouts[1] is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=device)
    if not out.numel():
        return out
    parts, dtype = _operands(query)
    sums = torch.empty(batch * heads, tile.splits, width, dtype=torch.float32, device=device)
    maxima, totals = (torch.empty(batch * heads, tile.splits, dtype=torch.float32, device=device) for _ in range(2))
    overlaps = can_overlap(device)
    group = heads // kv_heads
    _share[(batch * kv_heads, tile.splits)](
        query,
        sums,
        maxima,
        totals,
        *_units(cached.keys),
        *_units(cached.values),
        query if visible is None else visible.view(torch.uint8) if visible.dtype == torch.bool else visible,
        length,
        kv_heads,
        *query.stride()[:2],
        *strides_of(cached.keys, UNIT_BYTES),
        *strides_of(cached.values, UNIT_BYTES),
        0 if visible is None else visible.stride(0),
        scaling * LOG2_E if softcap is None else scaling / softcap,
        0.0 if softcap is None else softcap * LOG2_E,
        LENGTH_AT_POINTER=isinstance(length, Tensor),
        HAS_VISIBLE=visible is not None,
        HAS_SOFTCAP=softcap is not None,
        GROUP=group,
        HEADS=max(8, triton.next_power_of_2(group)),
        WIDTH=width,
        TOKENS=tile.tokens,
        PARTS=parts,
        DTYPE=dtype,
        OVERLAP=overlaps,
        STAGES=tile.stages,
        FETCHES=tile.fetches if query.is_cuda else 0,
        **layouts[0].reading("K"),
        **layouts[1].reading("V"),
        num_warps=tile.warps,
        maxnreg=tile.registers,
        launch_pdl=overlaps,
    )
    outputs = cached.matrices.outputs
    is_small = outputs is not None and width <= MOST_COMBINED
    columns = width if is_small else min(width, COLUMNS)
    splits = triton.next_power_of_2(tile.splits)
    _combine[(batch * heads, width // columns)](
        sums,
        maxima,
        totals,
        out,
        outputs.contiguous() if outputs is not None and is_small else sums,
        matrix_stride(outputs),
        tile.splits,
        kv_heads,
        group,
        HAS_MATRIX=is_small,
        WIDTH=width,
        COLUMNS=columns,
        SPLITS=splits,
        AT_ONCE=min(splits, 4096 // columns),
        OVERLAP=overlaps,
        num_warps=8 if is_small else 4,
        launch_pdl=overlaps,
    )
    return out if outputs is None or is_small else times_each(out, outputs).to(query.dtype)


def _operands(query: Tensor) -> tuple[int, tl.dtype]:
    """Of how many numbers the other operands of products are sums, and of which type."""
    if not query.is_cuda or query.dtype == torch.float32:
        return 1, tl.float32
    return (1 if query.dtype == torch.bfloat16 else 2), tl.bfloat16


def _units(rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in units, scales, and zero points, or anything where there are none."""
    scales = rows.parts["scale"]
    return rows.codes.view(torch.int16), scales, rows.parts.get("zero_point", scales)
