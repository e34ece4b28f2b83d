"""Results of a benchmark for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from mxrot.bench.kernels import BASELINE, KernelRow


def kernel_table(rows: Sequence[KernelRow], limits: dict[str, float]) -> Table:
    """Times, the share of the copy bandwidth, and speed relative to the bfloat16 product of the same shape."""
    baseline = {row.shape: row.seconds.median for row in rows if row.kernel == BASELINE and row.seconds is not None}
    ceilings = ", ".join(f"{name} {value / 1e9:,.0f} G/s" for name, value in limits.items())
    table = Table(title=f"Here: {ceilings}", title_justify="left")
    table.add_column("kernel")
    for heading in ("shape", "us", "quartiles", "of copy", "Tops/s", "x bf16", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [row.kernel, " ".join(map(str, row.shape))]
        if row.seconds is None:
            cells += ["CHECK FAILED", "", "", "", "", f"{row.error:.1e} > {row.bound:.1e}"]
        else:
            seconds = row.seconds
            cells += [f"{1e6 * seconds.median:.1f}", f"{1e6 * seconds.low:.1f} to {1e6 * seconds.high:.1f}"]
            cells += [f"{row.bytes / seconds.median / limits['copy']:.0%}"]
            is_product = row.shape in baseline
            cells += [f"{row.operations / seconds.median / 1e12:.1f}" if is_product else ""]
            cells += [f"{baseline[row.shape] / seconds.median:.2f}" if is_product else "", f"{row.error:.1e}"]
        table.add_row(*cells)
    return table


def geometric_means(rows: Sequence[KernelRow]) -> dict[tuple[str, int], float]:
    """Speed relative to the bfloat16 product, by kernel and rows of the input, over the shapes that were measured."""
    baseline = {row.shape: row.seconds.median for row in rows if row.kernel == BASELINE and row.seconds is not None}
    ratios: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        if row.seconds is not None and row.shape in baseline and row.kernel != BASELINE:
            ratios.setdefault((row.kernel, row.shape[0]), []).append(baseline[row.shape] / row.seconds.median)
    return {key: math.exp(sum(map(math.log, found)) / len(found)) for key, found in ratios.items()}
