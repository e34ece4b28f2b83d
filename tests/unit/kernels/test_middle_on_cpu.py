"""The CUDA source of the product for middle rows on a CPU: its results, and that mistakes in it are seen."""

from __future__ import annotations

import pytest
import torch
from tests.hopper import middle as machine
from tests.unit.kernels.test_middle import assert_is_product, inputs, ordered, weights
from torch import Tensor

from mxrot.kernels.cuda.compiled import source_file
from mxrot.kernels.cuda.middle import CANDIDATES, Tile, whole_tile

pytestmark = [
    pytest.mark.skipif(machine.COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the source itself"),
]

TILES = tuple(dict.fromkeys((*CANDIDATES, *(whole_tile(count) for count in (8, 16, 32)))))
"""Those that are measured or taken."""


def product(
    x: Tensor,
    rows: int,
    tile: Tile,
    processors: int,
    *,
    seed: int = 0,
    is_whole: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The product of x with the weights [rows, K] of seed 1; it must be that of float64."""
    w = weights(rows, x.shape[-1], 1)
    args = ordered(x), w.codes, w.scales, w.exponents, dtype, tile, processors, is_whole, seed
    found = machine.product_on_cpu(*args)
    if dtype == torch.float32:
        assert_is_product(found, x, w)
    return found


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_it_is_the_product(tile: Tile) -> None:
    """Tiles that teams divide and others, partial tiles of both operands, a partial chunk; blocks that do nothing."""
    product(inputs(tile.inputs + 3, 1152, 0), tile.rows * tile.team * 2 + 37, tile, 3 * tile.team)
    if not tile.splits:
        product(inputs(1, 128, 0), 8, tile, 6 * tile.team)


@pytest.mark.parametrize(("team", "splits"), [(1, False), (2, False), (4, False), (2, True), (4, True)])
@pytest.mark.parametrize("seed", range(6))
def test_in_any_order(team: int, splits: bool, seed: int) -> None:
    """Copies, blocks and warps are early and late: the bits are the same."""
    tile, x = Tile(32, groups=1, stages=2, team=team, splits=splits), inputs(71, 2304, 0)
    first = product(x, 600, tile, 5 * team)
    assert torch.equal(product(x, 600, tile, 5 * team, seed=1 + seed), first)


def test_more_tiles_of_inputs_than_lie_next_to_each_other() -> None:
    tile, x = Tile(8, groups=1, stages=2, team=2), inputs(139, 512, 0)
    whole = product(x, 300, tile, 8, is_whole=True)
    torch.testing.assert_close(product(x, 300, tile, 8), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("team", [1, 2])
def test_a_row_has_the_same_bits_beside_any_others(team: int) -> None:
    """Where one team computes all of K; whatever the tile, and the number of teams."""
    x = inputs(40, 1152, 0)
    whole = product(x, 300, Tile(16, groups=1, stages=3, team=team), 6, is_whole=True)
    for start, count, inputs_of_tile in ((0, 1, 8), (3, 8, 16), (7, 33, 32)):
        tile = Tile(inputs_of_tile if team == 1 else 16, groups=2, stages=2, team=team)
        found = product(x[start : start + count], 300, tile, 4, is_whole=True)
        assert torch.equal(found, whole[start : start + count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [72, 333])
def test_types_of_outputs(dtype: torch.dtype, rows: int) -> None:
    """Rows that are stored 16 bytes at once, and rows that are not."""
    tile, x = Tile(16, groups=1, stages=2), inputs(21, 512, 0)
    assert torch.equal(product(x, rows, tile, 2, dtype=dtype), product(x, rows, tile, 2).to(dtype))


MISTAKES = {
    "a stage is filled before it is empty": ("        wait(barriers + (STAGES + slot) * 8, parity);\n", ""),
    "a stage is decoded before it is full": ("    if (!is_second) wait(barriers + slot * 8, parity);\n", ""),
    "the others of a team are not told that a stage is empty": ("arrive_in(empty, lane);", "arrive(empty);"),
    "a stage is given back before its products": (
        "      wait_for_products(then);\n      const u32 empty = barriers + (STAGES + used) * 8;\n",
        "      const u32 empty = barriers + (STAGES + used) * 8;\n      if (lane < TEAM) arrive_in(empty, lane);\n"
        "      wait_for_products(then);\n",
    ),
    "sums are read before products": ("      wait_for_products(then);\n", "      if (left) wait_for_products(then);\n"),
    "inputs are read before they are written": ("    if (OVERLAP) wait_for_previous_kernel();\n", ""),
    "a block copies into another that has no barriers": (
        "    if (TEAM > 1) wait_for_cluster();\n    at = start;\n",
        "    at = start;\n",
    ),
    "each of a team copies the same inputs": ("      if (IS_SHARED) first_input += member * COPIED;\n", ""),
    "a block ends while others arrive at its barriers": (
        "    if (TEAM > 1) {\n      arrive_in_cluster();\n      wait_for_cluster();\n    }\n    return;\n",
        "    return;\n",
    ),
    "sums that were handed on stay": (
        "store_at_once(theirs - which / BATCH * BEFORE + part * THREADS, NOTHING,",
        "if (false) store_at_once(theirs - which / BATCH * BEFORE + part * THREADS, NOTHING,",
    ),
    "a barrier expects too few bytes": (
        "arrive_and_expect(full, STAGE_BYTES);",
        "arrive_and_expect(full, WORD_BYTES);",
    ),
    "sums of one tile are stored over those of another": (
        "        if (tiles_done > 0) wait_for_others(sums_taken, tiles_done - 1 & 1);\n",
        "",
    ),
    "sums of others are added before they are there": (
        "        wait_for_others(sums_there, tiles_done & 1);\n",
        "",
    ),
    "nobody hands on sums": ("SPLIT ? member == 0 : end == chunks;", "SPLIT ? member == 0 : true;"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_seen(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = MISTAKES[mistake]
    source = source_file("middle.cu")
    assert right in source
    source = source.replace(right, wrong)
    if "ends while" in mistake:  # also where others than the copying threads wait
        source = source.replace("  if (TEAM > 1) {  // the others", "  if (false) {  // the others")
    monkeypatch.setattr(machine, "source_file", lambda name: source)
    machine._compiled.cache_clear()
    tile, x = Tile(16, groups=2, stages=2, team=2, splits="sums of" in mistake), inputs(40, 2304, 0)
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(12):
            product(x, 700, tile, 4, seed=seed)
    machine._compiled.cache_clear()
