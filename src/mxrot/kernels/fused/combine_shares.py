"""What programs found of shares of the tokens, put together (Triton).

Shares of packed tokens are multiplied by the matrix that turns values back; those of tokens that were read as they came
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
"""Up to this width a matrix is in the registers of one program."""
SPLITS = (1, 4, 16, 64, 256)
"""Packed shares that one program puts together at most. Few kinds, because each is compiled, and a text that grows sees
them all."""
MOST_SPLITS = SPLITS[-1]
COLUMNS = 32
"""That it does so for, where no matrix wants them all."""
ENTRIES = 4096
"""Of shares at once."""


@dataclass(frozen=True)
class Shares:
    """What programs have found, float32, for each head of each sequence: shares of packed tokens, then exact ones."""

    sums: Tensor
    """[B heads, count, D]: values times weights 2^(score - maximum)."""
    maxima: Tensor
    """[B heads, count], of scores in units of log 2; -inf where nothing was seen."""
    totals: Tensor
    """[B heads, count], of weights."""
    packed: int
    """How many are of packed tokens."""

    @property
    def exact(self) -> int:
        """How many are of tokens that were read as they came."""
        return self.sums.shape[1] - self.packed

    @staticmethod
    def empty(query: Tensor, packed: int, exact: int) -> Shares:
        """Room for so many of a query [B, heads, 1, D]."""
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
    """Of `count` shares from `start` on, MOST at most, as for the largest maximum: totals and, if these are asked for,
    some columns of the sums; both of every AT_ONCE-th share."""
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
    """The shares of one head of one sequence, some columns of them: what packed ones sum up, times the matrix of its
    kv head, and exact ones, which are not multiplied by it. PACKED and EXACT of them at most."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_MATRIX:
        # No kernel writes it, so it is on its way while the one before still runs.
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
    # All loads come before, and wait for no sum.
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
    """Of all shares, in the shape and type of the query; what packed ones sum up is multiplied by `outputs`."""
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
