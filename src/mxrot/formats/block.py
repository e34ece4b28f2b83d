"""Quantize a tensor block by block.

`quantize` returns codes and scales, and refuses NaN and Inf. `fake_quantize` returns what those codes and
scales stand for, bit for bit, without making them; it is what a forward pass uses, so it reads no value back
to the host, and a block that holds NaN or Inf comes out as NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats.catalog import Format
from mxrot.formats.qtensor import QTensor
from mxrot.formats.scale import BlockScales, ScaleRule


def quantize(x: Tensor, format: Format, rule: ScaleRule | None = None, name: str = "tensor") -> QTensor:
    """Codes and scales of floating-point `x` [..., K], rounded once from the value it holds.

    float64 is scaled and rounded in float64, all other types in float32 (which holds them exactly).
    Raises ConfigError if K is not a multiple of the block, NumericsError (with `name`) on NaN or Inf.
    """
    if not torch.isfinite(x).all():
        raise NumericsError(
            f"{name}: holds NaN or Inf and cannot be quantized; check the model's weights and data type"
        )
    blocks = as_blocks(x, format, name)
    scales = choose_scales(blocks, format, rule)
    if not torch.isfinite(scales.values()).all():
        raise NumericsError(
            f"{name}: a block scale overflows {scales.type.name}; the largest |x| is {x.abs().max():.3g}"
        )
    return encode_blocks(blocks, scales, format)


def choose_scales(blocks: Tensor, format: Format, rule: ScaleRule | None = None) -> BlockScales:
    """Scales [..., G] of float32/float64 `blocks` [..., G, B]; ConfigError if `format` has no such rule."""
    rule = rule or format.rule()
    format.rule(rule.name)  # another format's rule would store scales that this one reads as something else
    return rule.choose(blocks, format.element, format.scale)


def encode_blocks(blocks: Tensor, scales: BlockScales, format: Format) -> QTensor:
    """Codes of finite float32/float64 `blocks` [..., G, B] under given scales [..., G]."""
    codes = format.element.encode(_scaled(blocks, scales))
    return QTensor(codes.flatten(-2), scales, format)


def fake_quantize(x: Tensor, format: Format, rule: ScaleRule | None = None) -> Tensor:
    """quantize(x).dequantize(), float32 (float64 for float64 input), same shape."""
    blocks = as_blocks(x, format, "tensor")
    scales = choose_scales(blocks, format, rule)
    return round_blocks(blocks, scales, format).flatten(-2)


def round_blocks(blocks: Tensor, scales: BlockScales, format: Format) -> Tensor:
    """Values of float32/float64 `blocks` [..., G, B] rounded under given scales [..., G]; same shape and dtype."""
    rounded = format.element.round(_scaled(blocks, scales))
    if scales.zero_points is not None:
        rounded = rounded - scales.zero_points.to(blocks.dtype)[..., None]
    return rounded * scales.values(blocks.dtype)[..., None]


def as_blocks(x: Tensor, format: Format, name: str) -> Tensor:
    """`x` [..., K] as float32 (float64 stays) blocks [..., K / B, B]; ConfigError if B does not divide K."""
    if x.shape[-1] % format.block:
        raise ConfigError(
            f"{name}: last dimension {x.shape[-1]} is not a multiple of the block size {format.block} of {format.name}"
        )
    work = x if x.dtype == torch.float64 else x.to(torch.float32)
    return work.unflatten(-1, (x.shape[-1] // format.block, format.block))


def _scaled(blocks: Tensor, scales: BlockScales) -> Tensor:
    """blocks / scale + zero point; 0 where the scale has underflowed to 0."""
    values = scales.values(blocks.dtype)[..., None]
    if scales.zero_points is None and scales.type.dtype == torch.uint8:
        return blocks / values
    scaled = torch.where(values == 0, torch.zeros((), dtype=blocks.dtype, device=blocks.device), blocks / values)
    return scaled if scales.zero_points is None else scaled + scales.zero_points.to(blocks.dtype)[..., None]
