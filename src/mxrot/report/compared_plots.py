"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from mxrot.report.depth import Depth, depth_picture
from mxrot.report.drawing import Marks, Palette, Picture, Points
from mxrot.report.rows import ComparedRow, Mean
from mxrot.report.sheet import Sheet
from mxrot.report.ticks import log_ticks, plain
from mxrot.report.trade_off import trade_off_picture

_ROW = 20
"""The height of a row in points."""
_TRADE_OFF = 400
Measure = Callable[[ComparedRow], Mean | None]


def compared_pictures(rows: Sequence[ComparedRow], title: str) -> dict[str, Picture]:
    """All pictures by name. Empty if nothing ran."""
    shown = [row for row in rows if row.reason is None and row.original is not None]
    if not shown:
        return {}
    found = {"ratio": trade_off_picture(shown, title, _TRADE_OFF)}
    if any(row.kl() is not None for row in shown):
        found["kl"] = _bars(shown, "KL from the original", "nats a token", ComparedRow.kl, is_log=True)
        found["agreement"] = _bars(shown, "Same most likely token", "positions, %", _agreement)
    for text in shown[0].texts if len(shown[0].texts) > 1 else []:
        heading = f"Perplexity beside the original, {text}"
        found[f"ratio-{text}"] = _bars(shown, heading, "ratio", partial(ComparedRow.ratio, text=text), is_log=True)
    for key, heading in (("weight_errors", "Weights"), ("output_errors", "Outputs of the linears")):
        depth: Depth = {row.recipe: dict(enumerate(getattr(row.runs[0], key))) for row in shown}
        depth = {name: values for name, values in depth.items() if values}
        if depth:
            found[key] = depth_picture(heading, depth, columns=2, height=220 + 14 * (-(-len(depth) // 2)))
    return found


def _agreement(row: ComparedRow) -> Mean | None:
    mean = row.agreement()
    return None if mean is None else Mean(100 * mean.value, mean.error and 100 * mean.error)


def _bars(rows: Sequence[ComparedRow], title: str, unit: str, measure: Measure, is_log: bool = False) -> Picture:
    """One point per row, the first on top, with its standard error over seeds."""
    known = [(row.recipe, mean) for row in rows if (mean := measure(row)) is not None]
    lines = [[name, mean.value, mean.error] for name, mean in known]
    is_log = is_log and all(mean.value > 0 for _, mean in known)
    draw = partial(draw_bars, title=title, unit=unit, known=known, is_log=is_log)
    return Picture(_ROW * len(known) + 75, draw, sheet=Sheet(["recipe", unit, "error over seeds"], lines))


def draw_bars(
    figure: Any, colors: Palette, title: str, unit: str, known: Sequence[tuple[str, Mean]], is_log: bool
) -> Marks:
    axes = figure.subplots()
    if is_log:
        axes.set_xscale("log")
    points = []
    for number, (name, mean) in enumerate(known):
        color = colors.series[number % len(colors.series)]
        axes.errorbar(mean.value, number, xerr=mean.error, color=color, marker="o", markersize=5, capsize=2.5)
        error = "" if mean.error is None else f" +- {mean.error:.4g}"
        points.append((mean.value, float(number), f"{name}: {mean.value:.4g}{error} {unit}"))
    axes.margins(x=0.08)
    if is_log:
        low, high = axes.get_xlim()
        axes.set_xticks(log_ticks(low, high))
        axes.xaxis.set_major_formatter(plain)
        axes.minorticks_off()
        axes.set_xlim(low, high)
    axes.set_yticks(range(len(known)), [name for name, _ in known])
    axes.set_ylim(len(known) - 0.5, -0.5)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    axes.set_xlabel(unit)
    return [Points(axes, points)]
