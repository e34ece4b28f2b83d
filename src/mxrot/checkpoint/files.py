"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mxrot.errors import DiskFullError
from mxrot.interrupts import interrupt_waits

INDEX = "model.safetensors.index.json"
_PIECE = 1 << 24


def write_bytes(path: Path, data: bytes) -> None:
    """Write under a temporary name, then rename. Leaves no temporary file behind, whatever happens.

    DiskFullError if there is no space left.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError(f"{path}: no space left on the device for {len(data) / 1e6:.1f} MB") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, table: dict[str, Any]) -> None:
    """Write a table as indented JSON."""
    write_bytes(path, (json.dumps(table, indent=2) + "\n").encode())


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; the same tensors give the same bytes."""
    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    with interrupt_waits():
        data = save(ordered, metadata={"format": "pt"})
    write_bytes(path, data)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()
