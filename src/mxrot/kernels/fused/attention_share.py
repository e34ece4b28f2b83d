"""Attention of queries to a share of the tokens of a cache: the kernel (Triton).

A program handles one head of the cache of one sequence, and processes its tokens for all queries that read it. The last
programs read unquantized tokens (`fused.exact_share`), the others packed tokens (`fused.packed_share`). A program is
best a single warp, which waits for no other warp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mxrot.kernels.fused.exact_share import exact_share
from mxrot.kernels.fused.packed_rows import columns_of
from mxrot.kernels.fused.packed_share import packed_share


@triton.jit(do_not_specialize=["length", "last", "skipped", "packed", "ring", "leading_rows", "shift"])
def attention_share(
    query_pointer,
    exact_query_pointer,
    sums_pointer,
    maxima_pointer,
    totals_pointer,
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
    visible_pointer,
    begins_pointer,
    length,
    last,
    skipped,
    packed,
    ring,
    leading_rows,
    shift,
    kv_heads,
    query_batch,
    query_head,
    exact_query_batch,
    exact_query_head,
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
    PLACE_AT_POINTER: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    EXACT_DTYPE: tl.constexpr,
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
    pair, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, kv_head = pair // kv_heads, tl.program_id(0) % kv_heads
    count = (tl.load(length) + 1 if PLACE_AT_POINTER else length).to(tl.int32)
    visible_pointer += batch * visible_batch
    begins_pointer += batch
    heads = tl.arange(0, HEADS)
    share = (pair * GROUP + heads) * tl.num_programs(1) + split
    if split < packed:
        largest, total, sums = packed_share(
            split,
            packed,
            query_pointer + batch * query_batch + kv_head * GROUP * query_head,
            query_head,
            key_codes + batch * kc_batch + kv_head * kc_head,
            key_scales + batch * kp_batch + kv_head * kp_head,
            key_zeros + batch * kp_batch + kv_head * kp_head,
            value_codes + batch * vc_batch + kv_head * vc_head,
            value_scales + batch * vp_batch + kv_head * vp_head,
            value_zeros + batch * vp_batch + kv_head * vp_head,
            visible_pointer,
            begins_pointer,
            tl.maximum(count - last, 0),
            skipped,
            kc_token,
            kp_token,
            vc_token,
            vp_token,
            scaling,
            softcap,
            HAS_VISIBLE,
            HAS_SOFTCAP,
            FIRST,
            GROUP,
            HEADS,
            WIDTH,
            TOKENS,
            PARTS,
            DTYPE,
            OVERLAP,
            STAGES,
            FETCHES,
            K_BITS,
            K_GROUPS,
            K_FRACTION,
            K_MIN_EXPONENT,
            V_BITS,
            V_GROUPS,
            V_FRACTION,
            V_MIN_EXPONENT,
        )
        tl.store(maxima_pointer + share, largest, mask=heads < GROUP)
        tl.store(totals_pointer + share, total, mask=heads < GROUP)
        place = share[None, :] * WIDTH + columns_of(WIDTH, V_BITS)[:, None]
        tl.store(sums_pointer + place, sums, mask=heads[None, :] < GROUP)
    elif HAS_EXACT:
        largest, total, sums = exact_share(
            split - packed,
            pair,
            exact_query_pointer + batch * exact_query_batch + kv_head * GROUP * exact_query_head,
            exact_query_head,
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
            HAS_VISIBLE,
            HAS_SOFTCAP,
            FIRST,
            GROUP,
            HEADS,
            WIDTH,
            TOKENS,
            PARTS,
            EXACT_DTYPE,
            OVERLAP,
            FETCHES,
        )
        tl.store(maxima_pointer + share, largest, mask=heads < GROUP)
        tl.store(totals_pointer + share, total, mask=heads < GROUP)
        place = share[None, :] * WIDTH + tl.arange(0, WIDTH)[:, None]
        tl.store(sums_pointer + place, sums, mask=heads[None, :] < GROUP)
