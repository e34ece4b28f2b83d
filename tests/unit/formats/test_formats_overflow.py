"""Which quantized tensors hold a value that float32 does not."""

from __future__ import annotations

import pytest
import torch

from mxrot.formats import get_format, get_rule, quantize


@pytest.mark.parametrize(
    ("format", "rule", "largest", "is_finite"),
    [
        ("mxfp4", "even", 2.9e38, True),
        ("mxfp4", "even", 3.0e38, False),
        ("mxfp4", "floor", 3.4e38, True),
        ("mxfp4", "rceil", 3.4e38, False),
        ("mxfp4", "even", 1e39, False),  # beyond float32, and its scale saturates at 2^127
        ("mxfp8_e5m2", "even", 3.4e38, False),
        ("mxfp8_e5m2", "floor", 3.4e38, True),
        ("mxint8", "floor", 3.4e38, True),
        ("nvfp4", "absmax", 3.4e38, True),
    ],
)
def test_near_the_end_of_float32(format: str, rule: str, largest: float, is_finite: bool) -> None:
    """2^128 lies beyond it; E2M1 has no number between 1.5 and 2, so that 1.75 x 2^127 = 2.98e38 is the limit."""
    kind = get_format(format)
    weight = torch.zeros(2, kind.block, dtype=torch.float64)
    weight[1, 3] = -largest
    found = quantize(weight, kind, get_rule(rule), "w")
    assert found.is_finite == is_finite == bool(torch.isfinite(found.dequantize()).all())


def test_nothing_is_finite() -> None:
    kind = get_format("mxfp4")
    assert quantize(torch.zeros(0, 32), kind, get_rule("even"), "w").is_finite
