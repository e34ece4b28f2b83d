"""How fast this machine does each kind of work that quantizing is made of: a run of a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxrot.formats import get_format, quantize
from mxrot.kernels import rotate_quantize
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.rounding.gptq import NEIGHBOURS
from mxrot.rounding.linalg import inverse_factor
from mxrot.rounding.walk import walk_reached
from mxrot.transforms import BlockDiagonal, SiteSample
from mxrot.transforms.moments import balancing_transform
from mxrot.transforms.outlier import OutlierRotation

SECONDS = 0.25
"""Of each measurement, about."""
MOST_CALLS = 20
WALK_COLUMNS = 128


@dataclass(frozen=True)
class Rates:
    """What a device does in a second."""

    product: float
    """Operations of matrix products in the type that the model computes in."""
    float64: float
    """The same in float64."""
    copy: float
    """Bytes read and written."""
    factor: float
    """K^3 of Hessians factorized, K their width."""
    rounded: float
    """Weights that GPTQ rounds, under one exponent."""
    block_steps: float
    """Blocks of columns that GPTQ walks over, however few rows they have."""
    encoded: float
    """Weights that become codes."""
    quantized: float
    """Activations transformed and quantized."""
    searched: float
    """Numbers rotated by the steps of a search for outlier rotations."""
    balanced: float
    """Second-moment transforms fitted."""
    operations: float
    """Small operations started, one after the other."""

    def as_table(self) -> dict[str, float]:
        """For a JSON file."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype, recipe: Recipe) -> Rates:
    """Measured with random numbers; `dtype` is what the model computes in."""
    draws = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=draws, device=device)
    return Rates(
        **_matrix_rates(device, dtype, normal),
        **_rounding_rates(device, dtype, recipe, normal),
        **_transform_rates(device, recipe, normal),
    )


def _matrix_rates(device: torch.device, dtype: torch.dtype, normal: Callable[..., Tensor]) -> dict[str, float]:
    timed = partial(_seconds, device=device)
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 1024
    a, b = (normal(size, size).to(dtype) for _ in range(2))
    n = size // 2
    c, d = (normal(n, n, dtype=torch.float64) for _ in range(2))
    hessian = c @ c.mT / n
    source = torch.zeros(2**30 if is_gpu else 2**27, device=device, dtype=torch.uint8)
    target, small = torch.empty_like(source), torch.zeros(32, device=device)
    return {
        "product": 2 * size**3 / timed(lambda: a @ b),
        "float64": 2 * n**3 / timed(lambda: c @ d),
        "factor": n**3 / timed(lambda: inverse_factor(hessian, 0.01, "a Hessian")),
        "copy": 2 * source.nbytes / timed(lambda: target.copy_(source)),
        "operations": 100 / timed(lambda: [small.add_(1.0) for _ in range(100)]),
    }


def _rounding_rates(
    device: torch.device, dtype: torch.dtype, recipe: Recipe, normal: Callable[..., Tensor]
) -> dict[str, float]:
    timed = partial(_seconds, device=device)
    weights = recipe.weights.quantizer()
    seen = weights if recipe.activations is None else recipe.activations.for_inputs()
    height, width, size = 16384 if device.type == "cuda" else 2048, 1024, TRANSFORM_BLOCK
    rows = normal(height, width, dtype=torch.float64)
    states, matrices = rows.to(dtype), normal(width // size, size, size).to(torch.bfloat16)
    mxfp4, factor = get_format("mxfp4"), torch.eye(WALK_COLUMNS, dtype=torch.float64, device=device)

    def walk(count: int) -> float:
        """The seconds of so many rows, a few blocks wide."""
        part = rows[:count, :WALK_COLUMNS].unflatten(1, (-1, size))
        return timed(lambda: walk_reached(part, factor, mxfp4, mxfp4.rule(), NEIGHBOURS[:1]))

    few, many = walk(1), walk(height)
    return {
        "encoded": rows.numel() / timed(lambda: quantize(rows, weights.format, weights.rule)),
        "quantized": rows.numel() / timed(lambda: rotate_quantize(states, matrices, seen.format, seen.rule)),
        "rounded": height * WALK_COLUMNS / max(many - few, 0.05 * many),
        "block_steps": WALK_COLUMNS // size / few,
    }


def _transform_rates(device: torch.device, recipe: Recipe, normal: Callable[..., Tensor]) -> dict[str, float]:
    timed = partial(_seconds, device=device)
    factors = normal(32, TRANSFORM_BLOCK, TRANSFORM_BLOCK, dtype=torch.float64)
    moments = factors @ factors.mT
    method = recipe.transform
    return {
        "balanced": len(moments) / timed(lambda: balancing_transform(moments, moments, 0.01)),
        # Without a search its rate divides nothing.
        "searched": _search_rate(method, device, timed) if isinstance(method, OutlierRotation) else 1.0,
    }


def _search_rate(method: OutlierRotation, device: torch.device, timed: Callable[..., float]) -> float:
    """Numbers times steps in a second of a search for the smallest peak, for some blocks at once."""
    groups, size = 32 if device.type == "cuda" else 8, TRANSFORM_BLOCK
    blocks = torch.randn(groups, method.rows, size, device=device)
    plain = replace(method, sample="peaks", score="peak", start="identity", steps=min(method.steps, 16))
    sample = SiteSample(torch.zeros(1, groups * size, dtype=torch.float64, device=device), size, {"peaks": blocks})

    def fit() -> BlockDiagonal:
        return plain.fit(sample, "block", torch.Generator().manual_seed(0))

    return blocks.numel() * plain.steps / timed(fit)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call, of as many as fit into SECONDS, after a first one (which compiles, on a GPU)."""
    first = _time_of(call, device)
    if device.type == "cpu" and first >= SECONDS:
        return first
    found: list[float] = []
    while not found or (sum(found) < SECONDS and len(found) < MOST_CALLS):
        found.append(_time_of(call, device))
    return statistics.median(found)


def _time_of(call: Callable[[], Any], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
