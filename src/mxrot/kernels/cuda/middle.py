"""Some rows of MXFP4 times MXFP4 weights, which stay packed, on Hopper's FP8 matrix hardware (CUDA C++).

The same product as `kernels.fused.middle`, the same order of inputs (`plain.across_blocks`) and the same way from codes
to FP8 numbers in registers; its docstring says why. What Triton's compiler does not do is done here:

- Codes of the next 128 columns are looked up while the matrix hardware works on those before them.
- A warp of its own has codes, scales and inputs copied into shared memory, `stages` ahead, codes and scales even before
  the kernel that quantizes the inputs is done.
- A grid is as large as the device, whatever the shape: tiles times chunks of 256 columns are dealt out evenly
  ("stream-K", Osama et al., arXiv 2301.03598). A tile that several blocks have computed is added up by the last of
  them, in a fixed order.

Sums of 128 columns, or of 256 with `promote` 2, are added up in the matrix hardware, in fewer bits than float32, and
those sums in float32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

import torch
from torch import Tensor

from mxrot.kernels.cuda.compiled import Kernel, compile_source, has_nvrtc, map_of_bytes
from mxrot.kernels.fused.overlap import can_overlap

_OUTPUTS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_COPIER_REGISTERS = 40


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time, and how."""

    inputs: int
    """Rows of inputs: 8, or a multiple of 16 up to 256."""
    groups: int = 2
    """Warpgroups, each for 64 rows of weights."""
    stages: int = 4
    """Chunks of 256 columns that have a place in shared memory, 2 at least."""
    blocks: int = 1
    """That a multiprocessor holds at a time."""
    promote: int = 1
    """Columns over 128 that are summed in fewer bits than float32, 1 or 2."""
    held: int = 168
    """Registers that a thread is launched with. What is left of 65536 is where the next kernel can begin."""

    @property
    def rows(self) -> int:
        """Rows of weights."""
        return 64 * self.groups

    @property
    def threads(self) -> int:
        """Those that multiply, and a warpgroup for the one that has bytes copied."""
        return 128 * (self.groups + 1)

    @property
    def registers(self) -> int:
        """Of a thread that multiplies, once those that copy have given theirs away."""
        return min(240, (self.held * (self.groups + 1) - _COPIER_REGISTERS) // self.groups // 8 * 8)

    def shared_bytes(self, dtype: torch.dtype) -> int:
        """Of a block, for outputs of this type."""
        stage = self.inputs * 256 + self.rows * (128 + 8)
        outputs = self.groups * self.inputs * (64 * dtype.itemsize + 16)
        return self.stages * (stage + 16) + outputs + 1024

    def __str__(self) -> str:
        sums = f"sums of {128 * self.promote}, {self.held} registers"
        return f"{self.inputs}x{self.rows}, {self.stages} stages, {self.blocks} blocks, {sums}"


_EIGHT = Tile(8, groups=3, stages=4, promote=2, held=96)
_SIXTEEN = Tile(16, groups=2, stages=6, promote=2, held=96)
_THIRTY_TWO = Tile(32, groups=1, stages=5, blocks=2, promote=2, held=96)
_SIXTY_FOUR = Tile(64, groups=1, stages=3, blocks=2, promote=2, held=128)
_SIXTY_FOUR_TALL = Tile(64, groups=2, stages=5, promote=2)
_MANY = Tile(128, groups=2, stages=3, promote=2)
SMALL = 1024
"""Tiles of 128 rows of weights times chunks of 256 columns. Where there are fewer, a tile for 128 rows of inputs is
split too often."""


def choose_tile(inputs: int, rows: int, groups: int) -> Tile:
    """For so many rows of inputs and of weights, and blocks in each; measured on an H200."""
    for tile in (_EIGHT, _SIXTEEN, _THIRTY_TWO, _SIXTY_FOUR):
        if inputs <= tile.inputs:
            return tile
    is_small = -(-rows // 128) * -(-groups // 8) < SMALL
    return _SIXTY_FOUR_TALL if inputs <= 128 and is_small else _MANY


def whole_tile(inputs: int) -> Tile:
    """For so many rows of inputs where every tile is computed by one block."""
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
)


def candidates(inputs: int) -> list[Tile]:
    """Tiles that are worth measuring for so many rows of inputs."""
    least, most = min(inputs, 64), max(8, 2 * inputs)
    return [tile for tile in CANDIDATES if least <= tile.inputs < most or tile.inputs == 8 >= inputs]


def source_of(tile: Tile, dtype: torch.dtype, overlaps: bool) -> str:
    """CUDA C++ of the kernel for this tile."""
    sums = tile.inputs // 2
    named = {
        "INPUTS": tile.inputs,
        "GROUPS": tile.groups,
        "STAGES": tile.stages,
        "MOST_THREADS": 65536 // tile.held // 128 * 128,
        "PROMOTE": tile.promote,
        "OUTPUT": _OUTPUTS[dtype],
        "REGISTERS": tile.registers,
        "COPIER_REGISTERS": _COPIER_REGISTERS,
        "OVERLAP": int(overlaps),
    }
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
    body = files("mxrot.kernels.cuda").joinpath("middle.cu").read_text(encoding="utf-8")
    return "".join(f"#define {name} {value}\n" for name, value in named.items()) + product + body


@dataclass(frozen=True)
class _Ready:
    """A kernel on a device."""

    kernel: Kernel
    handed_on: Tensor
    """Room for sums that a block hands on to another, int32, NOTHING between launches; for launches in CUDA graphs."""


_ready: dict[tuple[Tile, torch.dtype, torch.device], _Ready] = {}
_handed_on: dict[tuple[torch.device, int, int], Tensor] = {}
"""The same for launches on a stream, of this size."""


def is_there(device: torch.device) -> bool:
    """Is this a Hopper GPU, and can kernels be compiled for it?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0) and has_nvrtc()


def _prepared(tile: Tile, dtype: torch.dtype, device: torch.device) -> _Ready:
    key = tile, dtype, device
    if key not in _ready:
        code = compile_source(source_of(tile, dtype, can_overlap(device)), "sm_90a")
        kernel = Kernel(code, "middle_rows", tile.shared_bytes(dtype), device)
        _ready[key] = _Ready(kernel, _nothing(tile, device))
    return _ready[key]


def _nothing(tile: Tile, device: torch.device) -> Tensor:
    size = _processors(device) * tile.blocks * tile.rows * tile.inputs
    return torch.full((size,), -1, dtype=torch.int32, device=device)


def _room(tile: Tile, ready: _Ready, device: torch.device, stream: int) -> Tensor:
    """Where this launch hands sums on. Graphs have a place of their own, which must be there before they are captured;
    so no two graphs with these products may run at the same time."""
    if torch.cuda.is_current_stream_capturing():
        return ready.handed_on
    key = device, stream, ready.handed_on.numel()
    if key not in _handed_on:
        _handed_on[key] = _nothing(tile, device)
    return _handed_on[key]


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def count_blocks(tiles: int, chunks: int, most: int) -> int:
    """Blocks of a launch on a device that holds so many: all, or a few less if then each tile has the same number."""
    blocks = min(most, tiles * chunks)
    return blocks - blocks % tiles if tiles < blocks and blocks // tiles * tiles > 0.9 * blocks else blocks


def middle_product(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    row_exponents: Tensor,
    dtype: torch.dtype,
    tile: Tile | None = None,
    are_whole: bool = False,
) -> Tensor:
    """As `plain_middle_product` defines it: `dtype` [..., N]; K a multiple of 128.

    Where tiles are whole, one block goes along all of K, and what comes out of a row does not depend on the rows beside
    it.
    """
    assert inputs.is_contiguous() and codes.is_contiguous() and scales.is_contiguous()
    rows, groups = scales.shape
    count, chunks, device = inputs.numel() // (32 * groups), -(-groups // 8), codes.device
    out = torch.empty(count, rows, dtype=dtype, device=device)
    if not out.numel():
        return out.view(*inputs.shape[:-1], rows)
    tile = tile or (whole_tile(count) if are_whole else choose_tile(count, rows, groups))
    input_tiles = -(-count // tile.inputs)
    tiles = input_tiles * -(-rows // tile.rows)
    most = _processors(device) * tile.blocks
    blocks = min(tiles, most) if are_whole else count_blocks(tiles, chunks, most)
    ready, stream = _prepared(tile, dtype, device), torch.cuda.current_stream(device).cuda_stream
    maps = [
        map_of_bytes(inputs.data_ptr(), count, 32 * groups, tile.inputs, 128),
        map_of_bytes(codes.data_ptr(), rows, 16 * groups, tile.rows, 128),
    ]
    pointers = (scales, row_exponents, out, _room(tile, ready, device, stream))
    arguments = [*maps, *(ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers)]
    numbers = [ctypes.c_int(number) for number in (count, rows, groups, chunks, input_tiles, tiles, int(are_whole))]
    ready.kernel.launch(blocks, tile.threads, [*arguments, *numbers], stream, can_overlap(device))
    return out.view(*inputs.shape[:-1], rows)
