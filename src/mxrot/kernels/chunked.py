"""Linears on a CPU: a few rows at a time, so that intermediate results stay in the cache.

In a chain of operations on the whole tensor, each step reads and writes memory. Here only the first step reads from
memory, and only the last writes to it. The bits of quantized activations are those of `plain_rotate_quantize`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.formats import BlockScales, Format, QTensor, ScaleRule, get_format
from mxrot.formats.element import FloatElement, powers_of_two

CHUNK_ELEMENTS = 2**19
WEIGHT_CHUNK = 2**20
_EXPONENT_BITS = 0x7F800000


def rotate_quantize_in_chunks(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    """Q(x T) in float32, in the shape of `x` [..., K]. `matrices` are [1 | G, B, B], or None.

    For a FloatElement under a rule with `raises_from`. Blocks have the size of the matrices.
    """
    element = format.element
    assert isinstance(element, FloatElement) and rule.raises_from is not None
    flat = x.reshape(-1, x.shape[-1])
    block = format.block_in(flat.shape[1])
    groups = flat.shape[1] // block
    out = torch.empty(flat.shape, dtype=torch.float32, device=x.device)
    rows = max(1, CHUNK_ELEMENTS // max(1, flat.shape[1]))
    per_group = None if matrices is None or len(matrices) == 1 else matrices.to(torch.float32)
    shared = None if matrices is None or per_group is not None else matrices[0].to(torch.float32)
    raises_from = rule.raises_from(element)
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows].to(torch.float32).unflatten(1, (groups, block))
        if per_group is not None:
            # Blocks first: the product has this order, and the last step restores the order of rows.
            part = torch.bmm(part.transpose(0, 1), per_group)
        elif shared is not None:
            part = (part.reshape(-1, block) @ shared).view(part.shape)
        target = out[start : start + rows].unflatten(1, (groups, block))
        target = target if per_group is None else target.transpose(0, 1)
        _quantize(part, element, raises_from, target)
    return out.view(x.shape)


def _quantize(values: Tensor, element: FloatElement, raises_from: int, out: Tensor) -> None:
    """Quantize blocks [..., B] of float32, each with its own scale, and write them to `out`."""
    magnitude = values.abs()
    top = magnitude.view(torch.int32).amax(dim=-1, keepdim=True)  # as integers, NaN is the largest
    exponents = (top >> 23) - (127 + element.max_exponent) + ((top & 0x7FFFFF) >= raises_from)
    exponents = exponents.clamp_(-127, 127)
    magnitude.mul_(powers_of_two(-exponents)).clamp_(max=element.max)
    # Adding 2^23 grid steps rounds to the grid, ties to even.
    power = magnitude.clamp(min=2.0**element.min_exponent)
    power.view(torch.int32).bitwise_and_(_EXPONENT_BITS).add_((23 - element.fraction_bits) << 23)
    scales = torch.where(top < _EXPONENT_BITS, powers_of_two(exponents), torch.nan)
    torch.copysign(magnitude.add_(power).sub_(power).mul_(scales), values, out=out)


def packed_product_in_chunks(inputs: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """inputs [..., K] @ W^T in float32, for packed MXFP4 weights [N, K]. A few rows at a time are dequantized."""
    format = get_format("mxfp4")
    rows, width = len(codes), inputs.shape[-1]
    step = max(1, WEIGHT_CHUNK // width)
    flat = inputs.float().reshape(-1, width)
    if step >= rows:
        values = QTensor.dequantize_packed(codes, BlockScales(scales, format.scale), format)
        return torch.nn.functional.linear(flat, values).view(*inputs.shape[:-1], rows)
    out = torch.empty(len(flat), rows, dtype=torch.float32)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = QTensor.dequantize_packed(codes[part], BlockScales(scales[part], format.scale), format)
        out[:, part] = torch.nn.functional.linear(flat, values)
    return out.view(*inputs.shape[:-1], rows)
