"""Files that appear whole or not at all, with the size and hash of their contents.

Every file of an output is written through `whole_file`: under a name that ends in `.tmp`, hashed on the way, and
renamed. Tensors are written one by one, so that a state of a hundred gigabytes is never in memory twice.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch import Tensor

from mxrot.errors import CheckpointError, DiskFullError

INDEX = "model.safetensors.index.json"
TEMPORARY = ".tmp"
_PIECE = 1 << 24
_THREADS = 4
TYPE_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of types in safetensors, in the order in which it writes them to a file: widest first."""
_ORDER = {dtype: place for place, dtype in enumerate(TYPE_NAMES)}


@dataclass(frozen=True)
class Written:
    """The size and hash of a file."""

    bytes: int
    sha256: str


@dataclass
class Sink:
    """An open file that counts and hashes the bytes written to it."""

    file: IO[bytes]
    count: int = 0
    _digest: Any = field(default_factory=hashlib.sha256)

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self._digest.update(data)
        self.count += len(data)

    @property
    def written(self) -> Written:
        return Written(self.count, self._digest.hexdigest())


@contextmanager
def whole_file(path: Path, size: int) -> Iterator[Sink]:
    """A file to write `size` bytes into. It appears at `path` when the block ends, but not if the block ends in an
    error.

    DiskFullError if there is no space left.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield Sink(file)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space left on the device for {_amount(size)}") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _amount(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size} bytes"


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a file; DiskFullError if there is no space left."""
    with whole_file(path, len(data)) as sink:
        sink.write(data)
    return sink.written


def write_json(path: Path, table: dict[str, Any]) -> Written:
    """Write a table as indented JSON."""
    return write_bytes(path, (json.dumps(table, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Written:
    """Write a safetensors file, byte for byte that of `safetensors.torch.save`, one tensor after the other."""
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"dtype": TYPE_NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    with whole_file(path, 8 + len(encoded) + end) as sink:
        sink.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            plain = tensors[name].detach().cpu().contiguous().reshape(-1)
            sink.write(plain.view(torch.uint8).numpy().data)
    return sink.written


def sha256_of(path: Path, told: Callable[[int], None] = lambda count: None) -> str:
    """The SHA-256 of a file. `told` is called after each piece, with its number of bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            told(len(piece))
    return digest.hexdigest()


def seen(path: Path) -> Written:
    """The size and SHA-256 of a file as it is now."""
    return Written(path.stat().st_size, sha256_of(path))


def file_in(folder: Path, name: str) -> Path:
    """The path of a file that run.json lists. It may be in a subfolder, but never outside of `folder`."""
    parts = PurePosixPath(name).parts
    is_inside = bool(parts) and not any(part in ("..", "/") or "\\" in part for part in parts)
    return folder.joinpath(*parts) if is_inside else folder / Path(name).name


def check_hashes(folder: Path, listed: Any) -> None:
    """CheckpointError unless the files in the table `listed` of run.json exist, unchanged byte for byte."""
    if not isinstance(listed, dict) or INDEX not in listed:
        raise CheckpointError(f"{folder / 'run.json'}: has no list of files")
    paths = [file_in(folder, name) for name in listed]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda path: vars(seen(path)) if path.is_file() else None, paths)
    for path, now, expected in zip(paths, found, listed.values(), strict=True):
        if now is None:
            raise CheckpointError(f"{path}: is missing; use --force to make it again")
        if now != expected:
            raise CheckpointError(f"{path}: was changed after it was written; use --force to make it again")
