"""The results of a benchmark for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from mxrot.bench.kernels import KernelRow
from mxrot.bench.middle import ALONE, MIDDLE
from mxrot.bench.quantize import QuantizeRow
from mxrot.bench.timing import TIMES


def kernel_table(rows: Sequence[KernelRow], limits: dict[str, float]) -> Table:
    """Times, the share of the copy bandwidth, and speed relative to the replaced kernel."""
    ratios = speed_ratios(rows)
    ceilings = ", ".join(
        f"{name} {1e6 * value:.2f} us" if name in TIMES else f"{name} {value / 1e9:,.0f} G/s"
        for name, value in limits.items()
    )
    table = Table(title=f"Here: {ceilings}", title_justify="left")
    table.add_column("kernel")
    for heading in ("shape", "us", "quartiles", "of copy", "Tops/s", "x", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row.kernel, " ".join(map(str, row.shape))]
        if row.seconds is None:
            cells += ["CHECK FAILED", "", "", "", "", f"{row.error:.1e} > {row.bound:.1e}"]
        else:
            seconds, ratio = row.seconds, ratios.get((row.kernel, row.shape))
            cells += [f"{1e6 * seconds.median:.1f}", f"{1e6 * seconds.low:.1f} to {1e6 * seconds.high:.1f}"]
            cells += [f"{row.bytes / seconds.median / limits['copy']:.0%}"]
            cells += [f"{row.operations / seconds.median / 1e12:.1f}" if len(row.shape) == 3 else ""]
            cells += ["" if ratio is None else f"{ratio:.2f}", f"{row.error:.1e}"]
        table.add_row(*cells)
    return table


def quantize_table(rows: Sequence[QuantizeRow]) -> Table:
    """One line per recipe."""
    table = Table()
    table.add_column("recipe")
    for heading in ("windows", "first run, s", "later runs, s", "blocks, s", "GPU memory, GB"):
        table.add_column(heading, justify="right")
    for row in rows:
        windows = "" if row.windows is None else " x ".join(map(str, row.windows))
        later = " ".join(f"{value:.2f}" for value in row.seconds[1:])
        memory = "" if row.peak_gpu_bytes is None else f"{row.peak_gpu_bytes / 1e9:.2f}"
        table.add_row(row.recipe, windows, f"{row.seconds[0]:.2f}", later, f"{sum(row.blocks):.2f}", memory)
    return table


def speed_ratios(rows: Sequence[KernelRow]) -> dict[tuple[str, tuple[int, ...]], float]:
    """The speed of each kernel relative to the one it replaces, by its name and shape."""
    times = {(row.kernel, row.shape): row.seconds.median for row in rows if row.seconds is not None}
    return {
        (row.kernel, row.shape): times[row.replaces, row.shape] / row.seconds.median
        for row in rows
        if row.seconds is not None and (row.replaces, row.shape) in times
    }


def geometric_means(rows: Sequence[KernelRow]) -> dict[tuple[str, int], float]:
    """The geometric mean over the measured shapes, by kernel and rows of the input."""
    ratios: dict[tuple[str, int], list[float]] = {}
    for (kernel, shape), ratio in speed_ratios(rows).items():
        ratios.setdefault((kernel, shape[0]), []).append(ratio)
    return {key: math.exp(sum(map(math.log, found)) / len(found)) for key, found in ratios.items()}


def best_tiles(rows: Sequence[KernelRow], alone: bool = False) -> dict[tuple[int, ...], tuple[str, float]]:
    """The fastest of the measured tiles for each shape, and its seconds, with the quantizer before it or alone."""
    found: dict[tuple[int, ...], tuple[str, float]] = {}
    for row in rows:
        tile = row.kernel.removesuffix(ALONE).removeprefix(f"{MIDDLE}, ")
        is_tile = row.kernel.startswith(MIDDLE) and tile != MIDDLE and row.kernel.endswith(ALONE) == alone
        if is_tile and row.seconds is not None:
            mine = tile, row.seconds.median
            found[row.shape] = min(found.get(row.shape, mine), mine, key=lambda each: each[1])
    return found
