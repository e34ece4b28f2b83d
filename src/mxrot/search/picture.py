"""The picture of a search: KL against bits of all measurements."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from mxrot.report.drawing import LIGHT, Marks, Palette, Picture, render
from mxrot.report.ticks import log_ticks
from mxrot.search.bits import Bits
from mxrot.search.found import QUANTIZED, SEARCHED, Found, Measured

_STAGES = ("a block", "a kind", "candidate")
_WIDTH, _HEIGHT = 520, 330


def picture_file(found: Found, title: str, kind: str) -> bytes:
    """The picture as PNG or SVG, by the ending `kind`."""
    return render("search", Picture(_HEIGHT, partial(draw, found=found, title=title), _WIDTH), LIGHT, kind, "white")


def draw(figure: Any, colors: Palette, found: Found, title: str) -> Marks:
    """Draw the limited bits on one axis, KL on a logarithmic one. The line is the least KL up to each bit count."""
    counts_inputs = found.limits.weights is None
    axes = figure.subplots()
    axes.set_yscale("log")
    for number, stage in enumerate(_STAGES):
        own = [one for one in found.measured if one.stage == stage]
        if own:
            color, size = colors.series[(number + 1) % len(colors.series)], 9 if stage == "candidate" else 16
            where = [_of(one.bits, counts_inputs) for one in own]
            axes.scatter(where, [one.kl.mean for one in own], s=size, color=color, label=_label(stage), linewidths=0)
    steps = _lower_edge(found.measured, counts_inputs)
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=colors.ink, linewidth=0.8)
    most = max(_of(row.bits, counts_inputs) for row in found.rows)
    for row in found.rows:
        if row.label == QUANTIZED:
            continue
        x, y = _of(row.bits, counts_inputs), row.seen.mean
        is_found = row.label == SEARCHED
        axes.plot([x], [y], marker="*" if is_found else "s", markersize=11 if is_found else 6, color=colors.series[0])
        name, is_right = "mixture" if is_found else row.label, x == most
        offset, side = (-6 if is_right else 6, 6), "right" if is_right else "left"
        axes.annotate(name, (x, y), offset, textcoords="offset points", ha=side, fontsize=9)
    limit = found.limits.inputs if counts_inputs else found.limits.weights
    if limit is not None:
        axes.axvline(limit, color=colors.ink, linewidth=1, linestyle=(0, (2, 2)))
    axes.margins(x=0.12, y=0.08)
    low, high = axes.get_ylim()
    axes.set_yticks(log_ticks(low, high))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.minorticks_off()
    axes.set_ylim(low, high)
    axes.set(title=title, xlabel=f"bits {'an input' if counts_inputs else 'a weight'}", ylabel="KL, nats a token")
    figure.legend(loc="outside lower center", ncols=3)
    return []


def _of(bits: Bits, counts_inputs: bool) -> float:
    return bits.inputs if counts_inputs else bits.weights


def _label(stage: str) -> str:
    return {"a block": "one block", "a kind": "one kind"}.get(stage, "single raises")


def _lower_edge(measured: Sequence[Measured], counts_inputs: bool) -> list[tuple[float, float]]:
    """Bits and KL of the mixtures that no mixture with as few bits beats, by rising bits."""
    found: list[tuple[float, float]] = []
    for bits, kl in sorted((_of(one.bits, counts_inputs), one.kl.mean) for one in measured):
        if not found or kl < found[-1][1]:
            found.append((bits, kl))
    return found
