"""The product from packed codes for middle numbers of rows, by one tile or by every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from mxrot.formats import get_format
from mxrot.kernels.crossovers import MOST_MIDDLE_ROWS
from mxrot.kernels.plain import PackedRows

FORMAT = get_format("mxfp4")
MIDDLE = "W4A4, packed, middle rows"
ALONE = ", without the quantizer"
EARLY = ", launched before the quantizer waits"
MOST_EARLY_ROWS = 64
"""The most rows for which that is measured: tiles for more rows leave no room for another kernel."""
FEWEST_FOR_TRITON = 16
"""The fewest rows: Triton's tiles have at least 16 rows of inputs, and win above that."""
TRITON = f"{MIDDLE}, Triton"


def covers(rows: int, width: int, device: torch.device) -> bool:
    """True if it is measured for this number of input rows of this width."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return is_hopper and rows <= MOST_MIDDLE_ROWS and width % 128 == 0


def middle_products(
    x: Tensor,
    matrices: Tensor,
    weights: Sequence[PackedRows],
    exponents: Tensor,
    all_tiles: bool,
    told: Callable[[str], None],
) -> Iterator[tuple[str, list[Callable[[], Tensor]], float]]:
    """The name, one function per weight, and the bytes of a weight: quantizer and product by the chosen tile, then the
    product alone. With `all_tiles` the same by each candidate that can be launched, here and in Triton."""
    from mxrot.kernels.cuda import middle as cuda
    from mxrot.kernels.fused import middle as fused
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    rule = FORMAT.rule()
    product: Callable[..., Tensor] = cuda.middle_product if cuda.is_there(x.device) else fused.middle_product

    def quantized(at_once: bool = False) -> Tensor:
        return rotate_quantize_e5m2(x, matrices, FORMAT, rule, are_across_blocks=True, allows_next_at_once=at_once)

    def whole(way: Callable[..., Tensor], w: PackedRows, at_once: bool = False) -> Tensor:
        return way(quantized(at_once), w.codes, w.scales, exponents, torch.bfloat16)

    once = quantized()
    arguments = [(once, w.codes, w.scales, exponents, torch.bfloat16) for w in weights]

    def measured(name: str, way: Callable[..., Tensor]) -> Iterator[tuple[str, list[Callable[[], Tensor]], float]]:
        yield name, [partial(whole, way, w) for w in weights], 17 / 32
        yield f"{name}{ALONE}", [partial(way, *each) for each in arguments], 17 / 32

    yield from measured(MIDDLE, product)
    if not all_tiles:
        return
    rows, groups = weights[0].scales.shape
    ways: list[tuple[str, Callable[..., Tensor]]] = []
    if cuda.is_there(x.device):
        ways += [(f"{MIDDLE}, {tile}", partial(cuda.middle_product, tile=tile)) for tile in cuda.candidates(len(x))]
    if len(x) > FEWEST_FOR_TRITON:
        tiles = fused.candidates(len(x), rows, groups, fused.processors_of(x.device))
        ways += [(f"{TRITON} {tile}", partial(fused.middle_product, tile=tile)) for tile in tiles]
    for name, way in ways:
        try:
            way(*arguments[0])
        except Exception as failure:
            told(f"{name}: not launched: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        yield from measured(name, way)
        if len(x) <= MOST_EARLY_ROWS:
            yield f"{name}{EARLY}", [partial(whole, way, w, at_once=True) for w in weights], 17 / 32
