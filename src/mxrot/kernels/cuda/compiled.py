"""CUDA C++ compiled by PyTorch's NVRTC and launched through the driver, without a build step or another package.

A source is compiled for one architecture at its first call, in about a second, and kept for the process.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

_MOST_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
_TEAMS, _OVERLAPS = 4, 6
"""CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION and _PROGRAMMATIC_STREAM_SERIALIZATION."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("x", "y", "z", "threads_x", "threads_y", "threads_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


class CompileError(RuntimeError):
    """NVRTC is missing, or rejects a source."""


@cache
def _nvrtc() -> ctypes.CDLL:
    """The NVRTC library of this PyTorch."""
    major = (torch.version.cuda or "").partition(".")[0]
    name = f"libnvrtc.so.{major}" if sys.platform == "linux" else f"nvrtc64_{major}0_0.dll"
    folders = [Path(folder) for folder in getattr(find_spec("nvidia"), "submodule_search_locations", None) or ()]
    found = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for candidate in (*found, name):
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CompileError(f"{name} of CUDA is not found")


@cache
def has_nvrtc() -> bool:
    """True if sources can be compiled here. Hopper's own instructions need NVRTC 12 or later."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    try:
        failed = _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    except CompileError:
        return False
    return not failed and major.value >= 12


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1" if sys.platform == "linux" else "nvcuda.dll")


def source_file(name: str) -> str:
    """A file of this package."""
    return files("mxrot.kernels.cuda").joinpath(name).read_text(encoding="utf-8")


def compile_source(source: str, architecture: str) -> bytes:
    """Machine code of CUDA C++ for an architecture such as `sm_90a`. CompileError gives NVRTC's message."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"mxrot.cu", 0, None, None)
    options = [b"--gpu-architecture=" + architecture.encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    try:
        if failed:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompileError(log.value.decode(errors="replace"))
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, code)
        return code.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


_MAP_BYTES, _MAP_ALIGNMENT = 128, 64
"""Size and alignment of a CUtensorMap."""
_BYTE, _PLAIN, _TURNED_128, _WHOLE_LINES = 0, 0, 3, 2
"""CU_TENSOR_MAP_DATA_TYPE_UINT8, _SWIZZLE_NONE and _128B, _L2_PROMOTION_L2_128B."""


@lru_cache(maxsize=4096)
def map_of_bytes(address: int, rows: int, width: int, tall: int, wide: int) -> ctypes.Array[ctypes.c_ubyte]:
    """The tensor map for the bulk copy engine, of bytes [rows, width] at `address`, copied in boxes [tall, wide]. Boxes
    128 wide are swizzled in shared memory, as the matrix hardware reads them. Bytes outside the tensor are 0."""
    room = (ctypes.c_ubyte * (_MAP_BYTES + _MAP_ALIGNMENT))()
    found = (ctypes.c_ubyte * _MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % _MAP_ALIGNMENT)
    sizes, stride = (ctypes.c_uint64 * 2)(width, rows), (ctypes.c_uint64 * 1)(width)
    box, steps = (ctypes.c_uint32 * 2)(wide, tall), (ctypes.c_uint32 * 2)(1, 1)
    swizzle = _TURNED_128 if wide == 128 else _PLAIN
    kinds = [ctypes.c_int(kind) for kind in (0, swizzle, _WHOLE_LINES, 0)]
    where = ctypes.c_void_p(address)
    _check(_driver().cuTensorMapEncodeTiled(found, _BYTE, 2, where, sizes, stride, box, steps, *kinds))
    return found


def _check(result: int) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown error').decode()}")


class Kernel:
    """A function of compiled code, on one device."""

    def __init__(self, code: bytes, name: str, shared: int, device: torch.device) -> None:
        """`shared`: bytes of dynamic shared memory per block. RuntimeError if the device has fewer."""
        self._shared, self._module, self._function = shared, ctypes.c_void_p(), ctypes.c_void_p()
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize(device)  # the driver needs a context in this thread
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code))
            _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()))
            _check(_driver().cuFuncSetAttribute(self._function, _MOST_SHARED, shared))

    def launch(
        self, teams: int, team: int, threads: int, arguments: Sequence[Any], stream: int, overlaps: bool
    ) -> None:
        """Launch `teams` clusters of `team` blocks of `threads` threads. `arguments` are ctypes values. With
        `overlaps`, it starts while the previous kernel still runs (`kernels.fused.overlap`)."""
        attributes = (_Attribute * 2)()
        wanted = [(_TEAMS, (team, 1, 1))] * (team > 1) + [(_OVERLAPS, (1,))] * overlaps
        for attribute, (kind, values) in zip(attributes, wanted, strict=False):
            attribute.id, attribute.value[: len(values)] = kind, values
        config = _Config(teams * team, 1, 1, threads, 1, 1, self._shared, stream, attributes, len(wanted))
        addresses = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(each) for each in arguments))
        with torch.cuda.device(self._device):
            _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self._function, addresses, None))
