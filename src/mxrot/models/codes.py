"""Weights that a folder holds as codes, and that are read as bfloat16: models that are published in no other form.

What the config calls the method says how the tensors are called and what they mean. No other code asks for it: the
files are read as if they held the weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from mxrot.errors import FamilyError, NumericsError
from mxrot.formats.given_codes import from_mxfp4, from_tiles
from mxrot.models.ahead import Ahead
from mxrot.models.beside import Beside
from mxrot.models.weights import WeightFiles, all_finite

READ_AS = torch.bfloat16
"""What codes become, rounded once."""


class Codes(ABC):
    """How weights are held as codes."""

    said: ClassVar[str]
    """What was done, in the words of `Source.changes`."""
    codes: ClassVar[str]
    """How the name of a tensor of codes ends."""
    weight: ClassVar[str]
    """How that of the weight does, which takes its place."""
    scales: ClassVar[str]
    """And that of its scales."""
    stored_as: ClassVar[str]
    """The type of codes, as safetensors calls it."""

    @abstractmethod
    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Of a weight, by that of its codes."""

    @abstractmethod
    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Of its scales, by that of its codes."""

    @abstractmethod
    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight, in READ_AS."""


@dataclass(frozen=True)
class ExpertBlocks(Codes):
    """MXFP4 of gpt-oss: for all experts codes, uint8 [E, N, K / 32, 16], and exponents, uint8 [E, N, K / 32].

    The weight is [E, K, N], as transformers has it.
    """

    said: ClassVar[str] = "MXFP4 codes read as bfloat16"
    codes: ClassVar[str] = "_blocks"
    weight: ClassVar[str] = ""
    scales: ClassVar[str] = "_scales"
    stored_as: ClassVar[str] = "U8"

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        experts, rows, groups, width = codes
        return experts, 2 * groups * width, rows

    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return codes[:-1]

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        found = torch.empty(self.shape(tuple(codes.shape)), dtype=READ_AS, device=codes.device)
        for target, packed, exponents in zip(found, codes, scales, strict=True):
            target.copy_(from_mxfp4(packed, exponents, READ_AS).T)  # one expert at a time: float32 is wide
        return found


@dataclass(frozen=True)
class Tiles(Codes):
    """FP8 of DeepSeek V3: codes, float8_e4m3fn [N, K], and a float32 factor for each tile of rows and columns."""

    rows: int
    columns: int
    said: ClassVar[str] = "FP8 codes read as bfloat16"
    codes: ClassVar[str] = ".weight"
    weight: ClassVar[str] = ".weight"
    scales: ClassVar[str] = ".weight_scale_inv"
    stored_as: ClassVar[str] = "F8_E4M3"

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        return codes

    def scale_shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        rows, columns = codes
        return -(-rows // self.rows), -(-columns // self.columns)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        return from_tiles(codes, scales, self.rows, self.columns, READ_AS)


def codes_of(config: Any) -> Codes | None:
    """How a config says that weights are held, where they can be read; None for other models."""
    table = getattr(config, "quantization_config", None)
    if not isinstance(table, dict):
        return None
    if table.get("quant_method") == "mxfp4":
        return ExpertBlocks()
    if table.get("quant_method") == "fp8" and table.get("fmt", "e4m3") == "e4m3":
        return _tiles(table.get("weight_block_size"))
    return None


def _tiles(size: Any) -> Tiles | None:
    """Of rows and columns; None where a weight has one factor, or what is no pair of numbers."""
    if isinstance(size, (list, tuple)) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return Tiles(*size)
    return None


class CodedFiles(WeightFiles):
    """The tensors of a folder, with weights in the place of codes and scales; errors as of `WeightFiles`.

    FamilyError for codes without scales, or of another type or shape than these have.
    """

    def __init__(self, folder: Path, how: Codes, beside: Beside | None = None, ahead: Ahead | None = None) -> None:
        super().__init__(folder, beside, ahead)
        self._how = how
        self._coded: dict[str, tuple[str, str]] = {}
        for scales in [name for name in self._file_of if name.endswith(how.scales)]:
            base = scales.removesuffix(how.scales)
            self._coded[base + how.weight] = (base + how.codes, scales)
        self._parts = {part for parts in self._coded.values() for part in parts}
        for weight, (codes, scales) in self._coded.items():
            self._check(weight, codes, scales)

    def _check(self, weight: str, codes: str, scales: str) -> None:
        stored, shape = super().stored_as(codes), super().shape_of(codes)
        if stored != self._how.stored_as:
            raise FamilyError(f"{codes}: stored as {stored}; expected {self._how.stored_as}, as {scales} is beside it")
        try:
            expected = self._how.scale_shape(shape)
        except ValueError as error:
            raise FamilyError(f"{codes}: codes of shape {list(shape)}, which are none of {weight}") from error
        if super().shape_of(scales) != expected:
            raise FamilyError(f"{scales}: expected {list(expected)}, got {list(super().shape_of(scales))}")

    def __contains__(self, name: str) -> bool:
        return name in self._coded or (name in self._file_of and name not in self._parts)

    @property
    def names(self) -> list[str]:
        return sorted((self._file_of.keys() - self._parts) | self._coded.keys())

    def stored_as(self, name: str) -> str:
        """As of `WeightFiles`; BF16 of what is read as such."""
        return "BF16" if name in self._coded else super().stored_as(name)

    def stored_name(self, name: str) -> str:
        return super().stored_name(self._coded[name][0] if name in self._coded else name)

    def shape_of(self, name: str) -> tuple[int, ...]:
        if name in self._coded:
            return self._how.shape(super().shape_of(self._coded[name][0]))
        return super().shape_of(name)

    def dtype_of(self, name: str) -> torch.dtype:
        return READ_AS if name in self._coded else super().dtype_of(name)

    def dtype_of_most(self) -> torch.dtype:
        return READ_AS if self._coded else super().dtype_of_most()

    def read_all(self, names: list[str], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        stored = [part for name in names for part in self._coded.get(name, (name,))]
        tensors = super().read_all(stored, device)
        found = {}
        for name in names:
            if name not in self._coded:
                found[name] = tensors[name]
                continue
            codes, scales = (tensors.pop(part) for part in self._coded[name])
            found[name] = self._how.read(codes, scales)
            if not all_finite(found[name]):
                raise NumericsError(f"{name}: its codes and scales give NaN or Inf; the file is damaged")
        return found
