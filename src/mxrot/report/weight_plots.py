"""Pictures of the weights: the distributions of their scales and of their values."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxrot.evaluation.weight_values import BINS, REACH
from mxrot.report.drawing import Marks, Palette, Picture, Points
from mxrot.report.sheet import Sheet
from mxrot.report.ticks import plain

_MARKERS = "os^Dvp"
_PANEL = 105
"""The height of a row of histograms in points."""
Spread = dict[str, Tensor]
"""Counts [BINS] of weights by site."""


def exponents_picture(exponents: dict[str, Tensor]) -> Picture:
    """The frequency of each block scale of the weights, by site."""
    rows = [[site, e, share] for site, shares in _exponents(exponents).items() for e, share in shares.items()]
    return Picture(
        230, partial(draw_exponents, exponents=exponents), sheet=Sheet(["site", "exponent", "blocks %"], rows)
    )


def _exponents(exponents: dict[str, Tensor]) -> dict[str, dict[int, float]]:
    used = torch.nonzero(sum(exponents.values(), torch.zeros(256, dtype=torch.int64))).flatten()
    first, last = int(used.min()), int(used.max()) + 1
    return {
        site: dict(zip(range(first - 127, last - 127), (100 * counts[first:last] / counts.sum()).tolist(), strict=True))
        for site, counts in exponents.items()
    }


def draw_exponents(figure: Any, colors: Palette, exponents: dict[str, Tensor]) -> Marks:
    axes = figure.subplots()
    points = []
    for number, (site, shares) in enumerate(_exponents(exponents).items()):
        marker, color = _MARKERS[number % len(_MARKERS)], colors.series[number % len(colors.series)]
        axes.plot(list(shares), list(shares.values()), color=color, marker=marker, label=site)
        points += [(e, share, f"{site}, scale 2^{e}: {share:.2f} % of the blocks") for e, share in shares.items()]
    axes.set(title="Scales of the weights", xlabel="exponent e of the block scale 2^e", ylabel="blocks, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.8, columnspacing=1.1)
    return [Points(axes, points)]


def histograms_picture(quantized: Spread, original: Spread) -> Picture:
    """The distribution of the weights of each site, with that of the original if it is given."""
    rows = [
        [site, low, high, *(_shares(of[site])[number] if site in of else None for of in (original, quantized))]
        for site in quantized
        for number, (low, high) in enumerate(_bins())
    ]
    sheet = Sheet(["site", "from", "to", "original %", "quantized %"], rows)
    height = _PANEL * (-(-len(quantized) // 2)) + 75
    return Picture(height, partial(draw_histograms, quantized=quantized, original=original), sheet=sheet)


def _bins() -> list[tuple[float, float]]:
    edges = [round(-REACH + 2 * REACH * number / BINS, 6) for number in range(BINS + 1)]
    return list(itertools.pairwise(edges))


def _shares(counts: Tensor) -> list[float]:
    shares: list[float] = (100 * counts / counts.sum().clamp_min(1)).tolist()
    return shares


def draw_histograms(figure: Any, colors: Palette, quantized: Spread, original: Spread) -> Marks:
    """Draw one panel per site, with shares on a logarithmic axis."""
    bins, marks = _bins(), []
    edges = [*(low for low, _ in bins), bins[-1][1]]
    panels = figure.subplots(-(-len(quantized) // 2), min(2, len(quantized)), sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(quantized) :]:
        axes.remove()
    for axes, site in zip(panels.flat, quantized, strict=False):
        points = []
        both = [(original, colors.before, "original"), (quantized, colors.after, "quantized")]
        for of, color, label in [each for each in both if site in each[0]]:
            shares = _shares(of[site])
            axes.stairs(shares, edges, color=color, label=label, fill=label == "original", alpha=0.6)
            points += [
                ((low + high) / 2, share, f"{site} {label}, {low:g} to {high:g}: {share:.3g} %")
                for (low, high), share in zip(bins, shares, strict=True)
                if share
            ]
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plain)
        axes.set_title(site)
        marks.append(Points(axes, points))
    for axes in panels[-1]:
        axes.set_xlabel("weight / its linear's RMS")
    for axes in panels[:, 0]:
        axes.set_ylabel("weights, %")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return marks
