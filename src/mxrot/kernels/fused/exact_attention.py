"""Shares of attention, and those of tokens that are read as they came (Triton).

Products have operands of the type of the query, float32 for the interpreter; probabilities of float16 queries are sums
of two such numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.fused.exact_share import exact_share
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain.exact_tokens import ExactTokens

TOKENS = 32
"""That a program has: as few as matrix hardware sums over, so that many programs share few tokens."""


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
    def count(self) -> int:
        return self.sums.shape[1]

    @staticmethod
    def empty(query: Tensor, packed: int, exact: int) -> Shares:
        """Room for so many of a query [B, heads, 1, D]."""
        batch, heads, _, width = query.shape
        sums = query.new_empty(batch * heads, packed + exact, width, dtype=torch.float32)
        maxima, totals = (query.new_empty(batch * heads, packed + exact, dtype=torch.float32) for _ in range(2))
        return Shares(sums, maxima, totals, packed)


def shares_of(exact: ExactTokens) -> int:
    """How many there are of tokens that are read as they came."""
    return triton.cdiv(exact.first, TOKENS) + triton.cdiv(exact.last, TOKENS)


def share_exact(
    shares: Shares,
    exact: ExactTokens,
    kv_heads: int,
    length: int | Tensor,
    visible: Tensor | None,
    scales: tuple[float, float],
) -> None:
    """Write the shares behind the packed ones. `scales`: what products are multiplied by, and the cap or 0."""
    query = exact.query if exact.query.stride(-1) == 1 else exact.query.contiguous()
    batch, heads, _, width = query.shape
    recent, leading = exact.recent or exact.leading, exact.leading or exact.recent
    assert recent is not None and leading is not None and all(x.is_contiguous() for x in (*recent, *leading))
    overlaps, group = can_overlap(query.device), heads // kv_heads
    exact_share[(batch * kv_heads, shares.count - shares.packed)](
        query,
        shares.sums,
        shares.maxima,
        shares.totals,
        *recent,
        *leading,
        query if exact.begins is None else exact.begins,
        query if visible is None else visible,
        length,
        kv_heads,
        *query.stride()[:2],
        0 if visible is None else visible.stride(0),
        exact.last,
        recent[0].shape[2],
        leading[0].shape[2],
        exact.shift,
        exact.skipped,
        shares.count,
        shares.packed,
        *scales,
        LENGTH_AT_POINTER=isinstance(length, Tensor),
        HAS_VISIBLE=visible is not None,
        HAS_SOFTCAP=scales[1] != 0.0,
        FIRST=exact.first,
        GROUP=group,
        HEADS=max(8, triton.next_power_of_2(group)),
        WIDTH=width,
        TOKENS=TOKENS,
        PARTS=2 if query.dtype == torch.float16 and query.is_cuda else 1,
        DTYPE=_operands(query),
        OVERLAP=overlaps,
        num_warps=1 if width <= 64 else 2,
        launch_pdl=overlaps,
    )


def _operands(query: Tensor) -> tl.dtype:
    if not query.is_cuda or query.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16
