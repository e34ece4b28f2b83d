"""Scales of inputs that E5M2 does not hold are counted where that is asked for, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tests.unit.kernels.test_linear import inputs_of, linear

from mxrot.formats import get_format
from mxrot.kernels import linear as ways
from mxrot.kernels import scale_counts
from mxrot.kernels.plain import plain_rotate_quantize_packed
from mxrot.kernels.scale_counts import ScaleCounts, counted_scales, forget_counts, outside
from mxrot.layers import prepare_site

FORMAT = get_format("mxfp4")


def test_every_scale_is_above_below_or_inside() -> None:
    """Exhaustive: blocks with all scales from 2^-120 to 2^120, one of zeros, one with NaN."""
    exponents = torch.arange(-120, 121)
    x = torch.zeros(len(exponents) + 2, 32)
    x[:-2, 5] = 4 * torch.exp2(exponents.double()).float()
    x[-1, 0] = float("nan")
    packed = plain_rotate_quantize_packed(x, None, FORMAT, FORMAT.rule())
    above, below = int((exponents > 13).sum()), int((exponents < -15).sum())
    assert outside(packed).tolist() == [len(exponents), above, below]


def test_products_count_when_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    module = linear(0)
    prepare_site((module,))
    x = torch.zeros(2, 96, device=module.weight_packed.device)
    x[0, 0], x[1, 40], x[1, 70] = 2.0**20, 2.0**-30, 1.0
    inputs, weight = inputs_of(module, x), module.site_weight().packed()
    monkeypatch.setattr(scale_counts, "_totals", {})
    ways.by_matrix_units(inputs, weight)
    assert counted_scales() == ScaleCounts(0, 0, 0)
    monkeypatch.setattr(scale_counts, "IS_COUNTING", True)
    for times in (1, 2):
        ways.by_matrix_units(inputs, weight)
        assert counted_scales() == ScaleCounts(3 * times, times, times)
    forget_counts()
    assert counted_scales() == ScaleCounts(0, 0, 0)


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_the_variable_asks_and_the_end_tells(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scale_counts.VARIABLE, value)
    run = subprocess.run(
        [sys.executable, "-c", "import mxrot.kernels.linear"], check=True, timeout=120, capture_output=True, text=True
    )
    told = [line for line in run.stderr.splitlines() if line.startswith(f"mxrot: {scale_counts.VARIABLE}: of 0 blocks")]
    assert len(told) == (value == "1")
