"""What a safetensors file says it holds, read and checked without its data.

A file is 8 bytes with the length of a JSON table, the table, and the data: of each tensor its type, its shape and where
its bytes start and end. Everything that the table claims is compared with the rest and with the length of the file, so
that a reader that comes after can trust it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxrot.documents import check_is_here, check_regular, parse_json
from mxrot.errors import DamagedError

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Of each type that safetensors knows."""
MOST_HEADER_BYTES = 100_000_000
"""What safetensors reads."""
MOST_DIMENSIONS = 64
"""What PyTorch has."""
_METADATA = "__metadata__"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file."""

    dtype: str
    """As safetensors calls it."""
    shape: tuple[int, ...]
    start: int
    """Where its bytes start, from the end of the header."""
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file; DamagedError says what in it does not fit the rest, or the file."""
    size = check_regular(path)
    check_is_here(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise _damaged(path, "its header does not fit in it")
            text = file.read(length)
    except OSError as error:
        raise DamagedError(f"{path}: cannot be read ({error.strerror})") from error
    table = _table(text, path)
    metadata = table.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, f"{_METADATA} is no table of texts")
    tensors = {name: _tensor(path, name, entry) for name, entry in table.items()}
    _check_places(path, tensors, size - 8 - length)
    return Header(path, tensors, metadata)


def _table(text: bytes, path: Path) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _damaged(path, "its header is no table of tensors")
    try:
        return parse_json(text.decode("utf-8"), f"{path}: its header")
    except UnicodeDecodeError as error:
        raise _damaged(path, "its header is not UTF-8") from error


def _tensor(path: Path, name: str, entry: Any) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"{_short(name)} has no dtype, shape and data_offsets")
    dtype, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _damaged(path, f"{_short(name)} is of type {dtype!r}")
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        raise _damaged(path, f"{_short(name)} has no shape of at most {MOST_DIMENSIONS} dimensions")
    if not _are_sizes(places) or len(places) != 2:
        raise _damaged(path, f"{_short(name)} has no two data_offsets")
    start, end = places
    if math.prod(shape) * BITS[dtype] != 8 * (end - start):
        raise _damaged(path, f"{_short(name)}: {dtype} {shape} does not take {end - start} bytes")
    return StoredTensor(dtype, tuple(shape), start, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_places(path: Path, tensors: dict[str, StoredTensor], size: int) -> None:
    """DamagedError unless the tensors fill `size` bytes without a gap, each with bytes of its own."""
    reached = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != reached:
            raise _damaged(path, f"{_short(name)} starts at byte {tensor.start}, expected {reached}")
        reached = tensor.end
    if reached != size:
        raise _damaged(path, f"its tensors take {reached} bytes, and it holds {size}; is it truncated?")


def _damaged(path: Path, what: str) -> DamagedError:
    return DamagedError(f"{path}: cannot be read as safetensors ({what})")


def _short(name: str) -> str:
    return repr(name if len(name) <= 200 else f"{name[:200]}...")
