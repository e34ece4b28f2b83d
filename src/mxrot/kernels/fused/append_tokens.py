"""The newest token of every sequence into a packed cache, in one launch (Triton).

A program takes the keys, the values or the queries of one head of the cache for a few sequences: rows times matrix,
which is read once for all of them, quantizer, and the bytes at their places. `plain_append_tokens` is the
specification: without matrices, and wherever products are the same numbers, codes and what stands beside them are the
same bits. Products with float64 matrices are, but once in some 2^29 times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.fused.packed_rows import RowLayout, store_rows
from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows

PROGRAMS = 32
"""Of one kind; from so many on a program takes several rows, which share a matrix."""
MOST_ROWS = 8
"""Such rows."""
PRODUCTS = 8192
"""That are in the registers of a program at once."""
WHOLE = 128
"""Up to this width one row is multiplied with all of a matrix at once."""
ENTRIES = 4096
"""Of a matrix at once else; the next ones are on their way."""


@triton.jit
def _rows_times(
    x_pointer,
    places,
    inside,
    matrix_pointer,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
):
    """float32 [ROWS, WIDTH] of rows at places [ROWS], times the matrix there, in whose type products and sums are."""
    ROWS: tl.constexpr = places.shape[0]
    columns = tl.arange(0, WIDTH)
    if not HAS_MATRIX:
        place = places[:, None] + columns[None, :]
        return tl.load(x_pointer + place, mask=inside[:, None], other=0).to(tl.float32)
    else:
        work = matrix_pointer.dtype.element_ty
        if AT_ONCE == WIDTH:
            matrix = tl.load(matrix_pointer + columns[:, None] * WIDTH + columns[None, :])
            x = tl.load(x_pointer + places[:, None] + columns[None, :], mask=inside[:, None], other=0)
            return tl.sum(x.to(work)[:, :, None] * matrix[None, :, :], axis=1).to(tl.float32)
        else:
            total = tl.zeros([ROWS, AT_ONCE, WIDTH], work)
            for start in tl.range(0, WIDTH, AT_ONCE, num_stages=3):
                along = start + tl.arange(0, AT_ONCE)
                matrix = tl.load(matrix_pointer + along[:, None] * WIDTH + columns[None, :])
                x = tl.load(x_pointer + places[:, None] + along[None, :], mask=inside[:, None], other=0)
                total += x.to(work)[:, :, None] * matrix[None, :, :]
            return tl.sum(total, axis=1).to(tl.float32)


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
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if kind == 2:
        inside = row < batch * group
        sequence, own = row // group, head * group + row % group
        x = _rows_times(
            query_pointer,
            sequence * query_batch + own * query_head,
            inside,
            query_matrix + head * query_matrix_stride,
            WIDTH,
            AT_ONCE,
            TRANSFORMS_KEYS,
        )
        place = (sequence * kv_heads * group + own)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(out_pointer + place, x.to(out_pointer.dtype.element_ty), mask=inside[:, None])
    elif tl.program_id(1) * ROWS < batch:  # there are fewer rows of keys and values than of queries
        if kind == 0:
            inside = row < batch
            x = _rows_times(
                key_pointer + head * key_head,
                row * key_batch,
                inside,
                key_matrix + head * key_matrix_stride,
                WIDTH,
                AT_ONCE,
                TRANSFORMS_KEYS,
            )
            store_rows(
                x,
                key_codes,
                row * kc_batch + head * kc_head + token * kc_token,
                key_scales,
                key_zeros,
                row * kp_batch + head * kp_head + token * kp_token,
                inside,
                K_BITS,
                K_GROUPS,
                K_FRACTION,
                K_MIN_EXPONENT,
                K_MAX_EXPONENT,
                K_LARGEST,
                K_RAISES_FROM,
                K_CLIP,
            )
        else:
            inside = row < batch
            x = _rows_times(
                value_pointer + head * value_head,
                row * value_batch,
                inside,
                value_matrix + head * value_matrix_stride,
                WIDTH,
                AT_ONCE,
                TRANSFORMS_VALUES,
            )
            store_rows(
                x,
                value_codes,
                row * vc_batch + head * vc_head + token * vc_token,
                value_scales,
                value_zeros,
                row * vp_batch + head * vp_head + token * vp_token,
                inside,
                V_BITS,
                V_GROUPS,
                V_FRACTION,
                V_MIN_EXPONENT,
                V_MAX_EXPONENT,
                V_LARGEST,
                V_RAISES_FROM,
                V_CLIP,
            )


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
    has_matrix = moves or matrices.values is not None
    rows = min(MOST_ROWS, triton.next_power_of_2(max(1, kv_heads * most // PROGRAMS)))
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
        AT_ONCE=width if rows == 1 and width <= WHOLE else max(1, min(ENTRIES // width, PRODUCTS // (width * rows))),
        TRANSFORMS_KEYS=moves,
        TRANSFORMS_VALUES=matrices.values is not None,
        OVERLAP=overlaps,
        **layouts[0].writing("K"),
        **layouts[1].writing("V"),
        num_warps=8 if has_matrix else 1 if rows == 1 else 4,
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
