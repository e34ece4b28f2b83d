"""Errors over the depth of a model: lines over the decoder blocks, and a map of blocks and linears."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from mxrot.report.drawing import Marks, Palette, Picture, Points
from mxrot.report.far import far_off
from mxrot.report.sheet import Sheet

_MARKERS = "os^Dvp"
_ROW = 15
"""The height of a row of the map in points."""
Depth = dict[str, dict[int, float]]
"""Values by name and block."""


def depth_picture(
    title: str, values: Depth, before: Depth | None = None, columns: int = 5, height: int = 250
) -> Picture:
    """One line per name over the decoder blocks. `before` is drawn dashed."""
    both = [("", values), *([("before", before)] if before else [])]
    rows = [
        [name, *([kind] if before else []), block, value]
        for kind, of in both
        for name, blocks in of.items()
        for block, value in blocks.items()
    ]
    sheet = Sheet(["name", *(["transform"] if before else []), "block", "relative error"], rows)
    draw = partial(draw_depth, title=title, values=values, before=before, columns=columns)
    return Picture(height, draw, sheet=sheet)


def draw_depth(
    figure: Any, colors: Palette, title: str, values: Depth, before: Depth | None = None, columns: int = 5
) -> Marks:
    axes = figure.subplots()
    points = []
    for number, (name, blocks) in enumerate(values.items()):
        color, turn = colors.series[number % len(colors.series)], number // len(colors.series)
        if before and name in before:
            axes.plot(list(before[name]), list(before[name].values()), color=color, linestyle=(0, (2, 2)), linewidth=1)
            points += [(x, y, f"{name} before, block {x}: {y:.4f}") for x, y in before[name].items()]
        marker = _MARKERS[(number + turn) % len(_MARKERS)]
        axes.plot(list(blocks), list(blocks.values()), color=color, marker=marker, label=name)
        points += [(x, y, f"{name}, block {x}: {y:.4f}") for x, y in blocks.items()]
    axes.set(title=title, xlabel="decoder block", ylabel="relative error")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if before:
        axes.plot([], [], color=colors.ink, linestyle=(0, (2, 2)), linewidth=1, label="before")
    figure.legend(loc="outside lower center", ncols=columns, handlelength=1.8, columnspacing=1.1)
    return [Points(axes, points)]


@dataclass(frozen=True)
class ErrorMap:
    """The error of each linear of each block. For experts it is the mean over all experts of a block."""

    names: list[str]
    blocks: list[int]
    values: list[list[float | None]]
    """By name, then by block. None if the block has no such linear, or if it was not measured."""


def error_map(linears: Sequence[tuple[int, str, float | None]]) -> ErrorMap | None:
    """The map of (block, name in the block, error). None if nothing was measured."""
    sums: dict[str, dict[int, list[float]]] = {}
    for block, name, value in linears:
        kind = re.sub(r"\.\d+\.", ".*.", name)
        if value is not None:
            sums.setdefault(kind, {}).setdefault(block, []).append(value)
    if not sums:
        return None
    blocks = sorted({block for of in sums.values() for block in of})
    values = [[sum(of[b]) / len(of[b]) if b in of else None for b in blocks] for of in sums.values()]
    ends = [kind.rpartition(".")[2] for kind in sums]
    return ErrorMap(ends if len(set(ends)) == len(ends) else list(sums), blocks, values)


def map_picture(title: str, errors: ErrorMap) -> Picture:
    """A map of blocks and linears."""
    rows = [[name, *values] for name, values in zip(errors.names, errors.values, strict=True)]
    sheet = Sheet(["linear", *(f"block {block}" for block in errors.blocks)], rows)
    return Picture(_ROW * len(rows) + 105, partial(draw_map, title=title, errors=errors), sheet=sheet)


def draw_map(figure: Any, colors: Palette, title: str, errors: ErrorMap) -> Marks:
    """A linear that is far off, compared with the same linear of the other blocks, has a dot."""
    axes = figure.subplots()
    shown = [[float("nan") if value is None else value for value in values] for values in errors.values]
    left, right = errors.blocks[0] - 0.5, errors.blocks[-1] + 0.5
    image = axes.imshow(
        shown, "magma_r", aspect="auto", interpolation="none", extent=(left, right, len(shown) - 0.5, -0.5)
    )
    axes.grid(False)
    axes.set_yticks(range(len(errors.names)), errors.names)
    axes.set(title=title, xlabel="decoder block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    far = [
        (block, row)
        for row, values in enumerate(errors.values)
        for block, is_far in zip(errors.blocks, far_off(values), strict=True)
        if is_far
    ]
    axes.scatter([x for x, _ in far], [y for _, y in far], s=13, color=colors.after, edgecolors="white", linewidths=0.7)
    axes.set(xlim=(left, right), ylim=(len(shown) - 0.5, -0.5))
    bar = figure.colorbar(image, ax=axes, orientation="horizontal", aspect=40, pad=0.03)
    bar.outline.set_visible(False)
    bar.set_label("relative error")
    points = [
        (block, row, f"{name}, block {block}: {value:.4f}{', far off' if (block, row) in far else ''}")
        for row, (name, values) in enumerate(zip(errors.names, errors.values, strict=True))
        for block, value in zip(errors.blocks, values, strict=True)
        if value is not None
    ]
    return [Points(axes, points)]
