"""Read single tensors of a model folder, straight from its safetensors files.

Nothing is unpickled: a folder that holds only .bin or .pt files is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxrot.documents import check_regular, read_json
from mxrot.errors import DamagedError, FamilyError, NumericsError
from mxrot.interrupts import interrupt_waits
from mxrot.models.headers import read_header

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_RECOMPUTED = ".rotary_emb.inv_freq"
"""Tensors that old conversions of Llama hold and no model loads any more; they follow from the config."""
_SAMPLE = 4096
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class WeightFiles:
    """The tensors of one model folder, by name. Opens files as they are needed and keeps no tensor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of = {name: file for name, file in _locate(folder).items() if not name.endswith(_RECOMPUTED)}
        for path in self.files:
            if not path.exists():
                raise FamilyError(f"{path}: is named in {_INDEX} and missing; is the download complete?")
            check_regular(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def files(self) -> list[Path]:
        return sorted({self.folder / file for file in self._file_of.values()})

    def dtype_of(self, name: str) -> torch.dtype:
        """The type a tensor is stored in, without reading it; FamilyError as for `read`."""
        with interrupt_waits(), self._open(name) as file:
            stored = str(file.get_slice(name).get_dtype())
        if stored not in _DTYPES:
            raise FamilyError(f"{name}: stored as {stored}; expected one of {', '.join(_DTYPES)}")
        return _DTYPES[stored]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`; FamilyError if it is missing or unreadable, NumericsError on NaN or Inf."""
        return self.read_all([name], device)[name]

    def read_all(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors by name, as `read` gives them; each file is opened once, and the device is waited for once."""
        tensors: dict[str, Tensor] = {}
        for file_name in dict.fromkeys(self._file_of.get(name) for name in names):
            inside = [name for name in names if self._file_of.get(name) == file_name]
            with interrupt_waits(), self._open(inside[0], device) as file:
                tensors |= {name: file.get_tensor(name) for name in inside}
        flags = [torch.isfinite(tensor).all() for tensor in tensors.values()]
        for name, is_finite in zip(tensors, torch.stack(flags).tolist() if flags else [], strict=True):
            if not is_finite:
                raise NumericsError(f"{name}: the weights hold NaN or Inf; the file {self._file_of[name]} is damaged")
        return tensors

    @contextmanager
    def _open(self, name: str, device: torch.device | str = "cpu") -> Iterator[Any]:
        if name not in self._file_of:
            raise FamilyError(f"{self.folder}: no tensor {name!r} in its safetensors files; is the download complete?")
        path = self.folder / self._file_of[name]
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise FamilyError(f"{path}: cannot be read as safetensors ({error})") from error

    def read_under(self, prefix: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix` and a dot, by the rest of their names."""
        dotted = prefix + "."
        found = self.read_all([name for name in self.names if name.startswith(dotted)], device)
        return {name[len(dotted) :]: tensor for name, tensor in found.items()}

    def will_need(self, prefix: str) -> None:
        """Let the system read ahead the tensors whose name starts with `prefix` and a dot, where it can, while
        something else is computed. Changes nothing but how long a later `read` takes."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = [name for name in self.names if name.startswith(prefix + ".")]
        for file_name in dict.fromkeys(self._file_of[name] for name in wanted):
            with (self.folder / file_name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                header = file.read(min(int.from_bytes(file.read(8), "little"), size))
                data, extents = file.tell(), _extents(self.folder / file_name, header)
                for name in wanted:
                    if name in extents:
                        start, end = extents[name]
                        os.posix_fadvise(file.fileno(), data + start, end - start, os.POSIX_FADV_WILLNEED)

    def fingerprint(self) -> str:
        """SHA-256 over config.json and, of each weight file, its size, header and the first 4 KiB of each tensor.

        Tells models apart without reading all of a large one.
        """
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                header = file.read(min(int.from_bytes(file.read(8), "little"), size))
                digest.update(header)
                data = file.tell()
                for start, end in sorted(_extents(path, header).values()):
                    file.seek(data + start)
                    digest.update(file.read(min(_SAMPLE, end - start)))
        return digest.hexdigest()


def _extents(path: Path, header: bytes) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file starts and ends, by name, from the end of its header."""
    try:
        table = json.loads(header)
        found = {name: entry["data_offsets"] for name, entry in table.items() if name != "__metadata__"}
        return {name: (start, end) for name, (start, end) in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FamilyError(f"{path}: cannot be read as safetensors (its header is no table of tensors)") from error


def _locate(folder: Path) -> dict[str, str]:
    """File name of each tensor."""
    if (folder / _INDEX).exists():
        try:
            weight_map = read_json(folder / _INDEX)["weight_map"]
            return {str(name): Path(str(file)).name for name, file in weight_map.items()}
        except (DamagedError, KeyError, AttributeError) as error:
            raise FamilyError(f"{folder / _INDEX}: not a safetensors index ({error})") from error
    if (folder / _SINGLE).exists():
        return dict.fromkeys(read_header(folder / _SINGLE).tensors, _SINGLE)
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    hint = f"; {pickled[0]} would have to be unpickled, which mxrot never does" if pickled else ""
    raise FamilyError(f"{folder}: no {_SINGLE} and no {_INDEX}{hint}")
