"""The product for middle rows in CUDA C++: how it is dealt out anywhere, the product itself on a Hopper GPU."""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.unit.kernels.test_middle import Weights, assert_is_product, inputs, ordered, weights
from torch import Tensor

from mxrot.kernels.cuda import compiled, middle
from mxrot.kernels.cuda.compiled import source_file
from mxrot.kernels.cuda.middle import (
    CANDIDATES,
    Deal,
    Tile,
    candidates,
    choose_tile,
    count_teams,
    middle_product,
    whole_tile,
)

HOPPER_SHARED, HOPPER_REGISTERS = 232448, 65536
"""Bytes of shared memory of a block, and registers of a multiprocessor."""


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    is_there = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    skip = pytest.mark.skipif(not is_there, reason="needs a GPU of compute capability 9.0")
    return pytest.mark.gpu(skip(test))


TILES = (*CANDIDATES, *(whole_tile(count) for count in (8, 16, 32, 64, 128)))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_multiprocessor_holds_its_blocks(tile: Tile) -> None:
    """Shared memory, and registers before and after those that copy give theirs away: too few would wait for ever."""
    assert tile.shared_bytes(torch.float32) <= HOPPER_SHARED
    assert tile.blocks * (tile.shared_bytes(torch.bfloat16) + 1024) <= HOPPER_SHARED + 1024  # 1024 of the system's each
    assert tile.blocks * tile.threads * tile.held <= HOPPER_REGISTERS
    handed_out = tile.groups * tile.registers + middle._COPIER_REGISTERS
    assert handed_out <= tile.held * (tile.groups + 1) and tile.registers % 8 == tile.held % 8 == 0
    most_threads = HOPPER_REGISTERS // tile.held // 128 * 128
    assert tile.threads <= most_threads and HOPPER_REGISTERS // most_threads // 8 * 8 >= tile.held


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_the_source_of_a_tile(tile: Tile) -> None:
    source = middle.source_of(tile, torch.float16, overlaps=True)
    assert f"#define INPUTS {tile.inputs}\n" in source and "#define OUTPUT 1\n" in source
    product, _ = source.split("// MXFP4 inputs")
    assert "wgmma" not in source_file("middle.cu") and "asm" not in source_file("middle.cu")
    assert f"m64n{tile.inputs}k32.f32.e5m2.e5m2" in product and product.count('"+f"(sums[') == tile.inputs // 2
    names = set(re.findall(r"#define (\w+)", source))
    assert names == {
        *("INPUTS", "GROUPS", "TEAM", "SPLIT", "STAGES", "PROMOTE", "OUTPUT", "OVERLAP"),
        *("MOST_THREADS", "REGISTERS", "COPIER_REGISTERS"),
    }
    body = source.split("#define OVERLAP 1\n")[1]
    assert all(re.search(rf"\b{name}\b", body) for name in names)


@pytest.mark.parametrize(
    ("tiles", "chunks", "most"), [(32, 16, 132), (48, 16, 132), (224, 16, 264), (3, 1, 132), (7, 5, 9), (500, 16, 66)]
)
def test_who_adds_up_a_tile(tiles: int, chunks: int, most: int) -> None:
    """Every unit belongs to one team; a team hands on one tile at most, to a team after it, which finds it."""
    deal = Deal.of(Tile(8, groups=1), 8, 64 * tiles, 8 * chunks, most, are_whole=False)
    teams, units = deal.teams, deal.rest * chunks
    assert teams == count_teams(tiles, chunks, most) <= most and (tiles - deal.rest) % teams == 0
    shares = [(units * team // teams, units * (team + 1) // teams) for team in range(teams)]
    assert all(first < last for first, last in shares)
    computed: Counter[int] = Counter()
    for team, (first, last) in enumerate(shares):
        parts = [(tile, max(first, tile * chunks), min(last, (tile + 1) * chunks)) for tile in range(deal.rest)]
        mine = [(tile, start, end) for tile, start, end in parts if start < end]
        computed.update(unit for _, start, end in mine for unit in range(start, end))
        handed_on = [tile for tile, _, end in mine if end < (tile + 1) * chunks]
        assert handed_on in ([], [mine[-1][0]])  # the last, which is computed first
        for tile, start, end in mine:
            if end == (tile + 1) * chunks and start > tile * chunks:
                earliest = ((tile * chunks + 1) * teams - 1) // units
                others = [other for other in range(team) if shares[other][1] > tile * chunks]
                assert others == list(range(earliest, team))
    assert computed == Counter(range(units))


def test_tiles_that_are_whole() -> None:
    """As many for each team, and the rest shared; with `are_whole` each is one team's."""
    tile = Tile(16, groups=2, team=2)
    deal = Deal.of(tile, 100, 1000, 512 // 32, 11, are_whole=False)
    assert deal == Deal(5, chunks=2, input_tiles=7, row_tiles=4, rest=8, are_whole=False) and deal.rest < 2 * deal.teams
    assert Deal.of(tile, 100, 1000, 16, 11, are_whole=True) == Deal(5, 2, 7, 4, 3, True)
    assert Deal.of(tile, 16, 256, 16, 132, are_whole=True) == Deal(1, 2, 1, 1, 0, True)


def test_teams_that_divide_columns() -> None:
    tile = Tile(16, groups=2, team=4, splits=True)
    assert Deal.of(tile, 40, 4096, 128, 132, are_whole=False) == Deal(33, 16, 3, 32, 30, True)
    with pytest.raises(ValueError, match=r"^middle rows, 16x128, .* that divide columns: 16 blocks of 32 columns"):
        Deal.of(tile, 40, 4096, 16, 132, are_whole=False)


def test_teams_that_share_tiles_evenly() -> None:
    assert count_teams(32, 16, 132) == 128 and count_teams(48, 16, 132) == 132
    assert count_teams(4, 2, 132) == 8 and count_teams(448, 16, 132) == 132


def test_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is given: clusters where teams are larger than one block, and the early start."""
    seen: list[tuple[int, int, int, list[tuple[int, list[int]]]]] = []

    class Driver:
        @staticmethod
        def cuLaunchKernelEx(config: Any, *_: Any) -> int:
            given = config._obj
            found = [
                (given.attributes[which].id, list(given.attributes[which].value[:3])) for which in range(given.count)
            ]
            seen.append((given.x, given.threads_x, given.shared, found))
            return 0

    monkeypatch.setattr(compiled, "_driver", Driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    kernel = compiled.Kernel.__new__(compiled.Kernel)
    kernel._shared, kernel._function, kernel._device = 4096, ctypes.c_void_p(), torch.device("cuda", 0)
    kernel.launch(5, 2, 384, [ctypes.c_int(1)], 0, True)
    kernel.launch(7, 1, 256, [ctypes.c_int(1)], 0, True)
    kernel.launch(7, 1, 256, [ctypes.c_int(1)], 0, False)
    assert seen == [
        (10, 384, 4096, [(4, [2, 1, 1]), (6, [1, 0, 0])]),
        (7, 256, 4096, [(6, [1, 0, 0])]),
        (7, 256, 4096, []),
    ]
    assert ctypes.sizeof(compiled._Attribute) == 72  # sizeof(CUlaunchAttribute)


@pytest.mark.parametrize("count", [1, 8, 9, 16, 33, 64, 65, 128, 129, 5000])
def test_tiles_for_a_number_of_rows(count: int) -> None:
    small, large = choose_tile(count, 4096, 128), choose_tile(count, 28672, 128)
    sizes = {1: (8, 8), 8: (8, 8), 9: (16, 16), 16: (16, 16), 33: (64, 64), 64: (64, 64), 65: (64, 128), 128: (64, 128)}
    assert (small.inputs, large.inputs) == sizes.get(count, (128, 128))
    assert candidates(count) and {tile.inputs for tile in candidates(count)} <= {8, 16, 32, 64, 128}
    assert whole_tile(count).promote == whole_tile(1).promote  # or a row would have other bits beside others


def test_a_source_that_is_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NVRTC nothing is compiled, and that is said; `is_there` asks."""

    def absent() -> None:
        raise compiled.CompileError("libnvrtc.so.13 of CUDA is not found")

    monkeypatch.setattr(compiled, "_nvrtc", absent)
    assert not compiled.has_nvrtc.__wrapped__()
    with pytest.raises(compiled.CompileError, match="not found"):
        compiled.compile_source("", "sm_90a")
    assert not middle.is_there(torch.device("cpu"))


def test_a_graph_does_not_hold_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled and filled then would belong to the memory of that graph."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"^middle rows, 8x192, .*: a CUDA graph cannot hold the first call"):
        middle._prepared(choose_tile(1, 4096, 128), torch.bfloat16, torch.device("cuda", 7))


def looked_up(codes: int, field: int) -> list[int]:
    """What `look_up` in the CUDA source does, with prmt as PTX defines it: bytes of eight codes, for an E5M2 field."""

    def prmt(low: int, high: int, selected: int) -> int:
        table = (low | high << 32).to_bytes(8, "little")
        found = 0
        for place in range(4):
            nibble = selected >> 4 * place & 15
            byte = table[nibble & 7]
            found |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * place
        return found

    word = 2**32 - 1
    low = (field * 0x04040400 + (0x02000000 - 0x0400)) & word
    high = (field * 0x04040404 + 0x0A080604) & word
    magnitudes = codes & 0x77777777
    signs, later = (prmt(0x80808080, 0x80808080, part) for part in (codes, codes >> 16))
    first = (signs << 1 & 0x80808080) | prmt(low, high, magnitudes)
    second = (later << 1 & 0x80808080) | prmt(low, high, magnitudes >> 16)
    return [*first.to_bytes(4, "little"), *second.to_bytes(4, "little")]


def test_codes_are_looked_up_as_the_format_has_them() -> None:
    """Every code at every place, for every field where the numbers of a block are normal ones; zeros for any."""
    source = source_file("middle.cu")
    for number in ("0x04040400u", "0x02000000u - 0x0400u", "0x04040404u", "0x0A080604u", "0x77777777u", "0x80808080u"):
        assert number in source
    magnitudes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    for field in range(2, 29):
        for word in (0x76543210, 0xFEDCBA98, 0x08F17E26):
            codes = [word >> 4 * place & 15 for place in range(8)]
            expected = [(-1 if code & 8 else 1) * magnitudes[code & 7] * 2.0 ** (field - 15) for code in codes]
            found = torch.tensor(looked_up(word, field), dtype=torch.uint8).view(torch.float8_e5m2).float()
            assert found.tolist() == expected
    for field in (-140, -1, 0, 40, 200):
        assert {byte & 127 for byte in looked_up(0x08080808, field)} == {0}


def product(x: Tensor, w: Weights, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Tensor:
    return middle_product(ordered(x), w.codes, w.scales, w.exponents, dtype, **how)


@on_hopper
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("count", "rows", "width"), [(71, 200, 512), (5, 72, 128), (130, 1000, 1152), (17, 333, 4096)])
def test_it_is_the_product(tile: Tile, count: int, rows: int, width: int) -> None:
    x, w = inputs(count, width, 0), weights(rows, width, 1)
    found = [product(x, w, torch.float32, tile=tile) for _ in range(3)]
    assert all(torch.equal(found[0], again) for again in found)
    assert_is_product(found[0], x, w, step=128 * tile.promote)
    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(product(x, w, dtype, tile=tile), found[0].to(dtype), rtol=0, atol=0)


@on_hopper
def test_a_row_has_the_same_bits_beside_any_others() -> None:
    x, w = inputs(200, 2048, 0), weights(640, 2048, 1)
    whole = product(x, w, are_whole=True)
    for start, count in ((0, 1), (3, 8), (40, 16), (17, 31), (100, 64), (50, 128)):
        assert torch.equal(product(x[start : start + count], w, are_whole=True), whole[start : start + count])


@on_hopper
@pytest.mark.parametrize("are_whole", [False, True])
def test_in_a_graph_and_beside_it(are_whole: bool) -> None:
    x, w = inputs(40, 4096, 0), weights(512, 4096, 1)
    eager, put = product(x, w, are_whole=are_whole), ordered(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = middle_product(put, w.codes, w.scales, w.exponents, torch.bfloat16, are_whole=are_whole)
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, eager) and torch.equal(product(x, w, are_whole=are_whole), eager)
