"""Combines the results of programs for shares of the tokens (Triton).

Shares of packed tokens are multiplied by the matrix that inverts the transform of values. Shares of unquantized tokens
are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.append_tokens import matrix_stride
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain.cached_attention import times_each

MOST_COMBINED = 128
"""Up to this width, a matrix is in the registers of one program."""
SPLITS = (1, 4, 16, 64, 256)
"""The maximum number of packed shares that one program combines. There are few values, because each is compiled, and a
growing text needs all of them."""
MOST_SPLITS = SPLITS[-1]
COLUMNS = 32
"""Columns that a program combines, if no matrix needs all of them."""
ENTRIES = 4096
"""Entries of shares at one time."""


@dataclass(frozen=True)
class Shares:
    """The results of programs, float32, for each head of each sequence: shares of packed tokens, then unquantized
    ones."""

    sums: Tensor
    """[B heads, count, D]: sums of values times weights 2^(score - maximum)."""
    maxima: Tensor
    """[B heads, count]: maxima of scores in units of log 2; -inf if no token was seen."""
    totals: Tensor
    """[B heads, count]: totals of weights."""
    packed: int
    """The number of shares of packed tokens."""

    @property
    def exact(self) -> int:
        """The number of shares of unquantized tokens."""
        return self.sums.shape[1] - self.packed

    @staticmethod
    def empty(query: Tensor, packed: int, exact: int) -> Shares:
        """Room for the shares of a query [B, heads, 1, D]."""
        batch, heads, _, width = query.shape
        sums = query.new_empty(batch * heads, packed + exact, width, dtype=torch.float32)
        maxima, totals = (query.new_empty(batch * heads, packed + exact, dtype=torch.float32) for _ in range(2))
        return Shares(sums, maxima, totals, packed)


@triton.jit
def _summed(
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    start,
    count,
    largest,
    columns,
    WIDTH: tl.constexpr,
    MOST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    IS_ASKED: tl.constexpr,
):
    """The totals of `count` shares from `start` on, at most MOST, rescaled to the largest maximum, and some columns of
    the sums if IS_ASKED; both of every AT_ONCE-th share."""
    total = tl.zeros([AT_ONCE], tl.float32)
    found = tl.zeros([AT_ONCE, columns.shape[0]], tl.float32)
    for begin in tl.static_range(0, MOST, AT_ONCE):
        share = begin + tl.arange(0, AT_ONCE)
        inside, at = share < count, start + share
        factors = tl.exp2(tl.load(maxima_pointer + at, mask=inside, other=float("-inf")) - largest)
        total += factors * tl.load(totals_pointer + at, mask=inside, other=0)
        if IS_ASKED:
            place = at[:, None] * WIDTH + columns[None, :]
            found += factors[:, None] * tl.load(sums_pointer + place, mask=inside[:, None], other=0)
    return total, found


@triton.jit(do_not_specialize=["packed", "exact"])
def _combine(
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    out_pointer,
    matrix_pointer,
    matrix_stride,
    packed,
    exact,
    kv_heads,
    group,
    HAS_MATRIX: tl.constexpr,
    ASKS_PACKED: tl.constexpr,
    ASKS_EXACT: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PACKED: tl.constexpr,
    PACKED_AT_ONCE: tl.constexpr,
    EXACT: tl.constexpr,
    EXACT_AT_ONCE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Some columns of the combined shares of one head of one sequence: the sum of packed shares times the matrix of its
    kv head, plus unquantized shares, which are not multiplied. There are at most PACKED and EXACT of them."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_MATRIX:
        # No kernel writes the matrix, so it is loaded while the previous kernel still runs.
        matrix_pointer += row // group % kv_heads * matrix_stride
        matrix = tl.load(matrix_pointer + columns[:, None] * WIDTH + columns[None, :])
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    start = row * (packed + exact)
    share = tl.arange(0, PACKED)
    largest = tl.max(tl.load(maxima_pointer + start + share, mask=share < packed, other=float("-inf")), axis=0)
    if EXACT > 0:
        share = tl.arange(0, EXACT)
        of_exact = tl.load(maxima_pointer + start + packed + share, mask=share < exact, other=float("-inf"))
        largest = tl.maximum(largest, tl.max(of_exact, axis=0))
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    totals, sums = _summed(
        sums_pointer,
        maxima_pointer,
        totals_pointer,
        start,
        packed,
        largest,
        columns,
        WIDTH,
        PACKED,
        PACKED_AT_ONCE,
        ASKS_PACKED,
    )
    if EXACT > 0:
        own_totals, own_sums = _summed(
            sums_pointer,
            maxima_pointer,
            totals_pointer,
            start + packed,
            exact,
            largest,
            columns,
            WIDTH,
            EXACT,
            EXACT_AT_ONCE,
            ASKS_EXACT,
        )
    # All loads come first, and wait for no sum.
    total = tl.sum(totals, axis=0)
    if EXACT > 0:
        total += tl.sum(own_totals, axis=0)
    total = tl.where(total > 0, total, 1.0)
    found = tl.sum(sums, axis=0) / total
    if HAS_MATRIX:
        found = tl.sum(found.to(matrix.dtype)[:, None] * matrix, axis=0)
    if EXACT > 0:
        found += (tl.sum(own_sums, axis=0) / total).to(found.dtype)
    tl.store(out_pointer + row * WIDTH + columns, found.to(out_pointer.dtype.element_ty))


def combined(query: Tensor, shares: Shares, outputs: Tensor | None, kv_heads: int) -> Tensor:
    """The attention of all shares, in the shape and type of the query. The sum of packed shares is multiplied by
    `outputs`."""
    if outputs is None or query.shape[3] <= MOST_COMBINED:
        return _sum_shares(query, shares, outputs, kv_heads, query.dtype)
    if not shares.exact:
        return times_each(_sum_shares(query, shares, None, kv_heads, query.dtype), outputs).to(query.dtype)
    packed, exact = (
        _sum_shares(query, shares, None, kv_heads, torch.float32, asks_packed, not asks_packed)
        for asks_packed in (True, False)
    )
    return (times_each(packed, outputs) + exact).to(query.dtype)


def _sum_shares(
    query: Tensor,
    shares: Shares,
    outputs: Tensor | None,
    kv_heads: int,
    dtype: torch.dtype,
    asks_packed: bool = True,
    asks_exact: bool = True,
) -> Tensor:
    batch, heads, _, width = query.shape
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    columns = min(width, COLUMNS) if outputs is None else width
    most = [next(most for most in SPLITS if most >= shares.packed), triton.next_power_of_2(shares.exact)]
    overlaps = can_overlap(query.device)
    _combine[(batch * heads, width // columns)](
        shares.sums,
        shares.maxima,
        shares.totals,
        out,
        shares.sums if outputs is None else outputs.contiguous(),
        matrix_stride(outputs),
        shares.packed,
        shares.exact,
        kv_heads,
        heads // kv_heads,
        HAS_MATRIX=outputs is not None,
        ASKS_PACKED=asks_packed,
        ASKS_EXACT=asks_exact,
        WIDTH=width,
        COLUMNS=columns,
        PACKED=most[0],
        PACKED_AT_ONCE=min(most[0], ENTRIES // columns),
        EXACT=most[1] if shares.exact else 0,
        EXACT_AT_ONCE=min(most[1], ENTRIES // columns),
        OVERLAP=overlaps,
        num_warps=4 if outputs is None else 8,
        launch_pdl=overlaps,
    )
    return out
