"""Inputs in 16 or 32 bits times a weight in codes: the specification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import BlockScales, Format, QTensor

BLOCK = 32
"""Elements that share a power-of-two scale."""
WRITTEN_OUT = 2**24
"""Weights that are dequantized at one time. A head has a thousand times as many as fit beside a model."""


@dataclass(frozen=True)
class CodedWeight:
    """A weight [N, K] in a format with power-of-two block scales."""

    codes: Tensor
    """Packed, uint8 [N, K * bits / 8]."""
    scales: Tensor
    """E8M0 bytes, uint8 [N, K / 32]."""
    format: Format

    def rows(self, start: int, end: int) -> CodedWeight:
        """Rows `start` to `end` of it."""
        return CodedWeight(self.codes[start:end], self.scales[start:end], self.format)

    def dequantized(self) -> Tensor:
        """W_q in float32, [N, K]."""
        return QTensor.dequantize_packed(self.codes, BlockScales(self.scales, self.format.scale), self.format)


def plain_coded_product(
    x: Tensor, weight: CodedWeight, multiply: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Tensor:
    """x [..., K] W_q^T in float32, [..., N]: exact products of the numbers in `x` and the codes, with sums in float32.

    Rows of the weight are dequantized a part at a time. `multiply` gives inputs times rows of weights in float32. By
    default it uses float32 arithmetic.
    """
    count, width = len(weight.codes), x.shape[-1]
    step = max(1, WRITTEN_OUT // max(1, width))
    found = torch.empty(*x.shape[:-1], count, dtype=torch.float32, device=x.device)
    for start in range(0, count, step):
        values = weight.rows(start, start + step).dequantized()
        if multiply is None:
            found[..., start : start + step] = torch.nn.functional.linear(x.float(), values)
        else:
            found[..., start : start + step] = multiply(x, values)
    return found
