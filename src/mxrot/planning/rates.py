"""The speed of this machine in each kind of work of quantizing, measured in a few seconds."""

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
"""The approximate time of each measurement."""
MOST_CALLS = 20
WALK_COLUMNS = 128
FACTORED = {"cpu": (128, 512), "cuda": (2048, 12288)}
"""The widths of the Hessians that are factorized."""


@dataclass(frozen=True)
class Rates:
    """The speeds of a device, in amounts per second."""

    product: float
    """Operations of matrix products in the type that the model computes in."""
    float64: float
    """The same operations in float64."""
    copy: float
    """Bytes read and written."""
    factor: float
    """K^3 of factorized Hessians of width K, without the cost of each column."""
    columns: float
    """Columns of factorized Hessians, regardless of their width."""
    rounded: float
    """Weights that GPTQ rounds, with one exponent."""
    block_steps: float
    """Blocks of columns that GPTQ processes, regardless of the number of rows."""
    encoded: float
    """Weights that are encoded."""
    quantized: float
    """Activations transformed and quantized."""
    fitted: float
    """Fitted units of the transform method, by its own count."""
    operations: float
    """Small operations that are started one after the other."""

    def as_table(self) -> dict[str, float]:
        """The rates for a JSON file."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class OtherRates:
    """The rates that a plan on another machine has measured."""

    device: str
    """The name of the device."""
    kind: str
    """"cpu" or "cuda"."""
    rates: Rates

    @staticmethod
    def read(path: Path) -> OtherRates:
        """The rates in a file of `mxrot plan --json`. ConfigError if it holds no rates."""
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
    """The rates, measured with random numbers. `dtype` is the type that the model computes in."""
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
    """The rates of factorizing. Columns dominate for a narrow Hessian, products for a wide one: two widths give
    both."""
    found = []
    for width in widths:
        c = normal(width, width, dtype=torch.float64)
        hessian = c @ c.mT / width
        del c
        found.append(timed(lambda hessian=hessian: inverse_factor(hessian, 0.01, "a Hessian")))
    return factor_rates(widths, found)


def factor_rates(widths: Sequence[int], seconds: Sequence[float]) -> dict[str, float]:
    """The rates that explain these seconds for Hessians of two widths: K / columns + K^3 / factor."""
    (narrow, wide), (few, many) = widths, seconds
    cubed = (many / wide - few / narrow) / (wide**2 - narrow**2)
    cubed = min(max(cubed, 0.1 * many / wide**3), many / wide**3)  # both costs are positive, despite noise
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
        """The seconds for this number of rows, a few blocks wide."""
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
    """The units per second, by the method's own count. Without a trial the rate is arbitrary, and is not used."""
    found = method.trial(device)
    if found is None:
        return 1.0
    fit, units = found
    return units / _seconds(fit, device)


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    """The median time of as many calls as fit into SECONDS, after a first one (which compiles, on a GPU)."""
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
