"""The picture of a comparison: accuracy against bits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mxrot.errors import ConfigError
from mxrot.report.drawing import LIGHT, Marks, Palette, Picture, Points, check_matplotlib, render
from mxrot.report.rows import ComparedRow
from mxrot.report.sheet import Sheet
from mxrot.report.ticks import log_ticks

KINDS = ("png", "svg")
_LINE = 13.0
"""The points from one name to the next."""
_WIDTH = 520
_BELOW, _ABOVE = 40, 34
"""Points below the axes and above them."""
_NAMES = 0.62
"""The start of the names, as a share of the picture's width."""


def check_plot(path: Path | None) -> None:
    """ConfigError for a file type that cannot be drawn, and without matplotlib."""
    if path is None:
        return
    if path.suffix.lower().lstrip(".") not in KINDS:
        raise ConfigError(f"--plot {path}: expected a name that ends in .png or .svg")
    check_matplotlib("--plot")


def picture_file(rows: Sequence[ComparedRow], title: str, kind: str) -> bytes:
    """A PNG or SVG of the ratio to the original against bits per weight, transforms included, for each recipe that ran.

    Bars are standard errors over seeds, if there are several.
    """
    return render("trade-off", trade_off_picture(rows, title), LIGHT, kind, "white")


def trade_off_picture(rows: Sequence[ComparedRow], title: str, width: int = _WIDTH) -> Picture:
    """The same as a Picture."""
    shown = [row for row in rows if row.reason is None and row.original is not None]
    height = max(240, int(1.4 * _LINE * len(shown)) + 100)
    lines = [[row.recipe, bits_of(row), row.ratio().value, row.ratio().error] for row in shown]
    sheet = Sheet(["recipe", "bits a weight, with transforms", "ratio", "error over seeds"], lines)
    return Picture(height, partial(draw, rows=shown, title=title), width, sheet)


def bits_of(row: ComparedRow) -> float:
    """Bits per weight, with its share of the transforms."""
    return row.runs[0].bits_per_weight + (row.size.transform_bits_per_weight or 0.0)


def draw(figure: Any, colors: Palette, rows: Sequence[ComparedRow], title: str) -> Marks:
    """Draw ratios on a logarithmic axis. A line connects each point with its name, and the names stand in a column."""
    figure.set_layout_engine("none")
    height = 72 * figure.get_figheight()
    axes = figure.add_axes((0.11, _BELOW / height, _NAMES - 0.15, 1 - (_BELOW + _ABOVE) / height))
    axes.set_yscale("log")
    ratios = [row.ratio() for row in rows]
    for number, (row, ratio) in enumerate(zip(rows, ratios, strict=True)):
        color = colors.series[number % len(colors.series)]
        axes.errorbar(bits_of(row), ratio.value, ratio.error, color=color, marker="o", capsize=2.5, linestyle="none")
    axes.axhline(1.0, color=colors.ink, linewidth=1, linestyle=(0, (2, 2)))
    _set_limits(axes, rows)
    axes.set(xlabel="bits a weight, with transforms", ylabel="perplexity beside the original")
    figure.text(0.02, 1 - 18 / height, title)
    _write_names(figure, axes, colors, rows)
    return [Points(axes, [(bits_of(row), ratio.value, _said(row)) for row, ratio in zip(rows, ratios, strict=True)])]


def _said(row: ComparedRow) -> str:
    ratio = row.ratio()
    error = "" if ratio.error is None else f" +- {ratio.error:.4f}"
    return f"{row.recipe}: {ratio.value:.4f}{error} times the original's perplexity, {bits_of(row):.3f} bits"


def _set_limits(axes: Any, rows: Sequence[ComparedRow]) -> None:
    """Set limits with room around the points, also if all have the same bits."""
    bits = [bits_of(row) for row in rows]
    least, most = min(bits), max(bits)
    room = max(0.1, 0.08 * (most - least))
    axes.set_xlim(least - room, most + room)
    tops = [row.ratio().value + (row.ratio().error or 0.0) for row in rows]
    bottoms = [row.ratio().value - (row.ratio().error or 0.0) for row in rows]
    low = min(1.0, *(max(bottom, 1e-3) for bottom in bottoms))
    high = max(1.05, *tops)
    span = (high / low) ** 0.06
    axes.set_ylim(low / span, high * span)
    axes.set_yticks(log_ticks(low / span, high * span))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}")
    axes.minorticks_off()


def _write_names(figure: Any, axes: Any, colors: Palette, rows: Sequence[ComparedRow]) -> None:
    """Write the names on the right, in the vertical order of the points, at least one line apart."""
    figure.canvas.draw()
    scale = figure.dpi / 72
    spots = [axes.transData.transform((bits_of(row), row.ratio().value)) for row in rows]
    order = sorted(range(len(rows)), key=lambda number: -spots[number][1])
    wanted = [float(spots[number][1]) / scale for number in order]
    heights = spread(wanted, _LINE, top=figure.bbox.height / scale - 30, bottom=_BELOW)
    width = figure.bbox.width / scale
    for number, height in zip(order, heights, strict=True):
        color = colors.series[number % len(colors.series)]
        row, (x, y) = rows[number], spots[number]
        axes.annotate(
            f"{row.recipe}  {row.ratio().value:.3f}",
            (x / scale, y / scale),
            (_NAMES * width, height),
            xycoords="figure points",
            textcoords="figure points",
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def spread(wanted: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Descending heights, at least `gap` apart, near the descending `wanted` ones, and above `bottom` if possible."""
    heights: list[float] = []
    for height in wanted:
        heights.append(min([height, top, *(heights[-1:] and [heights[-1] - gap])]))
    if heights and heights[-1] < bottom:
        lowest = bottom
        for number in reversed(range(len(heights))):
            heights[number] = max(heights[number], lowest)
            lowest = heights[number] + gap
    return heights
