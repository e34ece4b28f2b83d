"""How fast this machine does each kind of work that quantizing is made of: a run of a few seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from mxrot.formats import get_format, quantize
from mxrot.kernels import rotate_quantize
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.rounding.gptq import NEIGHBOURS, walk_reached
from mxrot.rounding.linalg import inverse_factor
from mxrot.transforms import BlockTransform, SiteSample
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
    is_gpu = device.type == "cuda"
    draws = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=draws, device=device)
    size = 8192 if is_gpu else 1024
    timed = partial(_seconds, device=device)

    a, b = (normal(size, size).to(dtype) for _ in range(2))
    product = 2 * size**3 / timed(lambda: a @ b)
    n = size // 2
    c, d = (normal(n, n, dtype=torch.float64) for _ in range(2))
    float64 = 2 * n**3 / timed(lambda: c @ d)
    hessian = c @ c.mT / n
    factor = n**3 / timed(lambda: inverse_factor(hessian, 0.01, "a Hessian"))
    source = torch.zeros(2**30 if is_gpu else 2**27, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source))
    small = torch.zeros(32, device=device)
    operations = 100 / timed(lambda: [small.add_(1.0) for _ in range(100)])

    weights, activations = recipe.weights.quantizer(), recipe.activations and recipe.activations.quantizer()
    tall = 16384 if is_gpu else 2048
    rows = normal(tall, 1024, dtype=torch.float64)
    encoded = rows.numel() / timed(lambda: quantize(rows, weights.format, weights.rule))
    seen = activations or weights
    groups = 1024 // TRANSFORM_BLOCK
    matrices = normal(groups, TRANSFORM_BLOCK, TRANSFORM_BLOCK).to(torch.bfloat16)
    states = normal(tall, 1024).to(dtype)
    quantized = states.numel() / timed(lambda: rotate_quantize(states, matrices, seen.format, seen.rule))

    mxfp4 = get_format("mxfp4")

    def walk(count: int) -> float:
        part = rows[:count, :WALK_COLUMNS].unflatten(1, (-1, TRANSFORM_BLOCK))
        factors = torch.eye(WALK_COLUMNS, dtype=torch.float64, device=device)
        offsets = NEIGHBOURS[:1]
        return timed(lambda: walk_reached(part, factors, mxfp4, mxfp4.rule(), offsets))

    few, many = walk(1), walk(tall)
    steps = WALK_COLUMNS // TRANSFORM_BLOCK
    rounded = (tall - 1) * WALK_COLUMNS / max(many - few, 0.05 * many)

    moments = normal(groups, TRANSFORM_BLOCK, TRANSFORM_BLOCK, dtype=torch.float64)
    moments = moments @ moments.mT
    balanced = groups / timed(lambda: balancing_transform(moments, moments, 0.01))
    searched = 1.0
    if isinstance(recipe.transform, OutlierRotation):
        searched = _search_rate(recipe.transform, device, timed)
    return Rates(
        product=product,
        float64=float64,
        copy=copy,
        factor=factor,
        rounded=rounded,
        block_steps=steps / few,
        encoded=encoded,
        quantized=quantized,
        searched=searched,
        balanced=balanced,
        operations=operations,
    )


def _search_rate(method: OutlierRotation, device: torch.device, timed: Callable[..., float]) -> float:
    """Numbers times steps in a second, of the search as the recipe has it, on one block's worth of peaks for each."""
    groups, size = 32 if device.type == "cuda" else 8, TRANSFORM_BLOCK
    blocks = torch.randn(groups, method.rows, size, device=device)
    plain = replace(method, sample="peaks", score="peak", start="identity", steps=min(method.steps, 16))
    sample = SiteSample(torch.zeros(1, groups * size, dtype=torch.float64, device=device), size, {"peaks": blocks})

    def fit() -> BlockTransform:
        return plain.fit(sample, "block", torch.Generator().manual_seed(0))

    return blocks.numel() * plain.steps / timed(fit)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of a call, of as many as fit into SECONDS; the first one is not counted if others follow."""
    found: list[float] = []
    while not found or (sum(found) < SECONDS and len(found) < MOST_CALLS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:] or found)
