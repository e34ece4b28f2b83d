"""Attention of queries to a share of the packed tokens of a cache: part of the programs of `attention_share` (Triton).

Tokens are rows of the first product, and queries are columns of both. There are at least eight columns, so few queries
waste little.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.arithmetic import product
from mxrot.kernels.fused.packed_rows import are_in_range, columns_of, numbers_of


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
    """Prefetch rows and scales of TOKENS tokens from `start` on to the L2 cache."""
    row = tl.maximum(tl.minimum(start + tl.arange(0, TOKENS), count - 1), 0).to(tl.int64)
    assembly: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
    tl.inline_asm_elementwise(assembly, "=r,l", [codes_pointer + row * code_stride], tl.int32, False, 1)
    tl.inline_asm_elementwise(assembly, "=r,l", [scale_pointer + row * part_stride], tl.int32, False, 1)


@triton.jit
def _row_scales(scales, TOKENS: tl.constexpr):
    """float32 [TOKENS], the only scale of each row."""
    return tl.reshape(scales, [TOKENS]).to(tl.float32)


@triton.jit
def packed_share(
    split,
    splits,
    query_pointer,
    query_head,
    key_codes,
    key_scales,
    key_zeros,
    value_codes,
    value_scales,
    value_zeros,
    visible_pointer,
    begins_pointer,
    count,
    skipped,
    kc_token,
    kp_token,
    vc_token,
    vp_token,
    scaling,
    softcap,
    HAS_VISIBLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FIRST: tl.constexpr,
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
    """Maxima [HEADS] of scores in units of log 2, totals [HEADS] of weights, and sums of values, [WIDTH, HEADS] in the
    order of `columns_of`: for one of `splits` parts of the first `count` tokens, and the queries of one sequence and
    head. Pointers are those of the pair. FIRST tokens from a place on are left out."""
    K_UNITS: tl.constexpr = WIDTH * K_BITS // 16
    V_UNITS: tl.constexpr = WIDTH * V_BITS // 16
    each = (count + TOKENS * splits - 1) // (TOKENS * splits) * TOKENS
    if FETCHES:
        # The previous kernel writes at most the newest of these tokens, and nothing is read yet.
        _fetch(key_codes, key_scales, kc_token, kp_token, split * each, count, TOKENS)
        _fetch(value_codes, value_scales, vc_token, vp_token, split * each, count, TOKENS)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if FIRST > 0:
        begin = (tl.load(begins_pointer) - skipped).to(tl.int32)
    heads = tl.arange(0, HEADS)
    of_query = heads[None, :] * query_head + columns_of(WIDTH, K_BITS)[:, None]
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
        scores = product(keys, query, tl.zeros([TOKENS, HEADS], tl.float32), PARTS, DTYPE)
        if K_FRACTION < 0 and K_GROUPS == 1:
            scores = scores * _row_scales(scales, TOKENS)[:, None]
        token = start + tl.arange(0, TOKENS)
        seen = token < count
        if FIRST > 0:
            seen = seen & ((token < begin) | (token >= begin + FIRST))
        if HAS_VISIBLE:
            flags = tl.load(visible_pointer + token, mask=seen, other=0)
            seen = seen & (flags != 0)
        if HAS_SOFTCAP:
            # tanh x = 2 sigmoid(2 x) - 1. Here `scaling` is divided by the cap, and `softcap` is in units of log 2.
            scores = (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) * scaling)) - 1.0) * softcap
        else:
            scores = scores * scaling
        if K_FRACTION >= 0:
            scores = tl.where(are_in_range(scales, K_FRACTION)[:, None], scores, float("nan"))
        scores = tl.where(seen[:, None], scores, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(scores, axis=0))
        # If no token was seen so far, any finite number will do.
        origin = tl.where(largest == float("-inf"), 0.0, largest)
        p = tl.exp2(scores - origin[None, :])
        shrink = tl.exp2(before - origin)
        total = total * shrink + tl.sum(p, axis=0)
        if V_FRACTION < 0 and V_GROUPS == 1:
            p = p * _row_scales(v_scales, TOKENS)[:, None]
        if V_FRACTION >= 0:
            p = tl.where(are_in_range(v_scales, V_FRACTION)[:, None], p, float("nan"))
        values = numbers_of(v_units, v_scales, v_zeros, V_BITS, V_FRACTION, V_MIN_EXPONENT, DTYPE)
        sums = product(tl.trans(values), p, sums * shrink[None, :], PARTS, DTYPE)
    if V_FRACTION >= 0:
        sums = sums * 2.0**60
    return largest, total, sums
