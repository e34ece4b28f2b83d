"""Counts of input scales beyond the range of the E5M2 inputs of FP8 products. They are counted only on request.

Set the environment variable MXROT_COUNT_SCALES to 1 before mxrot is imported. The counts are stored and added on the
device, under CUDA graphs too. One line on standard error reports them when the process ends. Each product then
quantizes its inputs twice. Without the variable nothing is computed, and the variable is not read again.
"""

from __future__ import annotations

import atexit
import os
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.formats.exponents import E8M0_BIAS
from mxrot.kernels.plain.activations import E5M2_EXPONENTS, PackedRows

VARIABLE = "MXROT_COUNT_SCALES"
IS_COUNTING = os.environ.get(VARIABLE, "0") not in ("", "0")
_totals: dict[torch.device, Tensor] = {}


@dataclass(frozen=True)
class ScaleCounts:
    """Counts of input blocks of FP8 products, without blocks that are zero or hold NaN."""

    blocks: int
    above: int
    """Blocks with a scale above 2^13. The scale is lowered to 2^13, and the block is clipped."""
    below: int
    """Blocks with a scale below 2^-15. The scale is raised to 2^-15, so that small values are rounded away."""

    def __str__(self) -> str:
        least, most = E5M2_EXPONENTS
        return (
            f"of {self.blocks} blocks of inputs of FP8 products {self.above} had a scale above 2^{most} and were cut "
            f"off, {self.below} one below 2^{least} and were rounded to coarser steps"
        )


def outside(packed: PackedRows) -> Tensor:
    """The numbers of blocks, of those above and of those below, int64 [3], for MXFP4 inputs with scales row by row."""
    has_value = (packed.codes.unflatten(-1, (-1, 16)) & 0x77).amax(dim=-1) > 0
    counted = has_value & (packed.scales != 255)
    exponents = packed.scales.to(torch.int32) - E8M0_BIAS
    least, most = E5M2_EXPONENTS
    return torch.stack([kind.sum() for kind in (counted, counted & (exponents > most), counted & (exponents < least))])


def add(packed: PackedRows) -> None:
    """Add the blocks of `packed` to the counts."""
    device = packed.codes.device
    if device not in _totals:
        _totals[device] = torch.zeros(3, dtype=torch.int64, device=device)
    _totals[device] += outside(packed)


def counted_scales() -> ScaleCounts:
    """The counts so far, on all devices. Synchronizes with them."""
    sums = [total.tolist() for total in _totals.values()]
    return ScaleCounts(*(sum(row[place] for row in sums) for place in range(3)))


def forget_counts() -> None:
    """Reset the counts to zero."""
    for total in _totals.values():
        total.zero_()


def _tell() -> None:
    print(f"mxrot: {VARIABLE}: {counted_scales()}", file=sys.stderr, flush=True)


if IS_COUNTING:
    atexit.register(_tell)
