"""Round to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats import Format, ScaleRule, quantize
from mxrot.rounding.base import Prepared, Rounded, RoundingMethod


@dataclass(frozen=True)
class RoundToNearest(RoundingMethod):
    """Rounds each weight by itself."""

    name = "rtn"

    def round_rows(
        self, weight: Tensor, format: Format, rule: ScaleRule, prepared: Prepared, name: str, move: Tensor | None = None
    ) -> Rounded:
        quantized = quantize(weight, format, rule, name)
        return Rounded(quantized, weight.double() - quantized.dequantize(torch.float64))
