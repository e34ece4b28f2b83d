"""A grid with two scales per block: one for the elements above 0, one for all others.

AMXFP4 (arXiv 2411.09909) is such a grid, with E2M1 elements and E5M2 scales. Blocks of inputs are skewed, each in its
own way. Under a single scale, the side with the smaller range can use only the small codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.element import FloatElement, look_up_pairs
from mxrot.formats.grid import Grid
from mxrot.formats.parts import NamedParts, Parts, PartSpec
from mxrot.formats.scale import ScaleRule

ABOVE, OTHERS = "scale", "negative_scale"


@dataclass(frozen=True)
class BySign(Grid):
    """Two small-float scales: max(x, 0) / max element for values above 0, -min(x, 0) / max element for all others.

    Scales and elements are rounded half away from zero. A scale is at least the smallest positive number of its type. A
    sign that does not occur has that scale, which then scales nothing: a block of zeros has code 0 and the smallest
    scales. A scale beyond the largest number of the type is Inf. `quantize` refuses it, and rounding turns the values
    under it into NaN.
    """

    element: FloatElement
    scale: FloatElement

    @property
    def bits(self) -> int:
        return self.element.bits

    def parts(self, rule: ScaleRule) -> tuple[PartSpec, ...]:
        return tuple(PartSpec(name, torch.float8_e5m2, self.scale.bits) for name in (ABOVE, OTHERS))

    def choose(self, blocks: Tensor, rule: ScaleRule) -> NamedParts:
        low, high = rule.cut(blocks.amin(dim=-1)), rule.cut(blocks.amax(dim=-1))
        poison = (low - low) + (high - high)  # NaN if the block holds NaN or Inf
        ends = {ABOVE: high, OTHERS: -low}
        return NamedParts({name: self._stored(end / self.element.max + poison) for name, end in ends.items()})

    def _stored(self, scales: Tensor) -> Tensor:
        """Float32/float64 scales as E5M2. Negative ones, whose sign does not occur, become the smallest scale."""
        scales = scales.clamp(min=self.scale.values[1])
        rounded = self.scale.round_half_away(scales)
        beyond = (self.scale.max + 2.0 ** (self.scale.max_exponent + 1)) / 2
        return torch.where(scales < beyond, rounded, scales / 0).to(torch.float8_e5m2)

    def round(self, blocks: Tensor, parts: Parts) -> Tensor:
        scales = _scales_of(blocks > 0, parts, blocks.dtype)
        return self.element.round_half_away(blocks / scales).mul_(scales)

    def encode(self, blocks: Tensor, parts: Parts) -> Tensor:
        scaled = blocks / _scales_of(blocks > 0, parts, blocks.dtype)
        return self.element.encode(self.element.round_half_away(scaled))

    def decode(self, codes: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
        values = self.element.decode(codes, dtype)
        return values * _scales_of(values > 0, parts, dtype)

    def decode_packed(self, packed: Tensor, parts: Parts, block: int) -> Tensor:
        """4-bit codes are looked up two at a time."""
        if self.bits != 4:
            return super().decode_packed(packed, parts, block)
        values = look_up_pairs(self.element.value_pairs, packed).unflatten(-1, (-1, block))
        return (values * _scales_of(values > 0, parts, torch.float32)).flatten(-2)

    def is_within_float32(self, parts: Parts) -> bool:
        return self.not_finite(parts) is None

    def is_exact_in_bfloat16(self, rule: ScaleRule) -> bool:
        return self.element.mantissa_bits + self.scale.mantissa_bits + 2 <= 8  # all bits of a product


def _scales_of(is_above: Tensor, parts: Parts, dtype: torch.dtype) -> Tensor:
    above, others = (parts.tensors[name].to(dtype)[..., None] for name in (ABOVE, OTHERS))
    return torch.where(is_above, above, others)
