"""Input scales out of range for FP8 products: found while a site is quantized, and moved into the weights.

MXFP4 inputs enter FP8 products as E5M2, which allows scales from 2^-15 to 2^13 (`kernels.plain.E5M2_EXPONENTS`). A
power of two can move from the matrices of the last stage to the weights. It shifts all scales of a site and changes no
product: T / 2^s and W T^-T 2^s are exact, so no warning is needed. A site without such a stage gets a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mxrot.errors import MxrotWarning
from mxrot.formats import TensorQuantizer
from mxrot.formats.exponents import E8M0_BIAS
from mxrot.kernels.plain import E5M2_EXPONENTS
from mxrot.scheme import SiteScheme
from mxrot.transforms import SiteTransform
from mxrot.transforms.stages import BlockDiagonal

LEAST_WEIGHT, MOST_WEIGHT = 2.0**-100, 2.0**120
"""The bounds of the largest weight of a site: E8M0 goes from 2^-127 to 2^127, and other weights are smaller."""


def within_e5m2(
    transform: SiteTransform | None, x: Tensor, scheme: SiteScheme, name: str, weights: Callable[[], Tensor]
) -> SiteTransform | None:
    """The transform, divided by a power of two if inputs `x` [tokens, K] of the site `name` have scales beyond E5M2.

    A MxrotWarning is given if some stay outside. It waits for the device. `weights` returns the weights [N, K] that
    will be folded. Only MXFP4 weights with MXFP4 inputs are affected: other products do not use E5M2.
    """
    inputs = scheme.activations
    if inputs is None or not (inputs.is_mxfp4 and scheme.weights.is_mxfp4) or not x.numel():
        return transform
    lowest, highest = exponents_of(x if transform is None else transform.apply(x), inputs)
    least, most = E5M2_EXPONENTS
    if least <= lowest and highest <= most:
        return transform
    found = f"{name}: scales of its inputs go from 2^{lowest} to 2^{highest}, and FP8 inputs have 2^{least} to 2^{most}"
    last = None if transform is None else transform.stages[-1]
    if transform is None or not isinstance(last, BlockDiagonal):
        _warn(f"{found}; FP8 products cut off or round those beyond; give this site a block transform")
        return transform
    shift = shift_for(lowest, highest)
    if not LEAST_WEIGHT < float(transform.fold(weights()).abs().max()) * 2.0**shift < MOST_WEIGHT:
        _warn(f"{found}; moved into the weights they would be beyond what scales hold there: check the model's weights")
        return transform
    if highest - lowest > most - least:
        _warn(
            f"{found}; its transform is divided by 2^{shift} and its weights are multiplied with it, and scales below "
            f"2^{least + shift} are still rounded"
        )
    moved = replace(last, matrices=last.matrices * 2.0**-shift)
    return SiteTransform((*transform.stages[:-1], moved))


def exponents_of(transformed: Tensor, quantizer: TensorQuantizer) -> tuple[int, int]:
    """The least and the largest exponent of scales of nonzero blocks of [tokens, K]; (0, 0) if all blocks are zero."""
    blocks = transformed.unflatten(-1, (-1, quantizer.format.block_in(transformed.shape[-1])))
    stored = quantizer.format.uniform.choose(blocks, quantizer.rule).stored.to(torch.int32)
    counted = stored[(blocks != 0).any(dim=-1) & (stored != 255)] - E8M0_BIAS
    if not counted.numel():
        return 0, 0
    low, high = torch.aminmax(counted)
    return int(low), int(high)


def shift_for(lowest: int, highest: int) -> int:
    """The s for which scales from 2^lowest to 2^highest, divided by 2^s, fit E5M2: 0 if they fit, else the middle one.

    If they span more than E5M2, s brings the largest scale just inside: clipping costs more than rounding.
    """
    least, most = E5M2_EXPONENTS
    from_, to = highest - most, lowest - least
    if from_ <= 0 <= to:
        return 0
    return from_ if from_ > to else (from_ + to) // 2


def _warn(message: str) -> None:
    warnings.warn(message, MxrotWarning, stacklevel=3)
