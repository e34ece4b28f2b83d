"""A few rows of integers times 2-bit weights whose codes are looked up in four levels per group (Triton).

For one row the weights are read once, 16 of them in four bytes. Memory limits the speed only if a weight costs about
one instruction. Hence:

- The four int8 levels of a group are one 32-bit register. PRMT selects four of its bytes with four 4-bit selectors.
  Every other 2-bit code of a word is such a selector in place: codes 0, 2, 4, 6 under the mask 0x3333, and codes 1, 3,
  5, 7 after a shift by two bits. DP4A multiplies the selected bytes by four inputs and adds the products. These are 13
  instructions for 16 weights, all on integers: the product of a group is exact.
- Inputs are in the order that this needs (`plain.in_planes`), so a thread also loads 16 bytes of them at a time.
- A thread processes 64 weights of each of several rows, and uses the selected bytes for all rows of inputs. All its
  weights are being loaded before it waits for the inputs: the kernel is launched while the kernel that writes them
  runs.
- Warps of a program are along K or along rows of weights (`Tile`). The dimensions of all tensors are those of the
  layout, so threads exchange nothing before the sums over K, which have a fixed order.

`plain_look_up_product` is the specification, up to the order of the float32 sums. Triton's interpreter has no inline
assembly, so PRMT and DP4A are replaced by arithmetic there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from mxrot.kernels.fused.overlap import can_overlap
from mxrot.kernels.plain.look_up import IntegerRows

MOST_INPUTS = 8
"""Rows of inputs that a program processes at one time."""


@triton.jit
def _pick(levels, selectors, ASSEMBLY: tl.constexpr):
    """Four of the bytes of `levels`, selected by the lower four nibbles of `selectors`, each 0 to 3: int32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [levels, selectors], tl.int32, is_pure=True, pack=1
        )
    else:
        picked = (levels >> ((selectors & 3) << 3)) & 255
        for place in tl.static_range(1, 4):
            picked |= ((levels >> (((selectors >> (4 * place)) & 3) << 3)) & 255) << (8 * place)
        return picked


@triton.jit
def _add_products(total, left, right, ASSEMBLY: tl.constexpr):
    """total + the sum of four products of int8."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [left, right, total], tl.int32, is_pure=True, pack=1
        )
    else:
        for place in tl.static_range(4):
            total += ((left << (24 - 8 * place)) >> 24) * ((right << (24 - 8 * place)) >> 24)
        return total


@triton.jit
def _load_weights(
    words_at,
    scales_at,
    levels_at,
    chunk,
    RUN: tl.constexpr,
    FIRST: tl.constexpr,
    ACROSS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    PER_GROUP: tl.constexpr,
):
    """For each of RUN rows, FIRST rows beyond `words_at`: words [T, WORDS] of each thread's chunk, and scales [T] and
    levels [T, 1] of its group; zeros beyond the end."""
    IS_WHOLE: tl.constexpr = FIRST + ACROSS <= CHUNKS
    inside = None if IS_WHOLE else FIRST + chunk < CHUNKS
    inside_of_two = None if IS_WHOLE else (FIRST + chunk < CHUNKS)[:, None]
    nothing = None if IS_WHOLE else 0
    group = FIRST // PER_GROUP if FIRST % PER_GROUP == 0 else (FIRST + chunk) // PER_GROUP - chunk // PER_GROUP
    loaded: tl.tuple = ()
    for run in tl.static_range(RUN):
        # The offset is a compile-time constant: one address serves all.
        at = words_at + (run * CHUNKS + FIRST) * WORDS
        loaded += (tl.load(at, mask=inside_of_two, other=nothing, eviction_policy="evict_first"),)
    for run in tl.static_range(RUN):
        scales = tl.load(scales_at + group + run * (CHUNKS // PER_GROUP), mask=inside, other=nothing)
        at = (levels_at + group + run * (CHUNKS // PER_GROUP))[:, None]
        loaded += scales, tl.load(at, mask=inside_of_two, other=nothing)
    return loaded


@triton.jit
def _load_inputs(pointer, chunk, IS_WHOLE: tl.constexpr, CHUNKS: tl.constexpr, WORDS: tl.constexpr):
    """The four planes of a row of inputs at each thread's chunk, [T, WORDS]; zeros beyond the end."""
    SIZE: tl.constexpr = CHUNKS * WORDS
    inside = None if IS_WHOLE else (chunk < CHUNKS)[:, None]
    nothing = None if IS_WHOLE else 0
    at = pointer + chunk[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    first, second = tl.load(at, mask=inside, other=nothing), tl.load(at + SIZE, mask=inside, other=nothing)
    at += 2 * SIZE
    return first, second, tl.load(at, mask=inside, other=nothing), tl.load(at + SIZE, mask=inside, other=nothing)


@triton.jit
def _looked_up(words, levels, ASSEMBLY: tl.constexpr):
    """The levels of the codes in words [T, WORDS], four int8 in an int32, in the order of the four planes."""
    even, odd = words & 0x33333333, (words >> 2) & 0x33333333
    first, second = _pick(levels, even, ASSEMBLY), _pick(levels, even >> 16, ASSEMBLY)
    return first, second, _pick(levels, odd, ASSEMBLY), _pick(levels, odd >> 16, ASSEMBLY)


@triton.jit
def _product(weights, FIRST: tl.constexpr, inputs, ASSEMBLY: tl.constexpr):
    """The product of each thread's chunk, [T]: of the looked-up levels, four tensors from FIRST on, with inputs."""
    sums = _add_products(tl.zeros_like(inputs[0]), weights[FIRST], inputs[0], ASSEMBLY)
    for plane in tl.static_range(1, 4):
        sums = _add_products(sums, weights[FIRST + plane], inputs[plane], ASSEMBLY)
    return tl.sum(sums, axis=1)


@triton.jit
def _side_by_side(parts, DOWN: tl.constexpr, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """2^LEVELS = COUNT tensors [T] as one tensor [DOWN, T / DOWN, COUNT]."""
    for level in tl.static_range(LEVELS):
        joined: tl.tuple = ()
        for place in tl.static_range(COUNT >> (level + 1)):
            joined += (tl.join(parts[place], parts[place + (COUNT >> (level + 1))]),)
        parts = joined
    return tl.reshape(parts[0], [DOWN, parts[0].numel // (DOWN * COUNT), COUNT])


@triton.jit(do_not_specialize=["inputs_in_all"])
def _look_up_product(
    inputs_pointer,
    input_scales_pointer,
    words_pointer,
    scales_pointer,
    levels_pointer,
    out_pointer,
    inputs_in_all,
    rows_in_all,
    ASSEMBLY: tl.constexpr,
    OVERLAP: tl.constexpr,
    INPUTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    RUN: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    AHEAD: tl.constexpr,
    LEVELS: tl.constexpr,
):
    STEPS: tl.constexpr = (CHUNKS + ACROSS - 1) // ACROSS
    COUNT: tl.constexpr = RUN * INPUTS
    # Some rows of the last program may be those of the previous one, which writes the same values.
    first_input = tl.program_id(1) * INPUTS
    first_row = tl.minimum(tl.program_id(0) * (RUN * DOWN), rows_in_all - RUN * DOWN)
    thread = tl.arange(0, DOWN * ACROSS)
    row, chunk = first_row + thread // ACROSS * RUN, thread % ACROSS
    words_at = words_pointer + (row * CHUNKS + chunk)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    group = row * (CHUNKS // PER_GROUP) + chunk // PER_GROUP
    scales_at, levels_at = scales_pointer + group, levels_pointer + group
    loaded: tl.tuple = ()
    for step in tl.static_range(min(AHEAD, STEPS)):
        loaded += _load_weights(
            words_at, scales_at, levels_at, chunk, RUN, step * ACROSS, ACROSS, CHUNKS, WORDS, PER_GROUP
        )
    if OVERLAP:
        gdc_wait()
    totals: tl.tuple = ()
    for _ in tl.static_range(COUNT):
        totals += (tl.zeros([DOWN * ACROSS], tl.float32),)
    for step in tl.static_range(STEPS):
        if step + AHEAD < STEPS:
            loaded += _load_weights(
                words_at, scales_at, levels_at, chunk, RUN, (step + AHEAD) * ACROSS, ACROSS, CHUNKS, WORDS, PER_GROUP
            )
        weights: tl.tuple = ()
        for run in tl.static_range(RUN):
            weights += _looked_up(loaded[3 * RUN * step + run], loaded[3 * RUN * step + RUN + 2 * run + 1], ASSEMBLY)
        added: tl.tuple = ()
        for which in tl.static_range(INPUTS):
            # Rows beyond the end are replaced by the last one.
            place = tl.minimum(first_input + which, inputs_in_all - 1).to(tl.int64)
            pointer = inputs_pointer + place * (4 * CHUNKS * WORDS)
            inputs = _load_inputs(pointer, step * ACROSS + chunk, (step + 1) * ACROSS <= CHUNKS, CHUNKS, WORDS)
            for run in tl.static_range(RUN):
                product = _product(weights, 4 * run, inputs, ASSEMBLY).to(tl.float32)
                scales = loaded[3 * RUN * step + RUN + 2 * run].to(tl.float32)
                added += (totals[which * RUN + run] + product * scales,)
        totals = added
    sums = tl.sum(_side_by_side(totals, DOWN, COUNT, LEVELS), axis=1)
    place = tl.arange(0, COUNT)[None, :]
    row = first_row + tl.arange(0, DOWN)[:, None] * RUN + place % RUN
    which = first_input + place // RUN
    product = sums * tl.load(input_scales_pointer + tl.minimum(which, inputs_in_all - 1))
    at = out_pointer + which.to(tl.int64) * rows_in_all + row
    tl.store(at, product.to(out_pointer.dtype.element_ty), mask=which < inputs_in_all)


@dataclass(frozen=True)
class Tile:
    """The work of a program, and how it is divided."""

    run: int
    """Rows of weights per thread."""
    down: int
    """Warps with different rows."""
    across: int
    """Warps that share a row, each with a part of K."""
    ahead: int = 8
    """Steps along K whose weights are loaded before the first computation."""


def choose_tile(inputs: int, rows: int, chunks: int) -> Tile:
    """The tile for these numbers of rows of inputs, rows of weights, and chunks of K; measured on an H200."""
    if inputs > 1:
        return Tile(2, 1, 4, 2) if chunks > 64 else Tile(2, 4, 1)
    return Tile(4, 2, 1, 1) if rows >= 16384 else Tile(1, 4, 1, 1)


def words_of_chunk(group: int) -> int:
    """Words of 16 weights that a thread loads at once, all in one group of `group` weights. 0 if there are none."""
    return next((words for words in (4, 2, 1) if group % (16 * words) == 0), 0)


def look_up_product(inputs: IntegerRows, packed: Tensor, scales: Tensor, levels: Tensor, dtype: torch.dtype) -> Tensor:
    """The function `plain_look_up_product`, for inputs in the order of `plain.in_planes`, and groups of weights that
    are a multiple of 16.

    It is made for few rows of inputs: MOST_INPUTS of them at a time are multiplied by all weights.
    """
    rows, groups = scales.shape
    words = words_of_chunk(4 * packed.shape[1] // max(1, groups))
    tile = choose_tile(inputs.scales.numel(), rows, packed.shape[1] // (4 * words))
    return product_by_tiles(inputs, packed, scales, levels, dtype, tile, packed.is_cuda)


def product_by_tiles(
    inputs: IntegerRows,
    packed: Tensor,
    scales: Tensor,
    levels: Tensor,
    dtype: torch.dtype,
    tile: Tile,
    has_assembly: bool,
) -> Tensor:
    """`look_up_product` with a given tile, with PRMT and DP4A or with arithmetic in their place."""
    rows, groups = scales.shape
    count = inputs.scales.numel()
    width = 4 * packed.shape[1]
    words = words_of_chunk(width // groups)
    assert words and rows * width < 2**35
    out = torch.empty(count, rows, dtype=dtype, device=packed.device)
    if rows < tile.run * tile.down:
        tile = replace(tile, run=1, down=1)
    if out.numel():
        overlaps = can_overlap(packed.device)
        inputs_at_once = min(MOST_INPUTS, triton.next_power_of_2(count))
        _look_up_product[(triton.cdiv(rows, tile.run * tile.down), triton.cdiv(count, inputs_at_once))](
            inputs.codes.view(-1, width).view(torch.int32),
            inputs.scales,
            packed.view(torch.int32),
            scales,
            levels.view(torch.int32),
            out,
            count,
            rows,
            ASSEMBLY=has_assembly,
            OVERLAP=overlaps,
            INPUTS=inputs_at_once,
            CHUNKS=width // (16 * words),
            WORDS=words,
            PER_GROUP=width // groups // (16 * words),
            RUN=tile.run,
            DOWN=tile.down,
            ACROSS=32 * tile.across,
            AHEAD=tile.ahead,
            LEVELS=(tile.run * inputs_at_once).bit_length() - 1,
            num_warps=tile.down * tile.across,
            launch_pdl=overlaps,
        )
    return out.view(*inputs.codes.shape[:-1], rows)
