"""One token of every sequence attends to a packed cache (Triton).

Tokens are split among programs, each of which goes through its share for all queries that read one head of the cache:
codes become numbers in registers (`fused.packed_rows`), scores and what they sum up are products on matrix hardware,
and the softmax goes along with the sums (Flash-Decoding; arXiv 2205.14135). Another launch puts the shares together,
also those of tokens that are read as they came (`fused.exact_attention`).

Products have bfloat16 operands for bfloat16 queries, as in PyTorch's own attention: probabilities are rounded to them,
and integers with several scales a row. For float16 queries both queries and probabilities are sums of two bfloat16
numbers. For float32, and by Triton's interpreter, all is float32. Sums are float32; of floating-point elements in units
of 2^60, so what is below 2^-89 is lost. `plain_decode_attention` is the specification.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mxrot.kernels.fused.append_tokens import matrix_stride, strides_of
from mxrot.kernels.fused.attention_share import attention_share
from mxrot.kernels.fused.exact_attention import Shares, share_exact, shares_of
from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.fused.packed_rows import RowLayout
from mxrot.kernels.plain.cached_attention import CachedTokens, TokenRows, times_each
from mxrot.kernels.plain.exact_tokens import ExactTokens

LOG2_E = 1.4426950408889634
UNIT_BYTES = 2


@triton.jit(do_not_specialize=["splits", "begin", "end"])
def _combine(
    sums_pointer,
    maxima_pointer,
    totals_pointer,
    out_pointer,
    matrix_pointer,
    matrix_stride,
    splits,
    begin,
    end,
    kv_heads,
    group,
    HAS_MATRIX: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    HAS_EXACT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The shares of one head of one sequence, some columns of them: what those from `begin` to `end` sum up, times the
    matrix of its kv head, and with HAS_EXACT those from `end` on, which are not multiplied by it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if HAS_MATRIX:
        # No kernel writes it, so it is on its way while the one before still runs.
        matrix_pointer += row // group % kv_heads * matrix_stride
        matrix = tl.load(matrix_pointer + columns[:, None] * WIDTH + columns[None, :])
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    split = tl.arange(0, SPLITS)
    maxima = tl.load(maxima_pointer + row * splits + split, mask=split < splits, other=float("-inf"))
    largest = tl.max(maxima, axis=0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([AT_ONCE], tl.float32)
    found = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    exact = tl.zeros([AT_ONCE, COLUMNS], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = start + tl.arange(0, AT_ONCE)
        at = row * splits + split
        factors = tl.exp2(tl.load(maxima_pointer + at, mask=split < splits, other=float("-inf")) - largest)
        total += factors * tl.load(totals_pointer + at, mask=split < splits, other=0)
        place = at[:, None] * WIDTH + columns[None, :]
        inside = (split >= begin) & (split < end)
        found += factors[:, None] * tl.load(sums_pointer + place, mask=inside[:, None], other=0)
        if HAS_EXACT:
            inside = (split >= end) & (split < splits)
            exact += factors[:, None] * tl.load(sums_pointer + place, mask=inside[:, None], other=0)
    total = tl.sum(total, axis=0)
    found = tl.sum(found, axis=0) / tl.where(total > 0, total, 1.0)
    if HAS_MATRIX:
        found = tl.sum(found.to(matrix.dtype)[:, None] * matrix, axis=0)
    if HAS_EXACT:
        found += (tl.sum(exact, axis=0) / tl.where(total > 0, total, 1.0)).to(found.dtype)
    tl.store(out_pointer + row * WIDTH + columns, found.to(out_pointer.dtype.element_ty))


@dataclass(frozen=True)
class Tile:
    """How tokens are shared out."""

    tokens: int
    """That a program takes at a time."""
    splits: int
    """Programs for one head of the cache of one sequence."""
    warps: int = 1
    stages: int = 1
    fetches: int = 0
    """Bring tokens to the L2 cache before they are loaded: 1 for the first ones of a program, 2 for all."""
    registers: int | None = None
    """The most that a thread may have."""


LEAST_TOKENS = 32
"""That matrix hardware sums over: a thread may hold eight of them side by side, and four threads do. Triton 3.6 gives
wrong sums over 16, and does not say so."""
MOST_COMBINED = 128
"""Up to this width a matrix is in the registers of one program."""
SPLITS = (1, 4, 16, 64, 256)
"""What one program puts together at most. Few kinds, because each is compiled, and a text that grows sees them all."""
MOST_SPLITS = SPLITS[-1]
COLUMNS = 32
"""That it does so for, where no matrix wants them all."""


def choose_tile(pairs: int, tokens: int, processors: int, is_wide: bool = False, is_float32: bool = False) -> Tile:
    """For so many pairs of a sequence and a head of the cache, of up to so many tokens each, and multiprocessors;
    wide: codes of 8 bits.

    Measured on an H200, whose multiprocessors have room for nine programs: with 1 to 32 sequences of 8 heads 128 wide,
    1024 to 16384 tokens. Many pairs fill them twice, because fewer splits would leave many of them empty.
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
    """As `plain_decode_attention` defines it, for rows that `RowLayout` knows, of a power of two from 64 on."""
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
    """`decode_attention` by a given tile."""
    if not query.numel():
        return torch.empty_like(query)
    query = query if query.stride(-1) == 1 else query.contiguous()
    if visible is not None and visible.dtype == torch.bool:
        visible = visible.view(torch.uint8)
    of_exact = 0 if exact is None else shares_of(exact)
    tile = replace(tile, splits=min(tile.splits, MOST_SPLITS - of_exact))
    shares = Shares.empty(query, tile.splits, of_exact)
    scales = (scaling * LOG2_E, 0.0) if softcap is None else (scaling / softcap, softcap * LOG2_E)
    _share_packed(query, shares, cached, length, visible, scales, tile, exact)
    if exact is not None and of_exact:
        share_exact(shares, exact, cached.keys.codes.shape[1], length, visible, scales)
    return _combined(query, shares, cached.matrices.outputs, cached.keys.codes.shape[1])


def _share_packed(
    query: Tensor,
    shares: Shares,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None,
    scales: tuple[float, float],
    tile: Tile,
    exact: ExactTokens | None,
) -> None:
    batch, heads, _, width = query.shape
    kv_heads = cached.keys.codes.shape[1]
    layouts = [RowLayout.of(rows.quantizer, width) for rows in (cached.keys, cached.values)]
    assert layouts[0] is not None and layouts[1] is not None
    parts, dtype = _operands(query)
    assert dtype == tl.float32 or tile.tokens >= LEAST_TOKENS
    overlaps = can_overlap(query.device)
    group = heads // kv_heads
    begins = None if exact is None else exact.begins
    attention_share[(batch * kv_heads, tile.splits)](
        query,
        shares.sums,
        shares.maxima,
        shares.totals,
        *_units(cached.keys),
        *_units(cached.values),
        query if visible is None else visible,
        query if begins is None else begins,
        length,
        0 if exact is None else exact.last,
        0 if exact is None else exact.skipped,
        shares.count,
        kv_heads,
        *query.stride()[:2],
        *strides_of(cached.keys, UNIT_BYTES),
        *strides_of(cached.values, UNIT_BYTES),
        0 if visible is None else visible.stride(0),
        *scales,
        LENGTH_AT_POINTER=isinstance(length, Tensor),
        HAS_VISIBLE=visible is not None,
        HAS_SOFTCAP=scales[1] != 0.0,
        FIRST=0 if exact is None else exact.first,
        GROUP=group,
        HEADS=max(8, triton.next_power_of_2(group)),
        WIDTH=width,
        TOKENS=tile.tokens,
        PARTS=parts,
        DTYPE=dtype,
        OVERLAP=overlaps,
        STAGES=tile.stages,
        FETCHES=tile.fetches if query.is_cuda else 0,
        **layouts[0].reading("K"),
        **layouts[1].reading("V"),
        num_warps=tile.warps,
        maxnreg=tile.registers,
        launch_pdl=overlaps,
    )


def _combined(query: Tensor, shares: Shares, outputs: Tensor | None, kv_heads: int) -> Tensor:
    """Of all shares, in the shape and type of the query; what packed ones sum up is multiplied by `outputs`."""
    if outputs is None:
        return _sum_shares(query, shares, 0, shares.count, None, kv_heads, query.dtype)
    if query.shape[3] <= MOST_COMBINED:
        return _sum_shares(query, shares, 0, shares.packed, outputs, kv_heads, query.dtype)
    if shares.count == shares.packed:
        found = _sum_shares(query, shares, 0, shares.count, None, kv_heads, query.dtype)
        return times_each(found, outputs).to(query.dtype)
    packed, exact = (
        _sum_shares(query, shares, *of, None, kv_heads, torch.float32)
        for of in ((0, shares.packed), (shares.packed, shares.count))
    )
    return (times_each(packed, outputs) + exact).to(query.dtype)


def _sum_shares(
    query: Tensor, shares: Shares, begin: int, end: int, outputs: Tensor | None, kv_heads: int, dtype: torch.dtype
) -> Tensor:
    batch, heads, _, width = query.shape
    out = torch.empty(query.shape, dtype=dtype, device=query.device)
    columns = min(width, COLUMNS) if outputs is None else width
    splits = next(most for most in SPLITS if most >= shares.count)
    overlaps = can_overlap(query.device)
    _combine[(batch * heads, width // columns)](
        shares.sums,
        shares.maxima,
        shares.totals,
        out,
        shares.sums if outputs is None else outputs.contiguous(),
        matrix_stride(outputs),
        shares.count,
        begin,
        end,
        kv_heads,
        heads // kv_heads,
        HAS_MATRIX=outputs is not None,
        WIDTH=width,
        COLUMNS=columns,
        SPLITS=splits,
        AT_ONCE=min(splits, 4096 // columns),
        HAS_EXACT=outputs is not None and end < shares.count,
        OVERLAP=overlaps,
        num_warps=4 if outputs is None else 8,
        launch_pdl=overlaps,
    )
    return out


def _operands(query: Tensor) -> tuple[int, tl.dtype]:
    """Of how many numbers the other operands of products are sums, and of which type."""
    if not query.is_cuda or query.dtype == torch.float32:
        return 1, tl.float32
    return (1 if query.dtype == torch.bfloat16 else 2), tl.bfloat16


def _units(rows: TokenRows) -> tuple[Tensor, Tensor, Tensor]:
    """Codes in units, scales, and zero points, or anything where there are none."""
    scales = rows.parts["scale"]
    return rows.codes.view(torch.int16), scales, rows.parts.get("zero_point", scales)
