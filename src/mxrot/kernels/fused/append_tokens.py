"""The newest token of every sequence into a packed cache, in one launch (Triton).

A program takes one head's key, value or queries of a few sequences: row times matrix, quantizer, and the bytes at their
place. `plain_append_tokens` is the specification: without matrices, and wherever products are the same numbers, codes
and what stands beside them are the same bits. Products with float64 matrices are, but once in some 2^29 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.fused.packed_rows import RowLayout, store_row
from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows

PROGRAMS = 256
"""Of one kind; from so many on a program takes several rows, one after the other, with one matrix."""
MOST_ROWS = 8
"""Such rows."""
ENTRIES_AT_ONCE = 16384
"""Of a matrix, in registers."""


@triton.jit
def row_product(x_pointer, matrix_pointer, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, HAS_MATRIX: tl.constexpr):
    """float32 [WIDTH] of the row there, times the matrix there, in whose type products and their sums are."""
    columns = tl.arange(0, WIDTH)
    if not HAS_MATRIX:
        return tl.load(x_pointer + columns).to(tl.float32)
    else:
        work = matrix_pointer.dtype.element_ty
        total = tl.zeros([WIDTH], work)
        for start in tl.static_range(0, WIDTH, AT_ONCE):
            along = start + tl.arange(0, AT_ONCE)
            matrix = tl.load(matrix_pointer + along[:, None] * WIDTH + columns[None, :])
            total += tl.sum(tl.load(x_pointer + along).to(work)[:, None] * matrix, axis=0)
        return total.to(tl.float32)


@triton.jit(do_not_specialize=["position", "batch"])
def _append(
    query_pointer,
    key_pointer,
    value_pointer,
    out_pointer,
    query_matrix,
    key_matrix,
    value_matrix,
    key_codes,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
    position,
    batch,
    kv_heads,
    group,
    query_batch,
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
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
    query_matrix_stride,
    key_matrix_stride,
    value_matrix_stride,
    POSITION_AT_POINTER: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TRANSFORMS_KEYS: tl.constexpr,
    TRANSFORMS_VALUES: tl.constexpr,
    OVERLAP: tl.constexpr,
    K_BITS: tl.constexpr,
    K_GROUPS: tl.constexpr,
    K_FRACTION: tl.constexpr,
    K_MIN_EXPONENT: tl.constexpr,
    K_MAX_EXPONENT: tl.constexpr,
    K_LARGEST: tl.constexpr,
    K_RAISES_FROM: tl.constexpr,
    K_CLIP: tl.constexpr,
    V_BITS: tl.constexpr,
    V_GROUPS: tl.constexpr,
    V_FRACTION: tl.constexpr,
    V_MIN_EXPONENT: tl.constexpr,
    V_MAX_EXPONENT: tl.constexpr,
    V_LARGEST: tl.constexpr,
    V_RAISES_FROM: tl.constexpr,
    V_CLIP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    kind, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    token = tl.load(position) if POSITION_AT_POINTER else position
    token = token.to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * ROWS
    if kind == 0:
        for row in range(first, tl.minimum(first + ROWS, batch)):
            x_pointer = key_pointer + row * key_batch + head * key_head
            x = row_product(x_pointer, key_matrix + head * key_matrix_stride, WIDTH, AT_ONCE, TRANSFORMS_KEYS)
            at = row * kp_batch + head * kp_head + token * kp_token
            store_row(
                x,
                key_codes + row * kc_batch + head * kc_head + token * kc_token,
                key_scales + at,
                key_zeros + at,
                WIDTH,
                K_BITS,
                K_GROUPS,
                K_FRACTION,
                K_MIN_EXPONENT,
                K_MAX_EXPONENT,
                K_LARGEST,
                K_RAISES_FROM,
                K_CLIP,
            )
    elif kind == 1:
        for row in range(first, tl.minimum(first + ROWS, batch)):
            x_pointer = value_pointer + row * value_batch + head * value_head
            x = row_product(x_pointer, value_matrix + head * value_matrix_stride, WIDTH, AT_ONCE, TRANSFORMS_VALUES)
            at = row * vp_batch + head * vp_head + token * vp_token
            store_row(
                x,
                value_codes + row * vc_batch + head * vc_head + token * vc_token,
                value_scales + at,
                value_zeros + at,
                WIDTH,
                V_BITS,
                V_GROUPS,
                V_FRACTION,
                V_MIN_EXPONENT,
                V_MAX_EXPONENT,
                V_LARGEST,
                V_RAISES_FROM,
                V_CLIP,
            )
    else:
        for row in range(first, tl.minimum(first + ROWS, batch * group)):
            sequence, own = row // group, head * group + row % group
            x_pointer = query_pointer + sequence * query_batch + own * query_head
            x = row_product(x_pointer, query_matrix + head * query_matrix_stride, WIDTH, AT_ONCE, TRANSFORMS_KEYS)
            place = out_pointer + (sequence * kv_heads * group + own) * WIDTH + tl.arange(0, WIDTH)
            tl.store(place, x.to(out_pointer.dtype.element_ty))


def append_tokens(query: Tensor, key: Tensor, value: Tensor, cached: CachedTokens, position: int | Tensor) -> Tensor:
    """As `plain_append_tokens` defines it, for one token a sequence and rows that `RowLayout` knows."""
    batch, kv_heads, tokens, width = key.shape
    matrices = cached.matrices
    assert tokens == 1 and (matrices.keys is None) == (matrices.queries is None)
    key, value, query = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value, query))
    layouts = [RowLayout.of(rows.quantizer, width) for rows in (cached.keys, cached.values)]
    assert layouts[0] is not None and layouts[1] is not None
    moves = matrices.queries is not None
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if moves else query
    group = query.shape[1] // kv_heads
    most = batch * group if moves else batch
    rows = min(MOST_ROWS, max(1, kv_heads * most // PROGRAMS))
    overlaps = can_overlap(query.device)
    _append[((3 if moves else 2) * kv_heads, triton.cdiv(most, rows))](
        query,
        key,
        value,
        out,
        *(query if one is None else one.contiguous() for one in (matrices.queries, matrices.keys, matrices.values)),
        *_tensors(cached.keys),
        *_tensors(cached.values),
        position,
        batch,
        kv_heads,
        group,
        *query.stride()[:2],
        *key.stride()[:2],
        *value.stride()[:2],
        *strides_of(cached.keys),
        *strides_of(cached.values),
        *(matrix_stride(one) for one in (matrices.queries, matrices.keys, matrices.values)),
        POSITION_AT_POINTER=isinstance(position, Tensor),
        ROWS=rows,
        WIDTH=width,
        AT_ONCE=min(width, ENTRIES_AT_ONCE // width),
        TRANSFORMS_KEYS=moves,
        TRANSFORMS_VALUES=matrices.values is not None,
        OVERLAP=overlaps,
        **layouts[0].writing("K"),
        **layouts[1].writing("V"),
        num_warps=8 if moves or matrices.values is not None else 1,
        enable_fp_fusion=False,  # a clip is rounded before extremes are subtracted
        launch_pdl=overlaps,
    )
    return out


def _tensors(rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and zero points, or anything where there are none."""
    scales = rows.parts["scale"]
    return rows.codes, scales, rows.parts.get("zero_point", scales)


def strides_of(rows: TokenRows, unit: int = 1) -> tuple[int, ...]:
    """Of sequences, heads and tokens: of codes in units of so many bytes, and of what stands beside them."""
    scales = rows.parts["scale"]
    assert all(part.stride() == scales.stride() for part in rows.parts.values()) and scales.stride(-1) == 1
    return (*(stride // unit for stride in rows.codes.stride()[:3]), *scales.stride()[:3])


def matrix_stride(matrices: Tensor | None) -> int:
    """Between the matrices of two kv heads."""
    return 0 if matrices is None or len(matrices) == 1 else matrices.shape[-1] ** 2
