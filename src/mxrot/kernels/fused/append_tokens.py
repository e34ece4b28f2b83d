"""Packs the newest token of every sequence into a cache, in one launch (Triton).

A program handles the keys, the values or the queries of one head of the cache for a few sequences. It multiplies the
rows by the matrix, which is read once for all of them, quantizes, and writes the bytes to their places. If some tokens
are read unquantized, their rows are also written unchanged. `plain_append_tokens` is the specification. Without
matrices, and wherever products are the same numbers, codes and parts are the same bits. Products with float64 matrices
are the same, except about once in 2^29 times.
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
from mxrot.kernels.plain.exact_tokens import ExactTokens

PROGRAMS = 64
"""From this many programs of one kind on, a program handles several rows, which share a matrix."""
MOST_ROWS = 8
"""The maximum number of such rows."""
PRODUCTS = 8192
"""Products that are in the registers of a program at one time."""
WHOLE = 128
"""Up to this width, the whole matrix is in registers, and up to half of `MOST_ROWS` are multiplied one after the other.
On an H200, four rows take 7.5 us this way and 17 us otherwise, eight 23 us and 20 us."""
ENTRIES = 4096
"""Otherwise, matrix entries at one time. The next ones are being loaded."""


@triton.jit
def _rows_times(
    x_pointer,
    start,
    rows,
    per,
    batch_stride,
    head_stride,
    matrix_pointer,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_MATRIX: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """float32 [ROWS, WIDTH]: the rows from `start` on, up to `rows`, times the matrix. Products and sums have the type
    of the matrix. Each sequence has `per` rows, which are neighbouring heads."""
    columns = tl.arange(0, WIDTH)
    if HAS_MATRIX and AT_ONCE == WIDTH:
        # No kernel writes the matrix, so it is loaded while the previous kernel still runs.
        matrix = tl.load(matrix_pointer + columns[:, None] * WIDTH + columns[None, :])
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        found = tl.zeros([ROWS, WIDTH], tl.float32)
        x = _row(x_pointer, start, rows, per, batch_stride, head_stride, WIDTH)
        for row in tl.static_range(ROWS):
            after = _row(x_pointer, start + row + 1, rows, per, batch_stride, head_stride, WIDTH)
            one = tl.sum(x.to(matrix.dtype)[:, None] * matrix, axis=0).to(tl.float32)
            found = tl.where(tl.arange(0, ROWS)[:, None] == row, one[None, :], found)
            x = after
        return found
    else:
        if OVERLAP:
            gdc_wait()
            gdc_launch_dependents()
        row = start + tl.arange(0, ROWS)
        x_pointer += (row // per * batch_stride + row % per * head_stride)[:, None]
        inside = (row < rows)[:, None]
        if not HAS_MATRIX:
            return tl.load(x_pointer + columns[None, :], mask=inside, other=0).to(tl.float32)
        else:
            work = matrix_pointer.dtype.element_ty
            total = tl.zeros([ROWS, AT_ONCE, WIDTH], work)
            for begin in tl.range(0, WIDTH, AT_ONCE, num_stages=3):
                along = begin + tl.arange(0, AT_ONCE)
                matrix = tl.load(matrix_pointer + along[:, None] * WIDTH + columns[None, :])
                x = tl.load(x_pointer + along[None, :], mask=inside, other=0)
                total += x.to(work)[:, :, None] * matrix[None, :, :]
            return tl.sum(total, axis=1).to(tl.float32)


@triton.jit
def _row(x_pointer, row, rows, per, batch_stride, head_stride, WIDTH: tl.constexpr):
    """One of the rows, [WIDTH], or zeros if there is no such row."""
    columns = tl.arange(0, WIDTH)
    place = row // per * batch_stride + row % per * head_stride
    return tl.load(x_pointer + place + columns, mask=columns < tl.where(row < rows, WIDTH, 0), other=0)


@triton.jit
def _keep(
    x_pointer,
    x_batch,
    start,
    batch,
    head,
    kv_heads,
    token,
    recent_pointer,
    leading_pointer,
    begins_pointer,
    visible_pointer,
    visible_batch,
    ring,
    leading_rows,
    shift,
    notes,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    """Write rows of keys or values unchanged to their places: in the ring, and among the first tokens if they are. One
    program `notes` where sequences begin. All programs find the same values before and after it."""
    row, columns = start + tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    inside = row < batch
    pair = row * kv_heads + head
    x = tl.load(x_pointer + (row * x_batch)[:, None] + columns, mask=inside[:, None], other=0)
    if HAS_RECENT:
        at = pair * ring + (token + shift) % ring
        tl.store(recent_pointer + at[:, None] * WIDTH + columns, x, mask=inside[:, None])
    if FIRST > 0:
        begin = tl.load(begins_pointer + row, mask=inside, other=0)
        begin = tl.where(token > 0, begin, 0)
        if HAS_VISIBLE:
            flags = tl.load(visible_pointer + row * visible_batch + token, mask=inside, other=1)
            begin += ((begin == token) & (flags == 0)).to(tl.int64)
        if notes:
            tl.store(begins_pointer + row, begin, mask=inside)
        place = token - begin
        is_first = inside & (place >= 0) & (place < FIRST)
        at = pair * leading_rows + tl.where(is_first, place, 0)
        tl.store(leading_pointer + at[:, None] * WIDTH + columns, x, mask=is_first[:, None])


@triton.jit(do_not_specialize=["position", "batch", "ring", "leading_rows", "shift"])
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
    recent_keys,
    recent_values,
    leading_keys,
    leading_values,
    begins_pointer,
    visible_pointer,
    position,
    ring,
    leading_rows,
    shift,
    visible_batch,
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
    HAS_RECENT: tl.constexpr,
    FIRST: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
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
    kind, head = tl.program_id(0) // kv_heads, tl.program_id(0) % kv_heads
    start = tl.program_id(1).to(tl.int64) * ROWS
    row = start + tl.arange(0, ROWS)
    if kind == 2:
        x = _rows_times(
            query_pointer + head * group * query_head,
            start,
            batch * group,
            group,
            query_batch,
            query_head,
            query_matrix + head * query_matrix_stride,
            ROWS,
            WIDTH,
            AT_ONCE,
            TRANSFORMS_KEYS,
            OVERLAP,
        )
        place = ((row // group * kv_heads + head) * group + row % group)[:, None] * WIDTH
        place += tl.arange(0, WIDTH)[None, :]
        tl.store(out_pointer + place, x.to(out_pointer.dtype.element_ty), mask=(row < batch * group)[:, None])
    elif start < batch:  # there are fewer rows of keys and values than of queries
        inside = row < batch
        if kind == 0:
            x = _rows_times(
                key_pointer + head * key_head,
                start,
                batch,
                1,
                key_batch,
                0,
                key_matrix + head * key_matrix_stride,
                ROWS,
                WIDTH,
                AT_ONCE,
                TRANSFORMS_KEYS,
                OVERLAP,
            )
            token = (tl.load(position) if POSITION_AT_POINTER else position).to(tl.int64)
            _keep(
                key_pointer + head * key_head,
                key_batch,
                start,
                batch,
                head,
                kv_heads,
                token,
                recent_keys,
                leading_keys,
                begins_pointer,
                visible_pointer,
                visible_batch,
                ring,
                leading_rows,
                shift,
                head == 0,
                ROWS,
                WIDTH,
                HAS_RECENT,
                FIRST,
                HAS_VISIBLE,
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
            x = _rows_times(
                value_pointer + head * value_head,
                start,
                batch,
                1,
                value_batch,
                0,
                value_matrix + head * value_matrix_stride,
                ROWS,
                WIDTH,
                AT_ONCE,
                TRANSFORMS_VALUES,
                OVERLAP,
            )
            token = (tl.load(position) if POSITION_AT_POINTER else position).to(tl.int64)
            _keep(
                value_pointer + head * value_head,
                value_batch,
                start,
                batch,
                head,
                kv_heads,
                token,
                recent_values,
                leading_values,
                begins_pointer,
                visible_pointer,
                visible_batch,
                ring,
                leading_rows,
                shift,
                False,
                ROWS,
                WIDTH,
                HAS_RECENT,
                FIRST,
                HAS_VISIBLE,
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


def append_tokens(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cached: CachedTokens,
    position: int | Tensor,
    exact: ExactTokens | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """The function `plain_append_tokens`, for one token per sequence and rows that `RowLayout` supports."""
    batch, kv_heads, tokens, width = key.shape
    matrices = cached.matrices
    assert tokens == 1 and (matrices.keys is None) == (matrices.queries is None)
    layouts = [RowLayout.of(rows.quantizer, width) for rows in (cached.keys, cached.values)]
    assert layouts[0] is not None and layouts[1] is not None
    moves = matrices.queries is not None
    given = [query if one is None else one for one in (matrices.queries, matrices.keys, matrices.values)]
    # The kernel would have to wait for a copy of a matrix.
    overlaps = can_overlap(query.device) and all(x.is_contiguous() for x in given[0 if moves else 2 :])
    key, value, query = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value, query))
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if moves else query
    exact = ExactTokens(query) if exact is None else exact
    recent, leading = exact.recent or (query, query), exact.leading or (query, query)
    if visible is not None and visible.dtype == torch.bool:
        visible = visible.view(torch.uint8)
    group = query.shape[1] // kv_heads
    most = batch * group if moves else batch
    has_matrix = moves or matrices.values is not None
    rows = min(MOST_ROWS, triton.next_power_of_2(max(1, kv_heads * most // PROGRAMS)))
    is_whole = width <= WHOLE and rows < MOST_ROWS
    _append[((3 if moves else 2) * kv_heads, triton.cdiv(most, rows))](
        query,
        key,
        value,
        out,
        *(one.contiguous() for one in given),
        *_tensors(cached.keys),
        *_tensors(cached.values),
        *recent,
        *leading,
        query if exact.begins is None else exact.begins,
        query if visible is None else visible,
        position,
        recent[0].shape[2],
        leading[0].shape[2],
        exact.shift,
        0 if visible is None else visible.stride(0),
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
        HAS_RECENT=exact.recent is not None,
        FIRST=0 if exact.begins is None else exact.first,
        HAS_VISIBLE=visible is not None,
        ROWS=rows,
        WIDTH=width,
        AT_ONCE=width if is_whole else max(1, min(ENTRIES // width, PRODUCTS // (width * rows))),
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
    """Codes, scales, and zero points; any tensor if there are no zero points."""
    scales = rows.parts["scale"]
    return rows.codes, scales, rows.parts.get("zero_point", scales)


def strides_of(rows: TokenRows, unit: int = 1) -> tuple[int, ...]:
    """Strides of sequences, heads and tokens: of codes in units of `unit` bytes, and of parts."""
    scales = rows.parts["scale"]
    assert all(part.stride() == scales.stride() for part in rows.parts.values()) and scales.stride(-1) == 1
    return (*(stride // unit for stride in rows.codes.stride()[:3]), *scales.stride()[:3])


def matrix_stride(matrices: Tensor | None) -> int:
    """The stride between the matrices of two kv heads."""
    return 0 if matrices is None or len(matrices) == 1 else matrices.shape[-1] ** 2
