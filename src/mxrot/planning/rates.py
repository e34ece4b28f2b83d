"""How fast this machine does each kind of work that quantizing is made of: a run of a few seconds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mxrot.documents import read_json
from mxrot.errors import ConfigError, DamagedError
from mxrot.formats import get_format, quantize
from mxrot.kernels import rotate_quantize
from mxrot.recipe import Recipe
from mxrot.rounding.gptq import NEIGHBOURS
from mxrot.rounding.linalg import inverse_factor
from mxrot.rounding.walk import walk_reached
from mxrot.transforms import TransformMethod

SECONDS = 0.25
"""Of each measurement, about."""
MOST_CALLS = 20
WALK_COLUMNS = 128
FACTORED = {"cpu": (128, 512), "cuda": (2048, 12288)}
"""Widths of the Hessians that are factorized."""


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
    """K^3 of Hessians factorized, K their width, beside what each column takes."""
    columns: float
    """Columns of Hessians factorized, however many there are in one."""
    rounded: float
    """Weights that GPTQ rounds, under one exponent."""
    block_steps: float
    """Blocks of columns that GPTQ walks over, however few rows they have."""
    encoded: float
    """Weights that become codes."""
    quantized: float
    """Activations transformed and quantized."""
    fitted: float
    """Units of the transform method, as it counts them, fitted."""
    operations: float
    """Small operations started, one after the other."""

    def as_table(self) -> dict[str, float]:
        """For a JSON file."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class OtherRates:
    """What a plan on another machine has measured."""

    device: str
    """Its name."""
    kind: str
    """"cpu" or "cuda"."""
    rates: Rates

    @staticmethod
    def read(path: Path) -> OtherRates:
        """From what `mxrot plan --json` wrote there; ConfigError if it holds no rates."""
        try:
            table = read_json(path)["seconds"]
            rates = {name: float(table["rates"][name]) for name in (field.name for field in fields(Rates))}
            found = OtherRates(str(table["device"]), str(table["kind"]), Rates(**rates))
        except (DamagedError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: holds no rates; expected what `mxrot plan --json` writes ({error})") from error
        if found.kind not in ("cpu", "cuda") or not all(0 < value < math.inf for value in rates.values()):
            raise ConfigError(f"{path}: rates have to be positive, and of cpu or cuda")
        return found


@torch.no_grad()
def measure_rates(device: torch.device, dtype: torch.dtype, recipe: Recipe) -> Rates:
    """Measured with random numbers; `dtype` is what the model computes in."""
    draws = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=draws, device=device)
    return Rates(
        **_matrix_rates(device, dtype, normal),
        **_rounding_rates(device, dtype, recipe, normal),
        fitted=_fitted_rate(recipe.transform, device),
    )


def _matrix_rates(device: torch.device, dtype: torch.dtype, normal: Callable[..., Tensor]) -> dict[str, float]:
    timed = partial(_seconds, device=device)
    is_gpu = device.type == "cuda"
    size = 8192 if is_gpu else 1024
    a, b = (normal(size, size).to(dtype) for _ in range(2))
    n = size // 2
    c, d = (normal(n, n, dtype=torch.float64) for _ in range(2))
    source = torch.zeros(2**30 if is_gpu else 2**27, device=device, dtype=torch.uint8)
    target, small = torch.empty_like(source), torch.zeros(32, device=device)
    return {
        "product": 2 * size**3 / timed(lambda: a @ b),
        "float64": 2 * n**3 / timed(lambda: c @ d),
        **_factor_rates(FACTORED["cuda" if is_gpu else "cpu"], timed, normal),
        "copy": 2 * source.nbytes / timed(lambda: target.copy_(source)),
        "operations": 100 / timed(lambda: [small.add_(1.0) for _ in range(100)]),
    }


def _factor_rates(
    widths: tuple[int, int], timed: Callable[..., float], normal: Callable[..., Tensor]
) -> dict[str, float]:
    """Of a narrow Hessian each column costs most, of a wide one the products: two widths tell both."""
    found = []
    for width in widths:
        c = normal(width, width, dtype=torch.float64)
        hessian = c @ c.mT / width
        del c
        found.append(timed(lambda hessian=hessian: inverse_factor(hessian, 0.01, "a Hessian")))
    return factor_rates(widths, found)


def factor_rates(widths: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """The rates by which Hessians of two widths take so many seconds: K / columns + K^3 / factor."""
    (narrow, wide), (few, many) = widths, seconds
    cubed = (many / wide - few / narrow) / (wide**2 - narrow**2)
    cubed = min(max(cubed, 0.1 * many / wide**3), many / wide**3)  # both cost something, whatever else ran
    return {"factor": 1 / cubed, "columns": 1 / max(few / narrow - cubed * narrow**2, 1e-3 * few / narrow)}


def _rounding_rates(
    device: torch.device, dtype: torch.dtype, recipe: Recipe, normal: Callable[..., Tensor]
) -> dict[str, float]:
    timed = partial(_seconds, device=device)
    weights = recipe.weights.quantizer()
    seen = weights if recipe.activations is None else recipe.activations.for_inputs()
    mxfp4, mixed = get_format("mxfp4"), recipe.transform.block
    height, size = 16384 if device.type == "cuda" else 2048, mxfp4.block or 1
    width = math.lcm(1024, mixed)
    rows = normal(height, width, dtype=torch.float64)
    states, matrices = rows.to(dtype), normal(width // mixed, mixed, mixed).to(torch.bfloat16)
    factor = torch.eye(WALK_COLUMNS, dtype=torch.float64, device=device)

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


def _fitted_rate(method: TransformMethod, device: torch.device) -> float:
    """Units of a method's own in a second; without a trial the rate divides nothing."""
    found = method.trial(device)
    if found is None:
        return 1.0
    fit, units = found
    return units / _seconds(fit, device)


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
