"""A quantized tensor: its codes, its scales and other parts, and its format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.block_scales import BlockScales
from mxrot.formats.catalog import Format
from mxrot.formats.packing import pack_codes, unpack_codes
from mxrot.formats.parts import Parts


@dataclass(frozen=True)
class QTensor:
    """A quantized tensor. Blocks lie along the last dimension, whose size K is a multiple of the block size.

    Example:
        >>> from mxrot.formats import get_format, quantize
        >>> format = get_format("mxfp4")
        >>> q = quantize(torch.tensor([1.0, -0.4, 6.0, 0.1] * 8), format, format.rule("even"))
        >>> q.dequantize()[:4].tolist()
        [1.0, -0.5, 6.0, 0.0]
    """

    codes: Tensor
    """Codes as uint8 [..., K], one in each byte."""
    parts: Parts
    """The scales, and other tensors that the format needs. Most have one entry for each block."""
    format: Format

    @property
    def shape(self) -> torch.Size:
        """The shape of the values, [..., K]."""
        return self.codes.shape

    @property
    def scales(self) -> BlockScales:
        """The scales of a format with a uniform grid."""
        assert isinstance(self.parts, BlockScales)
        return self.parts

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed codes and of the parts of blocks and rows. Parts of the whole tensor are not counted."""
        columns = self.shape[-1]
        return round(self.codes.numel() // max(1, columns) * self.format.bits_in(columns) / 8)

    @property
    def is_finite(self) -> bool:
        """True if all values are finite in float32. A value near 3.4e38 may have been rounded to 2^128."""
        return self.format.grid.is_within_float32(self.parts) or bool(torch.isfinite(self.dequantize()).all())

    def packed(self) -> Tensor:
        """The codes packed into bytes, uint8 [..., K * bits / 8]."""
        return pack_codes(self.codes, self.format.bits)

    @staticmethod
    def dequantize_packed(packed: Tensor, parts: Parts, format: Format) -> Tensor:
        """The same as from_packed(...).dequantize() in float32, bit for bit."""
        return format.grid.decode_packed(packed, parts, format.block_in(packed.shape[-1] * 8 // format.bits))

    @staticmethod
    def from_packed(packed: Tensor, parts: Parts, format: Format) -> QTensor:
        """The tensor with these packed codes: the inverse of `packed`."""
        return QTensor(unpack_codes(packed, format.bits), parts, format)

    def split_rows(self, rows: list[int]) -> list[QTensor]:
        """Split a matrix [sum(rows), K] by these numbers of rows. Each piece keeps the parts of the whole tensor."""
        return [
            QTensor(codes, parts, self.format)
            for codes, parts in zip(self.codes.split(rows), self.parts.split_rows(rows), strict=True)
        ]

    @staticmethod
    def one_above_other(pieces: Sequence[QTensor]) -> QTensor:
        """Put matrices one above the other: the inverse of `split_rows`."""
        if len(pieces) == 1:
            return pieces[0]
        parts = Parts.one_above_other([piece.parts for piece in pieces])
        return QTensor(torch.cat([piece.codes for piece in pieces]), parts, pieces[0].format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., K], in `dtype`.

        They are computed in float64 if `dtype` is float64, otherwise in float32. If all scales are powers of two,
        float32 is exact, except for products outside its range.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        codes = self.codes.unflatten(-1, (-1, self.format.block_in(self.shape[-1])))
        return self.format.grid.decode(codes, self.parts, work).flatten(-2).to(dtype)
