"""Attention to packed tokens two ways: in float64, with how far a kernel may be from it, and as the fused kernel rounds
on matrix hardware."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows

ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""The largest relative error of a number rounded to the type: half of its step, for 24, 11 and 8 digits."""
HALF_STEP = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}
"""The largest error below its normal numbers: half of its smallest number."""
UNIT = 2.0**60
"""Of the sums of floating-point values."""


def exact_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int,
    visible: Tensor | None = None,
    softcap: float | None = None,
    *,
    on_matrix_hardware: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention in float64, one query and one key after the other in no clever order; and how far the kernel may be.

    On matrix hardware 16-bit queries meet integers with several scales a row rounded to bfloat16. Here they are rounded
    too, so the bound is of what follows only:

    Scores are sums of D exact products (a float16 number is two of bfloat16), and float32 loses at most 2^-22 of their
    size at each term (matrix hardware cuts off). Where each of two scores is off by d, a probability is off by a factor
    of e^(2 d) at most. Rounded to bfloat16 it loses 2^-8; as a sum of two of them 2^-8 of what the first one lost.
    Sums over `length` tokens are as those of scores. 2^-18 is for approximate powers of 2, products with them and with
    scales, and the division, each of a few 2^-24; a factor of 1.01 for these errors of each other.

    The smallest step of a sum in float32 is 2^-149, in units of 2^60 or of 1: each term, of two numbers at most, loses
    no more than that. Powers of 2 below 2^-126 may be 0: one of a token, one of its share. The total that sums are
    divided by is 1 at least, and does not raise this. What comes out is rounded to the query's type, where small
    numbers lose more than a part of themselves: half a step.
    """
    q, width = query.double(), query.shape[-1]
    rounds = on_matrix_hardware and query.dtype != torch.float32
    keys, values = (_numbers(rows.first(length), q.shape[1], rounds).double() for rows in (cached.keys, cached.values))
    scores = torch.einsum("bhqd,bhnd->bhqn", q, keys) * width**-0.5
    size = torch.einsum("bhqd,bhnd->bhqn", q.abs(), keys.abs()).amax(dim=-1, keepdim=True) * width**-0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if visible is not None:
        scores = scores.masked_fill(visible[:, None, None, :length] == 0, -math.inf)
    p = scores.softmax(dim=-1).nan_to_num()
    expected = torch.einsum("bhqn,bhnd->bhqd", p, values)
    of_p = 0.0 if not rounds else ROUNDOFF[torch.bfloat16] ** _parts_of(query)
    each = torch.expm1(2 * size * width * 2.0**-22) + of_p + length * 2.0**-22 + 2.0**-18
    lost = length * (2 * 2.0**-149 * UNIT + 2 * 2.0**-126 * values.abs().amax(dim=(2, 3), keepdim=True))
    own = (ROUNDOFF[query.dtype] * expected.abs()).clamp(min=HALF_STEP[query.dtype])
    return expected, 1.01 * (each * (p @ values.abs()) + lost + own)


def rounded_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int,
    visible: Tensor | None = None,
    *,
    tokens: int = 32,
    parts: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """What the fused kernel says that it makes of 16-bit queries on matrix hardware, one tile of `tokens` a share.

    Queries and probabilities are sums of so many `parts` of bfloat16, as the kernel has it if None.
    """
    heads, width = query.shape[1], query.shape[-1]
    parts = _parts_of(query) if parts is None else parts
    keys, values = (_numbers(rows.first(length), heads, True) for rows in (cached.keys, cached.values))
    scores = torch.stack([part @ keys.mT for part in _split(query.float(), parts)]).sum(dim=0)
    scores = scores * ((width**-0.5 if scaling is None else scaling) * math.log2(math.e))
    if visible is not None:
        scores = scores.masked_fill(visible[:, None, None, :length] == 0, -math.inf)
    # Where a row has one scale, its probability is multiplied by it, and codes less zero points are summed.
    factors = torch.ones(())
    if _is_integer(cached.values) and cached.values.parts["scale"].shape[-1] == 1:
        factors = _repeated(cached.values.first(length).parts["scale"].float(), heads)
        values, factors = (values / factors).nan_to_num(), factors.mT
    unit = 1.0 if _is_integer(cached.values) else UNIT
    shares = []
    for start in range(0, length, tokens):
        of_tile = scores[..., start : start + tokens]
        largest = of_tile.amax(dim=-1, keepdim=True)
        p = torch.exp2(of_tile - largest.masked_fill(largest == -math.inf, 0))
        total = p.sum(dim=-1, keepdim=True)
        p = p * factors[..., start : start + tokens] if factors.ndim else p
        of_values = values[:, :, start : start + tokens] / unit
        sums = torch.stack([part @ of_values for part in _split(p, parts)]).sum(dim=0) * unit
        shares.append((largest, total, sums))
    maxima, totals, sums = (torch.stack(each) for each in zip(*shares, strict=True))
    largest = maxima.amax(dim=0)
    weights = torch.exp2(maxima - largest.masked_fill(largest == -math.inf, 0))
    total = (weights * totals).sum(dim=0)
    return ((weights * sums).sum(dim=0) / total.where(total > 0, 1)).to(query.dtype)


def _parts_of(query: Tensor) -> int:
    return 1 if query.dtype == torch.bfloat16 else 2


def _split(x: Tensor, parts: int) -> list[Tensor]:
    """Numbers of bfloat16, in float32, that x is nearly the sum of."""
    found = []
    for _ in range(parts):
        found.append(x.bfloat16().float())
        x = x - found[-1]
    return found


def _is_integer(rows: TokenRows) -> bool:
    return "zero_point" in rows.parts


def _repeated(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _numbers(rows: TokenRows, heads: int, rounds: bool) -> Tensor:
    """float32 [B, heads, N, D]; to bfloat16 if `rounds` and these are integers with several scales a row."""
    found = rows.dequantize()
    if rounds and _is_integer(rows) and rows.parts["scale"].shape[-1] > 1:
        found = found.bfloat16().float()
    return _repeated(found, heads)
