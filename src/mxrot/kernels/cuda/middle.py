"""Middle rows of MXFP4 inputs times packed MXFP4 weights, on Hopper's FP8 matrix hardware (CUDA C++).

The product, the order of inputs (`plain.across_blocks`) and the conversion of codes to FP8 numbers in registers are
those of `kernels.fused.middle`, whose docstring explains them. This kernel adds what Triton's compiler cannot do:

- Codes of the next 128 columns are looked up while the matrix hardware multiplies the previous ones.
- A separate warp copies codes, scales and inputs into shared memory, `stages` ahead. It copies codes and scales even
  before the kernel that quantizes the inputs has finished.
- The grid is as large as the device, whatever the shape. Tiles times chunks of 256 columns are divided evenly among
  teams of blocks ("stream-K", Osama et al., arXiv 2301.03598). If several teams have computed a tile, the last of them
  adds up the sums, in a fixed order.
- The blocks of a team (a cluster) compute different rows of weights for the same inputs. Each of them loads a part of
  the inputs from the L2 cache, for all of them (multicast). Or they compute different columns of the same tile, and
  pass their sums to the first of them through shared memory.

The matrix hardware sums 128 columns, or 256 with `promote` 2, in fewer bits than float32. These sums are added in
float32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mxrot.kernels.cuda.compiled import Kernel, compile_source, has_nvrtc, map_of_bytes, source_file
from mxrot.kernels.fused.overlap import can_overlap

_OUTPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_COPIER_REGISTERS = 40


@dataclass(frozen=True)
class Tile:
    """The work of a block at one time, and its resources."""

    inputs: int
    """Rows of inputs: 8, or a multiple of 16 up to 256."""
    groups: int = 2
    """Warpgroups, each for 64 rows of weights."""
    stages: int = 4
    """Chunks of 256 columns that fit in shared memory, at least 2."""
    blocks: int = 1
    """Blocks per multiprocessor."""
    promote: int = 1
    """Columns summed in fewer bits than float32, divided by 128: 1 or 2."""
    held: int = 168
    """Registers per thread at launch. The next kernel can start in those that are left of 65536."""
    team: int = 1
    """Blocks that load inputs together: 1, 2 or 4. Each has at least 8 of them."""
    splits: bool = False
    """True if the blocks of a team divide the columns of a tile among themselves instead."""

    @property
    def rows(self) -> int:
        """Rows of weights."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Threads that multiply, and one more warpgroup for copies."""
        return 128 * (self.groups + 1)

    @property
    def registers(self) -> int:
        """Registers of a multiplying thread, after the copying threads have released theirs."""
        return min(240, (self.held * (self.groups + 1) - _COPIER_REGISTERS) // self.groups // 8 * 8)

    @property
    def copied(self) -> int:
        """Rows of inputs that a block loads at one time."""
        return self.inputs if self.splits else self.inputs // self.team

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of a block, for outputs of this type."""
        stage = self.inputs * 256 + self.rows * (128 + 8)
        outputs = self.groups * self.inputs * (64 * dtype.itemsize + 16)
        sums = (self.team - 1) * self.inputs * self.rows * 4 + 16 if self.splits else 0
        return self.stages * (stage + 16) + outputs + sums + 1024

    def __str__(self) -> str:
        sums = f"sums of {128 * self.promote}, {self.held} registers"
        team = "" if self.team == 1 else f", teams of {self.team}{' that divide columns' if self.splits else ''}"
        return f"{self.inputs}x{self.rows}, {self.stages} stages, {self.blocks} blocks, {sums}{team}"


_EIGHT = Tile(8, groups=3, stages=4, promote=2, held=96)
_SIXTEEN = Tile(16, groups=2, stages=6, promote=2, held=96)
_THIRTY_TWO = Tile(32, groups=1, stages=5, blocks=2, promote=2, held=96)
_SIXTY_FOUR = Tile(64, groups=1, stages=3, blocks=2, promote=2, held=128)
_SIXTY_FOUR_TALL = Tile(64, groups=2, stages=5, promote=2)
_MANY = Tile(128, groups=2, stages=3, promote=2)
SMALL = 1024
"""A number of tiles of 128 rows of weights times chunks of 256 columns. With fewer, a tile for 128 rows of inputs is
split too often."""


def choose_tile(inputs: int, rows: int, groups: int) -> Tile:
    """The tile for these numbers of rows of inputs, of rows of weights, and of blocks in each; measured on an H200."""
    for tile in (_EIGHT, _SIXTEEN, _THIRTY_TWO, _SIXTY_FOUR):
        if inputs <= tile.inputs:
            return tile
    is_small = -(-rows // 128) * -(-groups // 8) < SMALL
    return _SIXTY_FOUR_TALL if inputs <= 128 and is_small else _MANY


def whole_tile(inputs: int) -> Tile:
    """The tile for this number of input rows if one team computes every tile."""
    for tile in (_EIGHT, _SIXTEEN, _THIRTY_TWO, _SIXTY_FOUR):
        if inputs <= tile.inputs:
            return replace(tile, groups=1, stages=max(3, tile.stages - 1), blocks=2, held=128)
    return _MANY


CANDIDATES = (
    _EIGHT,
    Tile(8, groups=2, stages=6, promote=2, held=96),
    _SIXTEEN,
    Tile(16, groups=1, stages=5, blocks=3, promote=2, held=72),
    _THIRTY_TWO,
    Tile(32, groups=2, stages=6, promote=2, held=128),
    _SIXTY_FOUR,
    Tile(64, groups=2, stages=4, promote=2, held=128),
    _SIXTY_FOUR_TALL,
    Tile(64, groups=3, stages=4, promote=2, held=128),
    Tile(128, groups=1, stages=3, promote=2),
    _MANY,
    Tile(128, groups=2, stages=3),
    # Half of a multiprocessor: the next product loads weights while this one runs.
    Tile(8, groups=2, stages=5, promote=2, held=80),
    Tile(8, groups=1, stages=6, promote=2, held=96),
    Tile(16, groups=2, stages=5, promote=2, held=80),
    Tile(32, groups=1, stages=5, promote=2, held=128),
    Tile(64, groups=1, stages=3, promote=2, held=128),
    # Teams that divide columns.
    *(Tile(8, groups=3, stages=4, promote=2, held=96, team=team, splits=True) for team in (2, 4)),
    *(Tile(8, groups=2, stages=5, promote=2, held=80, team=team, splits=True) for team in (2, 4)),
    *(Tile(16, groups=2, stages=6, promote=2, held=96, team=team, splits=True) for team in (2, 4)),
    *(Tile(32, groups=2, stages=5, promote=2, held=128, team=team, splits=True) for team in (2, 4)),
    Tile(64, groups=2, stages=4, promote=2, held=128, team=2, splits=True),
    # Teams that share inputs.
    Tile(16, groups=2, stages=6, promote=2, held=96, team=2),
    Tile(32, groups=1, stages=5, blocks=2, promote=2, held=96, team=2),
    Tile(32, groups=2, stages=5, promote=2, held=128, team=2),
    *(Tile(64, groups=1, stages=3, blocks=2, promote=2, held=128, team=team) for team in (2, 4)),
    *(Tile(64, groups=2, stages=5, promote=2, team=team) for team in (2, 4)),
    Tile(64, groups=3, stages=4, promote=2, held=128, team=2),
    *(Tile(128, groups=2, stages=3, promote=2, team=team) for team in (2, 4)),
)


def candidates(inputs: int) -> list[Tile]:
    """Tiles that are worth measuring for this number of input rows."""
    least, most = min(inputs, 64), max(8, 2 * inputs)
    return [tile for tile in CANDIDATES if least <= tile.inputs < most or tile.inputs == 8 >= inputs]


def definitions(tile: Tile, dtype: torch.dtype, overlaps: bool) -> str:
    """The constants of the kernel for this tile."""
    named = {
        "INPUTS": tile.inputs,
        "GROUPS": tile.groups,
        "TEAM": tile.team,
        "SPLIT": int(tile.splits),
        "STAGES": tile.stages,
        "MOST_THREADS": 65536 // tile.held // 128 * 128,
        "PROMOTE": tile.promote,
        "OUTPUT": _OUTPUTS[dtype],
        "REGISTERS": tile.registers,
        "COPIER_REGISTERS": _COPIER_REGISTERS,
        "OVERLAP": int(overlaps),
    }
    return "".join(f"#define {name} {value}\n" for name, value in named.items())


def source_of(tile: Tile, dtype: torch.dtype, overlaps: bool) -> str:
    """CUDA C++ of the kernel for this tile."""
    sums = tile.inputs // 2
    results = ", ".join(f"%{which}" for which in range(sums))
    first = ", ".join(f"%{sums + which}" for which in range(4))
    held = ", ".join(f'"+f"(sums[{which}])' for which in range(sums))
    product = f"""
__device__ __forceinline__ void add_products(float (&sums)[{sums}], unsigned a, unsigned b, unsigned c, unsigned d,
                                             unsigned long long inputs, int adds) {{
  asm volatile(
      "{{\\n.reg .pred adds;\\nsetp.ne.b32 adds, %{sums + 5}, 0;\\n"
      "wgmma.mma_async.sync.aligned.m64n{tile.inputs}k32.f32.e5m2.e5m2 {{{results}}}, {{{first}}}, %{sums + 4}, "
      "adds, 1, 1;\\n}}"
      : {held}
      : "r"(a), "r"(b), "r"(c), "r"(d), "l"(inputs), "r"(adds));
}}
"""
    return definitions(tile, dtype, overlaps) + source_file("hopper.cuh") + product + source_file("middle.cu")


@dataclass(frozen=True)
class _Ready:
    """A kernel on a device."""

    kernel: Kernel
    handed_on: Tensor
    """Space for sums that a block passes to another, int32, NOTHING between launches; for launches in CUDA graphs."""


_ready: dict[tuple[Tile, torch.dtype, torch.device], _Ready] = {}
_handed_on: dict[tuple[torch.device, int, int], Tensor] = {}
"""The same for launches on a stream, by device, stream and size."""


def is_there(device: torch.device) -> bool:
    """True for a Hopper GPU for which kernels can be compiled."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and has_nvrtc()


def _prepared(tile: Tile, dtype: torch.dtype, device: torch.device) -> _Ready:
    key = tile, dtype, device
    if key not in _ready:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"middle rows, {tile}: a CUDA graph cannot hold the first call; call it once before")
        code = compile_source(source_of(tile, dtype, can_overlap(device)), "sm_90a")
        kernel = Kernel(code, "middle_rows", tile.shared_bytes(dtype), device)
        _ready[key] = _Ready(kernel, _nothing(tile, device))
    return _ready[key]


def _nothing(tile: Tile, device: torch.device) -> Tensor:
    size = _processors(device) * tile.blocks * tile.rows * tile.inputs
    return torch.full((size,), -1, dtype=torch.int32, device=device)


def _room(tile: Tile, ready: _Ready, device: torch.device, stream: int) -> Tensor:
    """The space in which this launch passes sums on. Graphs have their own space, which must exist before they are
    captured. No two graphs with these products may therefore run at the same time."""
    if torch.cuda.is_current_stream_capturing():
        return ready.handed_on
    key = device, stream, ready.handed_on.numel()
    if key not in _handed_on:
        _handed_on[key] = _nothing(tile, device)
    return _handed_on[key]


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_teams(tiles: int, chunks: int, most: int) -> int:
    """Teams of a launch on a device that holds at most `most`: all of them, or a few less if each tile then has the
    same number."""
    teams = min(most, tiles * chunks)
    return teams - teams % tiles if tiles < teams and teams // tiles * tiles > 0.9 * teams else teams


@dataclass(frozen=True)
class Deal:
    """How a product is divided among teams."""

    teams: int
    chunks: int
    """Of 256 columns in a tile."""
    input_tiles: int
    row_tiles: int
    rest: int
    """Tiles whose chunks are divided evenly. Each team computes the same number of the others, which are whole."""
    are_whole: bool
    """True if no tile is divided among teams."""

    @classmethod
    def of(cls, tile: Tile, count: int, rows: int, groups: int, processors: int, are_whole: bool) -> Deal:
        """For these numbers of rows of inputs, of rows of weights, and of blocks of 32 in each."""
        chunks, input_tiles = -(-groups // 8), -(-count // tile.inputs)
        row_tiles = -(-rows // (tile.rows * (1 if tile.splits else tile.team)))
        if tile.splits and chunks < tile.team:
            raise ValueError(f"middle rows, {tile}: {groups} blocks of 32 columns are too few")
        are_whole = are_whole or tile.splits
        tiles, most = input_tiles * row_tiles, processors * tile.blocks // tile.team
        teams = min(tiles, most) if are_whole else count_teams(tiles, chunks, most)
        rest = tiles % teams if are_whole or tiles < teams else teams + tiles % teams
        return cls(teams, chunks, input_tiles, row_tiles, rest, are_whole)


def middle_product(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_exponents: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
    are_whole: bool = False,
) -> Tensor:
    """The product that `plain_middle_product` defines: `dtype` [..., N]. K is a multiple of 128.

    With `are_whole`, one team sums over all of K for each tile, and the result of a row does not depend on the other
    rows.
    """
    assert inputs.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()
    rows, groups = scales.shape
    count, device = inputs.numel() // (32 * groups), codes.device
    out = torch.empty(count, rows, dtype=dtype, device=device)
    if not out.numel():
        return out.view(*inputs.shape[:-1], rows)
    tile = tile or (whole_tile(count) if are_whole else choose_tile(count, rows, groups))
    deal = Deal.of(tile, count, rows, groups, _processors(device), are_whole)
    ready, stream = _prepared(tile, dtype, device), torch.cuda.current_stream(device).cuda_stream
    maps = [
        map_of_bytes(inputs.data_ptr(), count, 32 * groups, tile.copied, 128),
        map_of_bytes(codes.data_ptr(), rows, 16 * groups, tile.rows, 128),
    ]
    pointers = (scales, row_exponents, out, _room(tile, ready, device, stream))
    arguments = [*maps, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers)]
    numbers = (count, rows, groups, deal.chunks, deal.input_tiles, deal.row_tiles, deal.rest, int(deal.are_whole))
    arguments += [ctypes.c_int(number) for number in numbers]
    ready.kernel.launch(deal.teams, tile.team, tile.threads, arguments, stream, can_overlap(device))
    return out.view(*inputs.shape[:-1], rows)
