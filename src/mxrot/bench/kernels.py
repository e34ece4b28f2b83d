"""Kernels beside the bfloat16 product that they replace, on the shapes of Llama-3-8B or others.

A kernel is first checked against its plain twin. A kernel that fails has no speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor

from mxrot.bench.middle import MIDDLE, covers, middle_products
from mxrot.bench.others import Product, prepared_others
from mxrot.bench.timing import Seconds, copies_for, seconds_of, seconds_of_each
from mxrot.formats import BlockScales, QTensor, get_format, get_rule
from mxrot.kernels import plain_rotate_quantize, rotate_quantize
from mxrot.kernels.crossovers import MOST_ROWS, Crossovers
from mxrot.kernels.dispatch import has_triton
from mxrot.kernels.fp8 import fp8_product
from mxrot.kernels.linear import Inputs, PackedWeight, by_fixed_tiles
from mxrot.kernels.plain import (
    PackedRows,
    lift_exponents,
    plain_lift_weights,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
)
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.stages import STORED_DTYPE, apply_matrices

LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""(N, K) of q, k and v together, o, gate and up together, and down."""
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
RULES = ("even", "floor", "rceil")
FORMAT = get_format("mxfp4")
BASELINE = "bf16 product"
INVARIANT = "W4A4, packed, invariant"
"""The product with rows that do not depend on each other (`kernels.fixed_rows`)."""
PACKED, KEPT, LIFTED = "W4A4, packed, matrix units", "W4A4, kept in FP8", "W4A4, packed, lifted on the way"


@dataclass(frozen=True)
class KernelRow:
    """One measurement."""

    kernel: str
    shape: tuple[int, ...]
    """(M, K) of a quantizer, (M, N, K) of a product."""
    seconds: Seconds | None
    """None if the check failed."""
    bytes: float
    """The bytes read and written, at least."""
    operations: float
    error: float
    """For a quantizer, the share of values that differ from the twin's. For a product, the relative error against
    float64 of the same codes."""
    bound: float
    """The upper bound of `error`."""
    replaces: str = ""
    """The kernel that this one's speed is compared with, on the same shape."""

    @property
    def holds(self) -> bool:
        return self.error <= self.bound

    def as_record(self) -> dict[str, Any]:
        """The row for a JSON file."""
        return vars(self) | {"seconds": None if self.seconds is None else vars(self.seconds), "holds": self.holds}


def bench_kernels(
    device: torch.device,
    shapes: Sequence[tuple[int, int]] = LLAMA_3_8B,
    rows: Sequence[int] = ROWS,
    told: Callable[[str], None] = lambda line: None,
    all_tiles: bool = False,
) -> list[KernelRow]:
    """Measure all kernels on all shapes. `told` receives each result. With `all_tiles`, quantizers alone are left out,
    and middle rows are measured with every tile."""
    found = []
    quantizers = [] if all_tiles else _quantizers(device, sorted({k for _, k in shapes}), rows)
    for row in chain(quantizers, _products(device, shapes, rows, told, all_tiles)):
        found.append(row)
        told(f"{row.kernel:44s} {row.shape!s:22s} {row.seconds or 'CHECK FAILED'}")
    return found


def _quantizers(device: torch.device, widths: Sequence[int], rows: Sequence[int]) -> Iterator[KernelRow]:
    generator = torch.Generator().manual_seed(0)
    kinds = [*(("site", rule) for rule in RULES), ("block", RULES[0])]
    for width, (sharing, rule_name), count in product(widths, kinds, rows):
        matrices = _matrices(1 if sharing == "site" else width // 32, generator, device)
        x = torch.randn(count, width, device=device).to(torch.bfloat16)
        copies = [x.clone() for _ in range(copies_for(4 * x.numel()))]
        for output, run, twin, size in _outputs(device):
            rule, bound = get_rule(rule_name), 1e-4
            error = _share_that_differs(run(x, matrices, FORMAT, rule), twin(x, matrices, FORMAT, rule))
            calls = [partial(run, copy, matrices, FORMAT, rule) for copy in copies]
            seconds = seconds_of(calls, device) if error <= bound else None
            name = f"rotate_quantize to {output}, {sharing}, {rule_name}"
            rest = 64.0 * x.numel(), error, bound, f"rotate_quantize by the book, {sharing}, {rule_name}"
            yield KernelRow(name, (count, width), seconds, x.numel() * (2 + size), *rest)
        if device.type == "cpu" and rule_name == "floor":
            name = f"rotate_quantize by the book, {sharing}, {rule_name}"
            seconds = seconds_of([partial(by_the_book, copy, matrices) for copy in copies], device)
            error = _share_that_differs(by_the_book(x, matrices), plain_rotate_quantize(x, matrices, FORMAT, rule))
            yield KernelRow(name, (count, width), seconds, 6.0 * x.numel(), 64.0 * x.numel(), error, 1.0)


def _matrices(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Matrices stored row by row, as in a loaded model."""
    return random_orthogonal(count, 32, generator).to(device, STORED_DTYPE).contiguous()


def by_the_book(x: Tensor, matrices: Tensor) -> Tensor:
    """Q(x T) under the rule `floor`, written out directly: each value goes to the nearest of eight candidates."""
    values = apply_matrices(x.float(), matrices.float()).unflatten(-1, (-1, 32))
    scales = torch.exp2(values.abs().amax(dim=-1, keepdim=True).log2().floor() - 2)
    scaled = values / scales
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=x.device)
    nearest = (scaled.abs()[..., None] - grid).abs().argmin(dim=-1)
    return (scaled.sign() * grid[nearest] * scales).flatten(-2)


def _outputs(device: torch.device) -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any], float]]:
    """The name, kernel, twin, and bytes per value of each."""
    if device.type != "cuda" or not has_triton():
        yield "values", rotate_quantize, plain_rotate_quantize, 4.0
        return
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2, rotate_quantize_packed

    yield "bf16", rotate_quantize, plain_rotate_quantize, 2.0
    yield "fp8", rotate_quantize_e5m2, plain_rotate_quantize_e5m2, 1.0
    yield "fp4", rotate_quantize_packed, plain_rotate_quantize_packed, 17 / 32


def _share_that_differs(found: Any, expected: Any) -> float:
    if isinstance(found, PackedRows):
        pairs = ((found.codes, expected.codes), (found.scales, expected.scales))
        return max(float((one != other).double().mean()) for one, other in pairs)
    return float((found.float() != expected.float()).double().mean())


def _products(
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    told: Callable[[str], None],
    all_tiles: bool,
) -> Iterator[KernelRow]:
    for height, width in shapes:
        weight = torch.randn(height, width, device=device) * width**-0.5
        packed = plain_rotate_quantize_packed(weight, None, FORMAT, FORMAT.rule())
        matrices = _matrices(1, torch.Generator().manual_seed(1), device)
        dense = [_dequantized(packed).to(torch.bfloat16) for _ in range(copies_for(2.0 * weight.numel()))]
        few = [PackedRows(packed.codes.clone(), packed.scales.clone()) for _ in range(copies_for(weight.numel() / 2))]
        others = prepared_others(few, rows, told)
        for count in rows:
            x = torch.randn(count, width, device=device).to(torch.bfloat16)
            exact = _sample(plain_rotate_quantize(x, matrices, FORMAT, FORMAT.rule()), dense[0])
            shape, operations = (count, height, width), 2.0 * count * height * width
            inputs_outputs = 2.0 * count * (height + width)
            quantized = plain_rotate_quantize(x, matrices, FORMAT, FORMAT.rule()).to(torch.bfloat16)
            own_error = _error(quantized @ dense[0].mT, exact)
            baseline = [partial(torch.nn.functional.linear, x, w) for w in dense]
            ways = [_Way(BASELINE, baseline, 2.0, own_error, 1.0)]
            for name, functions, size in _linears(device, x, matrices, few, told, all_tiles):
                bound = 3 * own_error if "fast" in name else 1.1 * own_error
                ways.append(_Way(name, functions, size, _error(functions[0](), exact), bound))
            ways += _of_others(others, x, dense[0], told)
            seconds = iter(seconds_of_each([way.calls for way in ways if way.error <= way.bound], device))
            for way in ways:
                time = next(seconds) if way.error <= way.bound else None
                size = inputs_outputs + way.size * weight.numel()
                yield KernelRow(way.name, shape, time, size, operations, way.error, way.bound)


def _of_others(
    others: Mapping[str, Sequence[Product]], x: Tensor, dense: Tensor, told: Callable[[str], None]
) -> Iterator[_Way]:
    """Products of other libraries with unrotated inputs, each checked against float64 of the same."""
    exact = _sample(x, dense)
    bound = 3 * _error(torch.nn.functional.linear(x, dense), exact)
    for name, functions in others.items():
        try:
            error = _error(functions[0](x), exact)
        except Exception as failure:
            told(f"{name}: {len(x)} rows are not measured: {type(failure).__name__}: {str(failure)[:200]}")
            continue
        yield _Way(name, [partial(function, x) for function in functions], 17 / 32, error, bound)


@dataclass(frozen=True)
class _Way:
    """A way to compute a linear."""

    name: str
    calls: Sequence[Callable[[], Tensor]]
    """The calls, each with another weight."""
    size: float
    """The bytes of a weight."""
    error: float
    bound: float


def _linears(
    device: torch.device,
    x: Tensor,
    matrices: Tensor,
    weights: Sequence[PackedRows],
    told: Callable[[str], None],
    all_tiles: bool,
) -> Iterator[tuple[str, list[Callable[[], Tensor]], float]]:
    """The ways to compute the quantized linear, all but one with the quantizer. Each has one function per weight."""
    if device.type != "cuda" or not has_triton() or torch.cuda.get_device_capability(device) < (8, 9):
        return
    from mxrot.kernels.fused.lift import lift_weights
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2
    from mxrot.kernels.fused.skinny import skinny_product

    rule, dtype = FORMAT.rule(), torch.bfloat16
    exponents, outside = lift_exponents(weights[0].codes, weights[0].scales, together=True)
    assert not int(outside)
    if len(x) <= MOST_ROWS:

        def quantized() -> Tensor:
            return rotate_quantize_e5m2(x, matrices, FORMAT, rule, are_in_pairs=True)

        def few(w: PackedRows, inputs: Tensor | None = None) -> Tensor:
            inputs = quantized() if inputs is None else inputs
            return skinny_product(inputs, w.codes, w.scales, exponents, dtype)

        yield PACKED, [partial(few, w) for w in weights], 17 / 32
        once = quantized()
        yield f"{PACKED}, without the quantizer", [partial(few, w, once) for w in weights], 17 / 32
    if covers(len(x), x.shape[1], device):
        yield from middle_products(x, matrices, weights, exponents, all_tiles, told)
    fixed = [PackedWeight(w.codes, w.scales, exponents) for w in weights]
    inputs = Inputs(x, matrices, FORMAT, rule)
    yield INVARIANT, [partial(by_fixed_tiles, inputs, w) for w in fixed], 17 / 32
    scale = torch.exp2(exponents[0].float())
    lifted = [
        plain_lift_weights(w.codes, w.scales, exponents) for w in weights[: copies_for(len(exponents) * x.shape[1])]
    ]

    def kept(w: Tensor, fast: bool = False) -> Tensor:
        return fp8_product(rotate_quantize_e5m2(x, matrices, FORMAT, rule), w, scale, dtype, fast)

    yield KEPT, [partial(kept, w) for w in lifted], 1.0
    yield f"{KEPT}, fast accumulation", [partial(kept, w, True) for w in lifted], 1.0
    scratch = torch.empty_like(lifted[0])

    def lift(w: PackedRows) -> Tensor:
        return kept(lift_weights(w.codes, w.scales, exponents, scratch))

    yield LIFTED, [partial(lift, w) for w in weights], 17 / 32


def measured_crossovers(rows: Sequence[KernelRow]) -> Crossovers | None:
    """The fastest product from packed codes for each range of input rows, by the sum over all shapes. None if no such
    products were compared."""
    times = {(row.kernel, row.shape): row.seconds.median for row in rows if row.seconds is not None}

    def limit(mine: str, other: str) -> int | None:
        sums: dict[int, list[float]] = {}
        for (kernel, shape), seconds in times.items():
            if kernel == mine and (other, shape) in times:
                both = sums.setdefault(shape[0], [0.0, 0.0])
                both[0] += seconds
                both[1] += times[other, shape]
        slower = [count for count, (ours, others) in sums.items() if ours > others]
        counts = [count for count in sums if count < min(slower, default=math.inf)]
        return max(counts, default=0) if sums else None

    packed, kept = limit(PACKED, LIFTED), limit(PACKED, KEPT)
    if packed is None or kept is None:
        return None
    few, middle, middle_kept = limit(PACKED, MIDDLE), limit(MIDDLE, LIFTED), limit(MIDDLE, KEPT)
    if few is None or middle is None or middle_kept is None:
        return Crossovers(packed, kept)
    return Crossovers(packed, kept, few, middle, middle_kept)


def _dequantized(packed: PackedRows) -> Tensor:
    return QTensor.dequantize_packed(packed.codes, BlockScales(packed.scales, FORMAT.scale), FORMAT)


SAMPLE_ROWS = 64


def _sample(x: Tensor, weight: Tensor) -> Tensor:
    """The first rows of the product of the same codes, in float64."""
    return x[:SAMPLE_ROWS].double() @ weight.double().mT


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found[: len(exact)].double() - exact).norm() / exact.norm())
