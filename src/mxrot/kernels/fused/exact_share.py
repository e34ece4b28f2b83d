"""Attention of queries to tokens that are read as they came: the kernel (Triton).

They are few, the first tokens of a sequence and the newest ones, so a program has as many as it takes at a time: of one
head of one sequence, for all queries that read it. Its share stands beside those of `attention_share`, in the same
buffers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.attention_share import product


@triton.jit(do_not_specialize=["length", "last", "ring", "leading_rows", "shift", "skipped", "shares", "before"])
def exact_share(
    query_pointer,
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    recent_keys,
    recent_values,
    leading_keys,
    leading_values,
    begins_pointer,
    visible_pointer,
    length,
    kv_heads,
    query_batch,
    query_head,
    visible_batch,
    last,
    ring,
    leading_rows,
    shift,
    skipped,
    shares,
    before,
    scaling,
    softcap,
    LENGTH_AT_POINTER: tl.constexpr,
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
):
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, tl.program_id(0) % kv_heads
    count = (tl.load(length) if LENGTH_AT_POINTER else length).to(tl.int32)
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    item = part * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, WIDTH)
    # Programs of the first tokens come first, then those that go back from the newest one.
    OF_FIRST: tl.constexpr = (FIRST + TOKENS - 1) // TOKENS
    back = item - OF_FIRST * TOKENS
    token = count - 1 - back
    is_recent = (back >= 0) & (back < last) & (token >= 0)
    row = ((token + shift) % ring).to(tl.int64)
    if FIRST > 0:
        begin = (tl.load(begins_pointer + batch) - skipped).to(tl.int32)
        is_recent = is_recent & ((token < begin) | (token >= begin + FIRST))
    at = (pair * ring + row)[:, None] * WIDTH + column[None, :]
    keys = tl.load(recent_keys + at, mask=is_recent[:, None], other=0)
    values = tl.load(recent_values + at, mask=is_recent[:, None], other=0)
    seen = is_recent
    if FIRST > 0:
        place = begin + item
        is_first = (item < FIRST) & (place >= 0) & (place < count)
        at = (pair * leading_rows + item)[:, None] * WIDTH + column[None, :]
        keys = tl.where(
            is_first[:, None], tl.load(leading_keys + at, mask=is_first[:, None], other=0).to(keys.dtype), keys
        )
        values = tl.where(
            is_first[:, None], tl.load(leading_values + at, mask=is_first[:, None], other=0).to(values.dtype), values
        )
        token = tl.where(is_first, place, token)
        seen = is_recent | is_first
    if HAS_VISIBLE:
        flags = tl.load(visible_pointer + batch * visible_batch + token, mask=seen, other=0)
        seen = seen & (flags != 0)
    heads = tl.arange(0, HEADS)
    query_pointer += batch * query_batch + kv_head * GROUP * query_head
    of_query = heads[None, :] * query_head + column[:, None]
    query = tl.load(query_pointer + of_query, mask=heads[None, :] < GROUP, other=0).to(tl.float32)
    # Queries are of the type of products as they are.
    scores = product(keys.to(DTYPE), query, tl.zeros([TOKENS, HEADS], tl.float32), 1, DTYPE)
    if HAS_SOFTCAP:
        scores = (2.0 / (1.0 + tl.exp2(scores * (-2.0 * 1.4426950408889634) * scaling)) - 1.0) * softcap
    else:
        scores = scores * scaling
    scores = tl.where(seen[:, None], scores, float("-inf"))
    largest = tl.max(scores, axis=0)
    p = tl.exp2(scores - tl.where(largest == float("-inf"), 0.0, largest)[None, :])
    total = tl.sum(p, axis=0)
    sums = product(tl.trans(values.to(DTYPE)), p, tl.zeros([WIDTH, HEADS], tl.float32), PARTS, DTYPE)
    share = (pair * GROUP + heads) * shares + before + part
    tl.store(maxima_pointer + share, largest, mask=heads < GROUP)
    tl.store(totals_pointer + share, total, mask=heads < GROUP)
    tl.store(sums_pointer + share[None, :] * WIDTH + column[:, None], sums, mask=heads[None, :] < GROUP)
