"""Attention of queries to unquantized tokens: part of the programs of `attention_share` (Triton).

These are the first tokens of a sequence and the newest ones. There are few, so a program handles only as many as it
processes at one time: of one head of one sequence, for all queries that read it. Products have operands of the query's
type, float32 in the interpreter. Probabilities of float16 queries are sums of two such numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.arithmetic import product


@triton.jit
def _fetch(pointer, row, WIDTH: tl.constexpr):
    """Prefetch these rows to the L2 cache, 64 bytes per instruction."""
    EACH: tl.constexpr = 512 // pointer.dtype.element_ty.primitive_bitwidth
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH // EACH)[None, :] * EACH
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer + at], tl.int32, False, 1)


@triton.jit
def _rows_at(keys_pointer, values_pointer, row, inside, WIDTH: tl.constexpr):
    """Keys and values [TOKENS, WIDTH] of these rows; zeros for rows that are not `inside`."""
    at = row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    keys = tl.load(keys_pointer + at, mask=inside[:, None], other=0)
    return keys, tl.load(values_pointer + at, mask=inside[:, None], other=0)


@triton.jit
def exact_share(
    part,
    pair,
    query_pointer,
    query_head,
    recent_keys,
    recent_values,
    leading_keys,
    leading_values,
    begins_pointer,
    visible_pointer,
    count,
    last,
    ring,
    leading_rows,
    shift,
    skipped,
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
    FETCHES: tl.constexpr,
):
    """Maxima [HEADS] of scores in units of log 2, totals [HEADS] of weights, and sums of values, [WIDTH, HEADS]: for a
    part of these tokens, and the queries of one sequence and head. Pointers are those of the sequence.

    The parts of the first tokens come first, then those that go back from the newest of `count` tokens.
    """
    OF_FIRST: tl.constexpr = (FIRST + TOKENS - 1) // TOKENS
    item = part * TOKENS + tl.arange(0, TOKENS)
    back = item - OF_FIRST * TOKENS
    token = count - 1 - back
    inside = (back >= 0) & (back < last) & (token >= 0)
    row = pair * ring + tl.where(inside, (token + shift) % ring, 0)
    if FETCHES:
        # The previous kernel writes only the newest token, and nothing is read yet.
        if part >= OF_FIRST:
            _fetch(recent_keys, row, WIDTH)
            _fetch(recent_values, row, WIDTH)
        else:
            of_first = pair * leading_rows + tl.minimum(item, FIRST - 1)
            _fetch(leading_keys, of_first, WIDTH)
            _fetch(leading_values, of_first, WIDTH)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    if FIRST == 0:
        keys, values = _rows_at(recent_keys, recent_values, row, inside, WIDTH)
        seen = inside
    else:
        # Rows are loaded before it is known which of them are needed.
        begin = (tl.load(begins_pointer) - skipped).to(tl.int32)
        if part < OF_FIRST:
            rows = pair * leading_rows + item
            keys, values = _rows_at(leading_keys, leading_values, rows, item < FIRST, WIDTH)
            token = begin + item
            seen = (item < FIRST) & (token >= 0) & (token < count)
        else:
            keys, values = _rows_at(recent_keys, recent_values, row, inside, WIDTH)
            seen = inside & ((token < begin) | (token >= begin + FIRST))
        values = tl.where(seen[:, None], values, 0)
    if HAS_VISIBLE:
        flags = tl.load(visible_pointer + token, mask=seen, other=0)
        seen = seen & (flags != 0)
    heads = tl.arange(0, HEADS)
    of_query = heads[None, :] * query_head + tl.arange(0, WIDTH)[:, None]
    query = tl.load(query_pointer + of_query, mask=heads[None, :] < GROUP, other=0).to(tl.float32)
    # Queries already have the type of the products.
    scores = product(keys.to(DTYPE), query, tl.zeros([TOKENS, HEADS], tl.float32), 1, DTYPE)
    if HAS_SOFTCAP:
        scores = (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) * scaling)) - 1.0) * softcap
    else:
        scores = scores * scaling
    scores = tl.where(seen[:, None], scores, float("-inf"))
    largest = tl.max(scores, axis=0)
    p = tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
    sums = product(tl.trans(values.to(DTYPE)), p, tl.zeros([WIDTH, HEADS], tl.float32), PARTS, DTYPE)
    return largest, tl.sum(p, axis=0), sums
