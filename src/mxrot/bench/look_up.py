"""The product of a few rows of integers with looked-up 2-bit weights, beside the bfloat16 product.

Scales are powers of two here, so that no float32 sum is rounded. In any order of its sums, a kernel must give the same
bits as its plain twin. A kernel that does not has no speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxrot.bench.kernels import BASELINE, LLAMA_3_8B, KernelRow
from mxrot.bench.timing import copies_for, seconds_of_each
from mxrot.formats import TensorQuantizer
from mxrot.kernels import Inputs, LookUpWeight, choose_look_up
from mxrot.kernels.plain import IntegerRows, in_planes, looked_up, plain_look_up_product, plain_quantize_rows

LOOK_UP_COUNTS = (1, 2, 4, 8)
"""The numbers of input rows."""
GROUP = 128
INPUTS = TensorQuantizer.named("int4_row absmax clip 0.9")
LOOKED_UP = "W2A4, looked up"
TYPE = torch.bfloat16
"""The type of inputs and outputs, and of the weights of the other product."""
BITS = 2 + (16 + 4 * 8) / GROUP


def bench_look_up(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = LLAMA_3_8B,
    counts: Sequence[int] = LOOK_UP_COUNTS,
    told: Callable[[str], None] = lambda line: None,
) -> list[KernelRow]:
    """Measure all shapes (N, K) with these numbers of input rows. `told` receives each result."""
    found = []
    for height, width in shapes:
        for row in _products(device, height, width, counts):
            found.append(row)
            told(f"{row.kernel:44s} {row.shape!s:22s} {row.seconds or 'CHECK FAILED'}")
    return found


def random_weight(height: int, width: int, device: torch.device) -> LookUpWeight:
    """A weight with random codes, ascending levels, and scales from 2^-10 to 2^-7."""
    groups = width // GROUP
    packed = torch.randint(0, 256, (height, width // 4), dtype=torch.uint8, device=device)
    scales = torch.exp2(-torch.randint(7, 11, (height, groups), device=device).float()).half()
    levels = torch.randint(-127, 128, (height, groups, 4), dtype=torch.int8, device=device).sort(dim=-1).values
    return LookUpWeight(packed, scales, levels.contiguous())


def _products(device: torch.device, height: int, width: int, counts: Sequence[int]) -> Iterator[KernelRow]:
    weight = random_weight(height, width, device)
    numbers = (looked_up(weight.packed, weight.levels) * weight.scales[..., None]).flatten(1).to(TYPE)
    dense = [numbers.clone() for _ in range(copies_for(numbers.nbytes))]
    few = [
        LookUpWeight(weight.packed.clone(), weight.scales.clone(), weight.levels.clone())
        for _ in range(copies_for(BITS / 8 * height * width))
    ]
    for count in counts:
        x = torch.randn(count, width, device=device).to(TYPE)
        # On a CPU, where a division by a number is a real division.
        rows = plain_quantize_rows(x.cpu(), INPUTS.format, INPUTS.rule)
        rows = IntegerRows(rows.codes.to(device), rows.scales.to(device))
        expected = plain_look_up_product(rows, weight.packed, weight.scales, weight.levels, x.dtype)
        baseline = [partial(torch.nn.functional.linear, x, w) for w in dense]
        ways: list[tuple[str, Sequence[Callable[[], Tensor]], float, float]] = [(BASELINE, baseline, 16, 0.0)]
        for name, calls in _ways(x, rows, few):
            ways.append((name, calls, BITS, float((calls[0]() != expected).double().mean())))
        seconds = iter(seconds_of_each([calls for _, calls, _, error in ways if not error], device))
        for name, _, bits, error in ways:
            size = bits / 8 * height * width + 2.0 * count * (height + width)
            time = None if error else next(seconds)
            yield KernelRow(
                name, (count, height, width), time, size, 2.0 * count * height * width, error, 0.0, BASELINE
            )


def _ways(
    x: Tensor, rows: IntegerRows, weights: Sequence[LookUpWeight]
) -> Iterator[tuple[str, Sequence[Callable[[], Any]]]]:
    """The ways to compute the linear, with one function per weight."""
    if choose_look_up(len(x), weights[0], INPUTS.format, x.device).path is None:

        def plain(w: LookUpWeight) -> Tensor:
            return plain_look_up_product(rows, w.packed, w.scales, w.levels, x.dtype)

        yield f"{LOOKED_UP}, plain", [partial(plain, w) for w in weights]
        return
    from mxrot.kernels.fused.look_up import look_up_product
    from mxrot.kernels.linear import by_look_up

    inputs = Inputs(x, None, INPUTS.format, INPUTS.rule)
    yield LOOKED_UP, [partial(by_look_up, inputs, w) for w in weights]
    ordered = IntegerRows(in_planes(rows.codes).contiguous(), rows.scales)

    def product(w: LookUpWeight) -> Tensor:
        return look_up_product(ordered, w.packed, w.scales, w.levels, x.dtype)

    yield f"{LOOKED_UP}, without the quantizer", [partial(product, w) for w in weights]
