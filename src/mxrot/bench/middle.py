"""The product from packed codes for rows between few and many, by one tile or by every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mxrot.formats import get_format
from mxrot.kernels.plain import PackedRows

FORMAT = get_format("mxfp4")
MIDDLE = "W4A4, packed, middle rows"
FEWEST, MOST = 17, 1024
"""Rows of inputs for which it is meant."""


def covers(rows: int, width: int, device: torch.device) -> bool:
    """Is it measured for so many rows of inputs of this width?"""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return is_hopper and FEWEST <= rows <= MOST and width % 128 == 0


def middle_products(
    x: Tensor,
    matrices: Tensor,
    weights: Sequence[PackedRows],
    exponents: Tensor,
    all_tiles: bool,
    told: Callable[[str], None],
) -> Iterator[tuple[str, list[Callable[[], Tensor]], float]]:
    """Name, one function for each weight, and bytes of a weight: quantizer and product by the default tile, then the
    product alone; with `all_tiles` also the product by each candidate that can be launched."""
    from mxrot.kernels.fused.middle import candidates, middle_product, processors_of
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    rule = FORMAT.rule()

    def quantized() -> Tensor:
        return rotate_quantize_e5m2(x, matrices, FORMAT, rule, are_across_blocks=True)

    def whole(w: PackedRows) -> Tensor:
        return middle_product(quantized(), w.codes, w.scales, exponents, torch.bfloat16)

    once = quantized()
    yield MIDDLE, [partial(whole, w) for w in weights], 17 / 32
    arguments = [(once, w.codes, w.scales, exponents, torch.bfloat16) for w in weights]
    yield f"{MIDDLE}, without the quantizer", [partial(middle_product, *each) for each in arguments], 17 / 32
    if not all_tiles:
        return
    rows, groups = weights[0].scales.shape
    for tile in candidates(len(x), rows, groups, processors_of(x.device)):
        try:
            middle_product(*arguments[0], tile)
        except Exception as failure:
            told(f"{MIDDLE}, {tile}: not launched: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        yield f"{MIDDLE}, {tile}", [partial(middle_product, *each, tile) for each in arguments], 17 / 32
