"""Attention of one token per sequence to a packed cache (Triton).

Tokens are split among programs. Each processes its share for all queries that read one head of the cache: codes become
numbers in registers (`fused.packed_rows`), scores and weighted sums are products on matrix hardware, and the softmax is
computed along with the sums (Flash-Decoding; arXiv 2205.14135). A few additional programs read the unquantized tokens.
A second launch combines the shares (`fused.combine_shares`).

Products have bfloat16 operands for bfloat16 queries, as in PyTorch's own attention: probabilities are rounded to
bfloat16, and so are integers with several scales per row. For float16 queries and packed tokens, both queries and
probabilities are sums of two bfloat16 numbers. For float32, and in Triton's interpreter, everything is float32. Sums
are float32. Sums of floating-point elements are in units of 2^60, so values below 2^-89 are lost.
`plain_decode_attention` is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mxrot.kernels.fused.append_tokens import strides_of
from mxrot.kernels.fused.attention_share import attention_share
from mxrot.kernels.fused.combine_shares import MOST_SPLITS, Shares, combined
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.fused.packed_rows import RowLayout
from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows
from mxrot.kernels.plain.exact_tokens import ExactTokens

LOG2_E = 1.4426950408889634
UNIT_BYTES = 2


@dataclass(frozen=True)
class Tile:
    """How tokens are divided among programs."""

    tokens: int
    """Tokens that a program processes at one time."""
    splits: int
    """Programs for one head of the cache of one sequence."""
    warps: int = 1
    stages: int = 1
    fetches: int = 0
    """Prefetch tokens to the L2 cache before they are loaded: 1 for the first tokens of a program, 2 for all."""
    registers: int | None = None
    """The maximum number of registers per thread."""


LEAST_TOKENS = 32
"""The least number of tokens that matrix hardware sums over: a thread may hold eight neighbours, and four threads do.
Triton 3.6 gives wrong sums over 16, without an error."""


def choose_tile(pairs: int, tokens: int, processors: int, is_wide: bool = False, is_float32: bool = False) -> Tile:
    """The tile for `pairs` pairs of a sequence and a head of the cache, with up to `tokens` tokens each, on
    `processors` multiprocessors; `is_wide`: codes of 8 bits.

    Measured on an H200, whose multiprocessors hold nine programs each: with 1 to 32 sequences of 8 heads 128 wide, 1024
    to 16384 tokens. Many pairs fill the device twice, because fewer splits would leave many multiprocessors empty.
    """
    size = 16 if is_float32 else LEAST_TOKENS
    programs = (8 if pairs <= processors else 16) * processors
    splits = min(triton.cdiv(tokens, size), triton.cdiv(programs, pairs), MOST_SPLITS)
    return Tile(size, max(1, splits), fetches=1 if is_wide else 2)


def decode_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    exact: ExactTokens | None = None,
) -> Tensor:
    """The function `plain_decode_attention`, for rows that `RowLayout` supports, with a power-of-two width of at least
    64."""
    batch, kv_heads = cached.keys.codes.shape[:2]
    tokens = length if isinstance(length, int) else cached.keys.capacity
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else 4
    is_wide = max(rows.quantizer.format.bits for rows in (cached.keys, cached.values)) == 8
    packed = tokens if exact is None else max(1, tokens - exact.last)
    tile = choose_tile(batch * kv_heads, packed, processors, is_wide, _operands(query)[1] == tl.float32)
    return attend_by_tiles(query, cached, length, visible, scaling, softcap, tile, exact)


def attend_by_tiles(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scaling: float,
    softcap: float | None,
    tile: Tile,
    exact: ExactTokens | None = None,
) -> Tensor:
    """`decode_attention` with a given tile."""
    if not query.numel():
        return torch.empty_like(query)
    query = query if query.stride(-1) == 1 else query.contiguous()
    if visible is not None and visible.dtype == torch.bool:
        visible = visible.view(torch.uint8)
    # If a copy is needed, it is made before the last launch, which does not wait for it.
    outputs = None if cached.matrices.outputs is None else cached.matrices.outputs.contiguous()
    exact = ExactTokens(query) if exact is None else exact
    of_exact = triton.cdiv(exact.first, tile.tokens) + triton.cdiv(exact.last, tile.tokens)
    shares = Shares.empty(query, min(tile.splits, MOST_SPLITS), of_exact)
    scales = (scaling * LOG2_E, 0.0) if softcap is None else (scaling / softcap, softcap * LOG2_E)
    _share(query, shares, cached, length, visible, scales, tile, exact)
    return combined(query, shares, outputs, cached.keys.codes.shape[1])


def _share(
    query: Tensor,
    shares: Shares,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scales: tuple[float, float],
    tile: Tile,
    exact: ExactTokens,
) -> None:
    """Compute the shares."""
    batch, heads, _, width = query.shape
    kv_heads = cached.keys.codes.shape[1]
    layouts = [RowLayout.of(rows.quantizer, width) for rows in (cached.keys, cached.values)]
    assert layouts[0] is not None and layouts[1] is not None
    parts, dtype = _operands(query)
    assert dtype == tl.float32 or tile.tokens >= LEAST_TOKENS
    own = exact.query if exact.query.stride(-1) == 1 else exact.query.contiguous()
    recent, leading = exact.recent or exact.leading or (query, query), exact.leading or exact.recent or (query, query)
    assert not shares.exact or all(x.is_contiguous() for x in (*recent, *leading))
    overlaps = can_overlap(query.device)
    group = heads // kv_heads
    attention_share[(batch * kv_heads, shares.packed + shares.exact)](
        query,
        own,
        shares.sums,
        shares.maxima,
        shares.totals,
        *_units(cached.keys),
        *_units(cached.values),
        *recent,
        *leading,
        query if visible is None else visible,
        query if exact.begins is None else exact.begins,
        length,
        exact.last,
        exact.skipped,
        shares.packed,
        recent[0].shape[2],
        leading[0].shape[2],
        exact.shift,
        kv_heads,
        *query.stride()[:2],
        *own.stride()[:2],
        *strides_of(cached.keys, UNIT_BYTES),
        *strides_of(cached.values, UNIT_BYTES),
        0 if visible is None else visible.stride(0),
        *scales,
        PLACE_AT_POINTER=isinstance(length, Tensor),
        HAS_VISIBLE=visible is not None,
        HAS_SOFTCAP=scales[1] != 0.0,
        HAS_EXACT=shares.exact > 0,
        FIRST=exact.first,
        GROUP=group,
        HEADS=max(8, triton.next_power_of_2(group)),
        WIDTH=width,
        TOKENS=tile.tokens,
        PARTS=parts,
        DTYPE=dtype,
        EXACT_DTYPE=tl.float16 if parts == 2 else dtype,
        OVERLAP=overlaps,
        STAGES=tile.stages,
        FETCHES=tile.fetches if query.is_cuda else 0,
        **layouts[0].reading("K"),
        **layouts[1].reading("V"),
        num_warps=tile.warps,
        maxnreg=tile.registers,
        launch_pdl=overlaps,
    )


def _operands(query: Tensor) -> tuple[int, tl.dtype]:
    """The number of parts of the other operands of products, and their type."""
    if not query.is_cuda or query.dtype == torch.float32:
        return 1, tl.float32
    return (1 if query.dtype == torch.bfloat16 else 2), tl.bfloat16


def _units(rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in units, scales, and zero points; any tensor if there are no zero points."""
    scales = rows.parts["scale"]
    return rows.codes.view(torch.int16), scales, rows.parts.get("zero_point", scales)
