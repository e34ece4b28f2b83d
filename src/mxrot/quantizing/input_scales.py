"""Scales of inputs that FP8 products do not hold: found while a site is quantized, and moved into the weights.

MXFP4 inputs go into FP8 products as E5M2, which has scales from 2^-15 to 2^13 (`kernels.plain.E5M2_EXPONENTS`). A power
of two taken from the matrices of the last stage, and so given to the weights, moves all scales of a site and changes no
product: T / 2^s and W T^-T 2^s are exact, and nothing is said of it. What a site without such a stage has is told.
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
"""Between these the largest weight of a site has to stay: E8M0 goes from 2^-127 to 2^127, other weights are less."""


def within_e5m2(
    transform: SiteTransform | None, x: Tensor, scheme: SiteScheme, name: str, weights: Callable[[], Tensor]
) -> SiteTransform | None:
    """The transform, over a power of two where inputs `x` [tokens, K] of the site `name` have scales that E5M2 does not
    hold. Where some stay outside a MxrotWarning says so. Waits for the device.

    `weights` gives those [N, K] that will be folded against it. Only where weights and inputs are MXFP4: other products
    do not go through E5M2.
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
    """The least and the largest exponent of scales of blocks of [tokens, K] that are not zero; (0, 0) if all are."""
    blocks = transformed.unflatten(-1, (-1, quantizer.format.block_in(transformed.shape[-1])))
    stored = quantizer.format.uniform.choose(blocks, quantizer.rule).stored.to(torch.int32)
    counted = stored[(blocks != 0).any(dim=-1) & (stored != 255)] - E8M0_BIAS
    if not counted.numel():
        return 0, 0
    low, high = torch.aminmax(counted)
    return int(low), int(high)


def shift_for(lowest: int, highest: int) -> int:
    """The s by which scales from 2^lowest to 2^highest, over 2^s, are E5M2's: 0 where they are, else the middle one.

    Where they span more than E5M2 does, the one that has the largest scale just inside: what is cut off costs more
    than what is rounded.
    """
    least, most = E5M2_EXPONENTS
    from_, to = highest - most, lowest - least
    if from_ <= 0 <= to:
        return 0
    return from_ if from_ > to else (from_ + to) // 2


def _warn(message: str) -> None:
    warnings.warn(message, MxrotWarning, stacklevel=3)
