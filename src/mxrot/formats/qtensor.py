"""A quantized tensor: codes, scales, and the format that says what they mean."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mxrot.formats.catalog import Format
from mxrot.formats.element import look_up_pairs
from mxrot.formats.packing import pack_codes, unpack_codes
from mxrot.formats.scale import BlockScales


@dataclass(frozen=True)
class QTensor:
    """Blocks along the last dimension; K is a multiple of `format.block`."""

    codes: Tensor
    """uint8 [..., K], one code a byte."""
    scales: BlockScales
    """One scale a block, stored [..., K / block]."""
    format: Format

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes, scales and zero points; a scalar tensor scale is not counted."""
        return round(self.codes.numel() * self.format.bits_per_element / 8)

    @property
    def is_finite(self) -> bool:
        """Is every value finite in float32? A maximum near 3.4e38 may have been rounded to 2^128."""
        largest = float(self.scales.values().abs().max()) if self.scales.stored.numel() else 0.0
        multiple = max(abs(value) for value in self.format.element.values if math.isfinite(value))
        if largest * multiple <= torch.finfo(torch.float32).max:
            return True
        return bool(torch.isfinite(self.dequantize()).all())

    def packed(self) -> Tensor:
        """The codes as bytes, [..., K * bits / 8]."""
        return pack_codes(self.codes, self.format.element.bits)

    @staticmethod
    def dequantize_packed(packed: Tensor, scales: BlockScales, format: Format) -> Tensor:
        """from_packed(...).dequantize() in float32, bit for bit; 4-bit codes are looked up two at a time."""
        if format.element.bits != 4 or scales.zero_points is not None:
            return QTensor.from_packed(packed, scales, format).dequantize()
        values = look_up_pairs(format.element.value_pairs, packed)
        return (values.unflatten(-1, (-1, format.block)) * scales.values()[..., None]).flatten(-2)

    @staticmethod
    def from_packed(packed: Tensor, scales: BlockScales, format: Format) -> QTensor:
        """The inverse of `packed`."""
        return QTensor(unpack_codes(packed, format.element.bits), scales, format)

    def split_rows(self, rows: list[int]) -> list[QTensor]:
        """Cut a matrix [sum(rows), K] into matrices of so many rows; all keep its tensor scale."""
        codes, stored = self.codes.split(rows), self.scales.stored.split(rows)
        zeros = self.scales.zero_points
        zero_points = [None] * len(rows) if zeros is None else list(zeros.split(rows))
        return [
            QTensor(part, replace(self.scales, stored=scale, zero_points=zero), self.format)
            for part, scale, zero in zip(codes, stored, zero_points, strict=True)
        ]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, [..., K], computed in float32 (float64 if asked for) and cast to `dtype`.

        Exact in float32 for power-of-two scales, but for products outside its range.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        values = self.format.element.decode(self.codes, work).unflatten(-1, (-1, self.format.block))
        if self.scales.zero_points is not None:
            values = values - self.scales.zero_points.to(work)[..., None]
        return (values * self.scales.values(work)[..., None]).flatten(-2).to(dtype)
