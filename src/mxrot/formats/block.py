"""Quantize a tensor block by block.

`quantize` returns codes and their parts (scales, zero points, ...). It refuses NaN and Inf. `fake_quantize` returns the
values of those codes, bit for bit, without making the codes. A forward pass uses it, so it reads no value back to the
host. A block that holds NaN or Inf becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats.catalog import Format
from mxrot.formats.parts import Parts
from mxrot.formats.qtensor import QTensor
from mxrot.formats.scale import ScaleRule

ENCODED_ELEMENTS = 1 << 24
"""The number of elements encoded at once. Each takes about fifty bytes while it is encoded (formats/element.py)."""


def quantize(x: Tensor, format: Format, rule: ScaleRule | None = None, name: str = "tensor") -> QTensor:
    """The codes and parts of floating-point `x` [..., K], rounded once from its exact values.

    float64 is scaled and rounded in float64, all other types in float32 (which holds them exactly).
    Raises ConfigError if K is not a multiple of the block size, NumericsError (with `name`) on NaN or Inf.
    """
    check_finite(x, name)
    blocks = as_blocks(x, format, name)
    parts = choose_parts(blocks, format, rule)
    check_parts(parts, format, x, name)
    return encode_blocks(blocks, parts, format)


def choose_parts(blocks: Tensor, format: Format, rule: ScaleRule | None = None) -> Parts:
    """The parts of float32/float64 `blocks` [..., G, B]. ConfigError if `format` has no such rule."""
    rule = rule or format.rule()
    format.rule(rule.name)  # the scales of another format's rule would mean something else in this format
    return format.grid.choose(blocks, rule)


def encode_blocks(blocks: Tensor, parts: Parts, format: Format) -> QTensor:
    """The codes of finite float32/float64 `blocks` [..., G, B] under the given parts."""
    rows = max(1, ENCODED_ELEMENTS // max(1, blocks[..., :1, :, :].numel())) if blocks.dim() == 3 else 0
    if not 0 < rows < len(blocks):
        return QTensor(format.grid.encode(blocks, parts).flatten(-2), parts, format)
    pieces = blocks.split(rows)
    each = parts.split_rows([len(piece) for piece in pieces])
    codes = [format.grid.encode(piece, own).flatten(-2) for piece, own in zip(pieces, each, strict=True)]
    return QTensor(torch.cat(codes), parts, format)


def fake_quantize(x: Tensor, format: Format, rule: ScaleRule | None = None) -> Tensor:
    """The same as quantize(x).dequantize(): float32 (float64 for float64 input), same shape."""
    blocks = as_blocks(x, format, "tensor")
    return round_blocks(blocks, choose_parts(blocks, format, rule), format).flatten(-2)


def round_blocks(blocks: Tensor, parts: Parts, format: Format) -> Tensor:
    """The values of float32/float64 `blocks` [..., G, B], rounded under the given parts; same shape and dtype."""
    return format.grid.round(blocks, parts)


def as_blocks(x: Tensor, format: Format, name: str) -> Tensor:
    """`x` [..., K] as blocks [..., K / B, B] in float32 (float64 stays). ConfigError if K is not a multiple of B."""
    columns = x.shape[-1]
    block = format.block_in(columns)
    if columns % block:
        raise ConfigError(
            f"{name}: last dimension {columns} is not a multiple of the block size {block} of {format.name}"
        )
    work = x if x.dtype == torch.float64 else x.to(torch.float32)
    return work.unflatten(-1, (columns // block, block))


def check_finite(x: Tensor, name: str) -> None:
    """Raise NumericsError, with `name`, if `x` holds NaN or Inf."""
    if not torch.isfinite(x).all():
        raise NumericsError(
            f"{name}: holds NaN or Inf and cannot be quantized; check the model's weights and data type"
        )


def check_parts(parts: Parts, format: Format, x: Tensor, name: str) -> None:
    """Raise NumericsError, with `name`, if a part chosen for `x` overflows its type."""
    overflowed = format.grid.not_finite(parts)
    if overflowed is not None:
        raise NumericsError(f"{name}: a block scale overflows {overflowed}; the largest |x| is {x.abs().max():.3g}")
