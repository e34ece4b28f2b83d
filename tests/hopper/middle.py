"""The CUDA C++ of the product for middle rows, compiled for a CPU with the functions of `hopper.h`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from torch import Tensor

from mxrot.kernels.cuda.compiled import source_file
from mxrot.kernels.cuda.middle import Deal, Tile, definitions

COMPILER = shutil.which("g++")
NOTHING = -1

_LAUNCH = """
extern "C" const char* run(int teams, int threads, int shared, unsigned seed, const void* late, const u64* tensors,
                           const u8* scales, const int* exponents, void* out, void* parts, const int* n) {
  Map inputs, codes;
  std::memcpy(&inputs, tensors, sizeof(Map));
  std::memcpy(&codes, tensors + 16, sizeof(Map));
  const long bytes = inputs.words[1] * inputs.words[2];
  return machine::launch(teams, TEAM, threads, shared, seed, late, (void*)inputs.words[0], bytes, [=] {
    middle_rows(inputs, codes, scales, exponents, (Number*)out, (uint4*)parts, n[0], n[1], n[2], n[3], n[4], n[5], n[6],
                n[7]);
  });
}
"""


@cache
def _compiled(tile: Tile, dtype: torch.dtype) -> ctypes.CDLL:
    folder = Path(mkdtemp(prefix="mxrot-hopper-"))
    try:
        machine = Path(__file__).with_name("hopper.h").read_text()
        source = definitions(tile, dtype, overlaps=True) + machine + source_file("middle.cu") + _LAUNCH
        (folder / "middle.cpp").write_text(source)
        options = ["-std=c++17", "-O2", "-w", "-Wno-psabi", "-shared", "-fPIC", "-o", str(folder / "middle.so")]
        subprocess.run([str(COMPILER), *options, str(folder / "middle.cpp")], check=True)
        library = ctypes.CDLL(str(folder / "middle.so"))
    finally:
        shutil.rmtree(folder)
    library.run.restype = ctypes.c_char_p
    return library


def _map(tensor: Tensor, rows: int, width: int, tall: int) -> list[int]:
    return [tensor.data_ptr(), rows, width, tall, 128, *[0] * 11]


def product_on_cpu(
    inputs: Tensor,
    codes: Tensor,
    scales: Tensor,
    exponents: Tensor,
    dtype: torch.dtype,
    tile: Tile,
    processors: int,
    are_whole: bool = False,
    seed: int = 0,
) -> Tensor:
    """As `middle_product`, on a device with this many multiprocessors. RuntimeError if the launch fails, or leaves
    something where sums are handed on. `seed` decides when copies arrive and in which order threads run."""
    rows, groups = scales.shape
    count = inputs.numel() // (32 * groups)
    deal = Deal.of(tile, count, rows, groups, processors, are_whole)
    numbers = [count, rows, groups, deal.chunks, deal.input_tiles, deal.row_tiles, deal.rest, deal.are_whole]
    out = torch.full((count, rows), torch.nan, dtype=dtype)
    parts = torch.full((deal.teams * tile.team * tile.rows * tile.inputs,), NOTHING, dtype=torch.int32)
    before = torch.full((count, 32 * groups), 0x3C, dtype=torch.uint8)
    maps = [
        *_map(before, count, 32 * groups, tile.copied),
        *_map(codes, rows, 16 * groups, tile.rows),
    ]
    failure = _compiled(tile, dtype).run(
        deal.teams,
        tile.threads,
        tile.shared_bytes(dtype),
        seed,
        ctypes.c_void_p(inputs.data_ptr()),
        (ctypes.c_uint64 * 32)(*maps),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (scales, exponents, out, parts)),
        (ctypes.c_int * len(numbers))(*numbers),
    )
    if failure:
        raise RuntimeError(failure.decode())
    if not bool((parts == NOTHING).all()):
        raise RuntimeError("sums were left where they are handed on")
    return out.view(*inputs.shape[:-1], rows)
