"""The stored block scales of a uniform grid, with the tensor scale and zero points that belong to them.

In most formats the scale is an E8M0 byte b that stands for 2^(b - 127) (OCP Microscaling v1.0, section 5.4.1). Byte 255
would be NaN and is never written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.element import look_up
from mxrot.formats.exponents import E8M0_BIAS
from mxrot.formats.parts import Parts

_E8M0_VALUES = (*(2.0 ** (byte - E8M0_BIAS) for byte in range(255)), math.nan)


@dataclass(frozen=True)
class ScaleType:
    """How the scale of one block is stored."""

    name: str
    bits: int
    dtype: torch.dtype


E8M0 = ScaleType("e8m0", 8, torch.uint8)
E4M3_SCALE = ScaleType("e4m3", 8, torch.float8_e4m3fn)
"""NVFP4: one E4M3 number per block, relative to one float32 per tensor."""
FP16_SCALE = ScaleType("fp16", 16, torch.float16)
LOG256_LEVELS = ScaleType("log256", 8, torch.float32)
"""256 levels of log2(scale). The float32 value of the level is stored."""


@dataclass(frozen=True)
class BlockScales(Parts):
    """The parts of a uniform grid: the stored scales of a tensor's blocks."""

    stored: Tensor
    """[..., G], in the dtype of the scale type."""
    type: ScaleType
    tensor_scale: Tensor | None = None
    """float32, a scalar or one per row [..., 1], multiplied with the block scales. None means 1."""
    zero_points: Tensor | None = None
    """uint8 [..., G], the codes that stand for 0. None if the element is signed."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        named = {"scale": self.stored, "tensor_scale": self.tensor_scale, "zero_point": self.zero_points}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def with_tensors(self, tensors: dict[str, Tensor]) -> BlockScales:
        return BlockScales(tensors["scale"], self.type, tensors.get("tensor_scale"), tensors.get("zero_point"))

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The scale of each block as a number, [..., G] in float32 or float64."""
        is_byte = self.type == E8M0
        values = look_up(_E8M0_VALUES, self.stored, dtype) if is_byte else self.stored.to(dtype)
        return values if self.tensor_scale is None else values * self.tensor_scale.to(dtype)
