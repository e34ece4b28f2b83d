"""Read single tensors of a model folder, straight from its safetensors files.

Nothing is unpickled: a folder that holds only .bin or .pt files is refused.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mxrot.errors import FamilyError, NumericsError
from mxrot.interrupts import interrupt_waits
from mxrot.models.ahead import Ahead
from mxrot.models.beside import FINAL_NORM, Beside
from mxrot.models.folder import INDEX, other_shards, weight_map
from mxrot.models.headers import Header, read_header
from mxrot.models.names import model_names

_RECOMPUTED = "rotary_emb.inv_freq"
"""Tensors that old conversions of Llama hold and no model loads any more; they follow from the config."""
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""Types that weights are taken in."""


class WeightFiles:
    """The tensors of one model folder, by their names in the model. Opens files as they are needed and keeps no tensor.

    FamilyError, with what to do, if the folder has no weights, two different sets of them, or files that do not fit
    its index.
    """

    def __init__(self, folder: Path, beside: Beside | None = None, ahead: Ahead | None = None) -> None:
        """`beside` is what a model of more than text has beside its text model; it tells names. Tensors that `ahead`
        holds are passed over."""
        self.folder, self._beside = folder, beside
        names, index = weight_map(folder)
        self._headers = {name: read_header(folder / name) for name in names}
        self._check_other_set(names)
        file_of = _files_of(folder, self._headers, index)
        ignored = set() if ahead is None else {name for name in file_of if ahead.holds(name)}
        named = model_names([name for name in file_of if name not in ignored], beside)
        if ahead is not None:  # by names in the model, too: a stored one may lack how the others begin
            ignored.update(name for name in named.values() if ahead.holds(name))
        self.passed_over = tuple(sorted(ignored))
        self._stored = {
            name: stored for stored, name in named.items() if not name.endswith(_RECOMPUTED) and name not in ignored
        }
        self._file_of = {name: file_of[stored] for name, stored in self._stored.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder / file for file in self._headers)

    def stored_as(self, name: str) -> str:
        """The type of a tensor as safetensors calls it, for example BF16 or F8_E4M3."""
        return self._header_of(name).tensors[self._stored[name]].dtype

    def stored_name(self, name: str) -> str:
        """What the files call the tensor `name`."""
        return self._stored[name]

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        stored = self._stored_shape(name)
        return (*stored[:-2], *stored[:-3:-1]) if self._is_turned(name) else stored

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        return self._header_of(name).tensors[self._stored[name]].shape

    def _is_turned(self, name: str) -> bool:
        if self._beside is None or FINAL_NORM not in self:
            return False
        return self._beside.is_turned(name, self._stored_shape(name), self._stored_shape(FINAL_NORM)[0])

    def dtype_of(self, name: str) -> torch.dtype:
        """The type a tensor is stored in, without reading it; FamilyError as for `read`."""
        self._header_of(name)
        stored = self.stored_as(name)
        if stored not in DTYPES:
            raise FamilyError(f"{name}: stored as {stored}; expected one of {', '.join(DTYPES)}")
        return DTYPES[stored]

    @property
    def holds_weights(self) -> bool:
        """Is any tensor in one of DTYPES?"""
        return any(self.stored_as(name) in DTYPES for name in self.names)

    def dtype_of_most(self) -> torch.dtype:
        """The type in which most of the weights are stored; FamilyError if none is in one of DTYPES."""
        counts: Counter[str] = Counter()
        for name in self.names:
            tensor = self._header_of(name).tensors[self._stored[name]]
            counts[tensor.dtype] += tensor.end - tensor.start
        for stored, _ in counts.most_common():
            if stored in DTYPES:
                return DTYPES[stored]
        raise FamilyError(f"{self.folder}: no tensor is stored in one of {', '.join(DTYPES)}")

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`; FamilyError if it is missing or unreadable, NumericsError on NaN or Inf."""
        return self.read_all([name], device)[name]

    def read_all(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Tensors by name, as `read` gives them; each file is opened once, and the device is waited for once."""
        tensors: dict[str, Tensor] = {}
        for file_name in dict.fromkeys(self._file_of.get(name) for name in names):
            inside = [name for name in names if self._file_of.get(name) == file_name]
            with interrupt_waits(), self._open(inside[0], device) as file:
                tensors |= {name: file.get_tensor(self._stored[name]) for name in inside}
        flags = [all_finite(tensor) for tensor in tensors.values()]
        for name, is_finite in zip(tensors, torch.stack(flags).tolist() if flags else [], strict=True):
            if not is_finite:
                raise NumericsError(f"{name}: the weights hold NaN or Inf; the file {self._file_of[name]} is damaged")
        return {name: tensor.mT.contiguous() if self._is_turned(name) else tensor for name, tensor in tensors.items()}

    def _header_of(self, name: str) -> Header:
        if name not in self._file_of:
            raise FamilyError(f"{self.folder}: no tensor {name!r} in its safetensors files; is the download complete?")
        return self._headers[self._file_of[name]]

    @contextmanager
    def _open(self, name: str, device: torch.device | str = "cpu") -> Iterator[Any]:
        path = self._header_of(name).path
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise FamilyError(f"{path}: cannot be read as safetensors ({error})") from error

    def will_need(self, prefix: str) -> None:
        """Let the system read ahead the tensors whose name starts with `prefix` and a dot, where it can, while
        something else is computed. Changes nothing but how long a later `read` takes."""
        if not hasattr(os, "posix_fadvise"):
            return
        wanted = [name for name in self._file_of if name.startswith(prefix + ".")]
        for file_name in dict.fromkeys(self._file_of[name] for name in wanted):
            header = self._headers[file_name]
            with header.path.open("rb") as file:
                data = 8 + int.from_bytes(file.read(8), "little")
                for name in wanted:
                    if self._file_of[name] == file_name:
                        tensor = header.tensors[self._stored[name]]
                        length = tensor.end - tensor.start
                        os.posix_fadvise(file.fileno(), data + tensor.start, length, os.POSIX_FADV_WILLNEED)

    def _check_other_set(self, names: list[str]) -> None:
        """FamilyError if complete shards of another content lie beside a single file: which is meant?"""
        others = other_shards(self.folder, names)
        if not others:
            return
        single = self._headers[names[0]]
        shards = {name: read_header(self.folder / name) for name in others}
        where = {tensor: file for file, header in shards.items() for tensor in header.tensors}
        for name in sorted(single.tensors.keys() | where.keys()):
            if name not in single.tensors or name not in where or not _is_same(single, shards[where[name]], name):
                raise FamilyError(
                    f"{self.folder}: holds two models: {names[0]}, which transformers reads, and the shards that "
                    f"{INDEX} names, with another {name}; remove those that you do not mean"
                )


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no element is NaN or Inf, a scalar."""
    if not tensor.is_floating_point() or not tensor.numel():
        return torch.ones((), dtype=torch.bool, device=tensor.device)
    is_byte = tensor.itemsize == 1  # PyTorch cannot tell of some of these
    # One pass without a mask: of a head of 128,256 tokens the mask alone takes a CPU a second.
    return torch.stack((tensor.float() if is_byte else tensor).aminmax()).isfinite().all()


def _files_of(folder: Path, headers: dict[str, Header], index: dict[str, str]) -> dict[str, str]:
    """The file of each tensor, by its name there; FamilyError for one in two files, or in none that the index names."""
    found: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in found:
                raise FamilyError(f"{folder}: {name} is in {found[name]} and in {file}; which one is meant?")
            found[name] = file
    for name, file in index.items():
        if found.get(name) != file:
            raise FamilyError(
                f"{folder}: {INDEX} says that {name} is in {file}, which does not hold it; are these files of one "
                "download?"
            )
    return found


def _is_same(one: Header, other: Header, name: str) -> bool:
    """Have both files a tensor of that name with the same bytes?"""
    first, second = one.tensors[name], other.tensors[name]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with interrupt_waits(), safe_open(one.path, framework="pt") as a, safe_open(other.path, framework="pt") as b:
        bytes_of = [file.get_tensor(name).flatten().view(torch.uint8) for file in (a, b)]
        return torch.equal(*bytes_of)
