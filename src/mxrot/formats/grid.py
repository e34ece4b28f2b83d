"""Grids: the values that the elements of a block may take, and how a block of numbers becomes codes.

A grid defines the tensors stored beside the codes (scales, zero points, a codebook). It chooses them for given blocks,
and rounds, encodes and decodes blocks under them. No other code interprets them: a format with another kind of block
needs one class here and one line in `catalog.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.block_scales import BlockScales, ScaleType
from mxrot.formats.element import Element, look_up_pairs
from mxrot.formats.packing import unpack_codes
from mxrot.formats.parts import NamedParts, Parts, PartSpec
from mxrot.formats.scale import ScaleRule


@dataclass(frozen=True)
class Grid(ABC):
    """The values that a block may hold. It holds no tensor."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """The bits of a code: 2, 4, 6 or 8."""

    @abstractmethod
    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        """The parts stored beside the codes under `rule`."""

    @abstractmethod
    def choose(self, blocks: Tensor, rule: ScaleRule) -> Parts:
        """The parts of float32/float64 `blocks` [..., G, B]. The parts of a block with NaN or Inf decode to NaN."""

    @abstractmethod
    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        """The uint8 codes of the nearest values of finite float32/float64 `blocks` [..., G, B]; same shape."""

    @abstractmethod
    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        """The values of uint8 `codes` [..., G, B], computed in `dtype`, which is float32 or float64."""

    def round(self, blocks: Tensor, parts: Parts) -> Tensor:
        """`decode(encode(blocks))` in the dtype of `blocks`, bit for bit; NaN if the parts are NaN."""
        return self.decode(self.encode(blocks, parts), parts, blocks.dtype)

    def as_parts(self, tensors: dict[str, Tensor], rule: ScaleRule) -> Parts:
        """The parts, from the tensors of a checkpoint by name."""
        return NamedParts(tensors)

    def decode_packed(self, packed: Tensor, parts: Parts, block: int) -> Tensor:
        """float32 values [..., K] of packed codes [..., K * bits / 8], in blocks of `block` elements."""
        codes = unpack_codes(packed, self.bits).unflatten(-1, (-1, block))
        return self.decode(codes, parts, torch.float32).flatten(-2)

    def not_finite(self, parts: Parts) -> str | None:
        """The name, for error messages, of a part that overflows its type. None if all are finite."""
        for name, tensor in parts.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                return f"{name} ({str(tensor.dtype).removeprefix('torch.')})"
        return None

    def is_within_float32(self, parts: Parts) -> bool:
        """True if every code surely gives a finite float32 value. If False, callers check the values themselves."""
        return False

    def looks_at_whole_tensor(self, rule: ScaleRule) -> bool:
        """True if the parts of a block depend on blocks of other rows."""
        return False

    def is_exact_in_bfloat16(self, rule: ScaleRule) -> bool:
        """True if every value is a bfloat16 number."""
        return False


@dataclass(frozen=True)
class Uniform(Grid):
    """Equal elements under one scale per block, with a zero point if the element is unsigned: (e - zero) * scale."""

    element: Element
    scale: ScaleType

    @property
    def bits(self) -> int:
        return self.element.bits

    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        stored = rule.stored_type(self.scale)
        found = [PartSpec("scale", stored.dtype, stored.bits)]
        if rule.has_tensor_scale(self.scale):
            found.append(PartSpec("tensor_scale", torch.float32, 32, "row" if rule.by_row else "tensor"))
        if not self.element.is_signed:
            found.append(PartSpec("zero_point", torch.uint8, self.element.bits))
        return tuple(found)

    def choose(self, blocks: Tensor, rule: ScaleRule) -> BlockScales:
        return rule.choose(blocks, self.element, self.scale)

    def as_parts(self, tensors: dict[str, Tensor], rule: ScaleRule) -> BlockScales:
        stored_type = rule.stored_type(self.scale)
        return BlockScales(tensors["scale"], stored_type, tensors.get("tensor_scale"), tensors.get("zero_point"))

    def round(self, blocks: Tensor, parts: Parts) -> Tensor:
        scales = _scales(parts)
        rounded = self.element.round(_scaled(blocks, scales))
        if scales.zero_points is not None:
            rounded = rounded - scales.zero_points.to(blocks.dtype)[..., None]
        return rounded * scales.values(blocks.dtype)[..., None]

    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        return self.element.encode(_scaled(blocks, _scales(parts)))

    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        scales, values = _scales(parts), self.element.decode(codes, dtype)
        if scales.zero_points is not None:
            values = values - scales.zero_points.to(dtype)[..., None]
        return values * scales.values(dtype)[..., None]

    def decode_packed(self, packed: Tensor, parts: Parts, block: int) -> Tensor:
        """4-bit codes are looked up two at a time."""
        scales = _scales(parts)
        if self.bits != 4 or scales.zero_points is not None:
            return super().decode_packed(packed, parts, block)
        values = look_up_pairs(self.element.value_pairs, packed)
        return (values.unflatten(-1, (-1, block)) * scales.values()[..., None]).flatten(-2)

    def not_finite(self, parts: Parts) -> str | None:
        scales = _scales(parts)
        return None if torch.isfinite(scales.values()).all() else scales.type.name

    def is_within_float32(self, parts: Parts) -> bool:
        scales = _scales(parts)
        largest = float(scales.values().abs().max()) if scales.stored.numel() else 0.0
        return largest * self.element.largest_value <= torch.finfo(torch.float32).max

    def looks_at_whole_tensor(self, rule: ScaleRule) -> bool:
        return rule.looks_at_whole_tensor(self.scale)

    def is_exact_in_bfloat16(self, rule: ScaleRule) -> bool:
        return rule.is_power_of_two and self.element.mantissa_bits < 8


def _scales(parts: Parts) -> BlockScales:
    assert isinstance(parts, BlockScales)
    return parts


def _scaled(blocks: Tensor, scales: BlockScales) -> Tensor:
    """blocks / scale + zero point; 0 if the scale has underflowed to 0."""
    values = scales.values(blocks.dtype)[..., None]
    if scales.zero_points is None and scales.type.dtype == torch.uint8:
        return blocks / values
    scaled = torch.where(values == 0, torch.zeros((), dtype=blocks.dtype, device=blocks.device), blocks / values)
    return scaled if scales.zero_points is None else scaled + scales.zero_points.to(blocks.dtype)[..., None]
