"""The pictures of a report, each drawn on a matplotlib Figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mxrot.evaluation import ActivationView
from mxrot.evaluation.activations import FIRST_OCTAVE, PARTS_OF_OCTAVE
from mxrot.report.contents import Contents
from mxrot.report.drawing import Palette, Picture

_MARKERS = "os^Dvp"
LIGHTEST = 0.5
"""Of the median; smaller values are not told apart."""


def pictures(contents: Contents) -> dict[str, Picture]:
    """Every picture by its name."""
    linears = [linear for block in contents.run["blocks"] for linear in block["linears"]]
    found: dict[str, Picture] = {}
    for key, title in (("weight_error", "Weights"), ("output_error", "Outputs of the linears")):
        depth = _by_depth(contents, [(linear["name"], linear[key]) for linear in linears if linear[key] is not None])
        if depth:
            found[key] = Picture(250, partial(draw_depth, title=title, values=depth))
    before, after = (_rounding_errors(contents, views) for views in (contents.before, contents.after))
    if after:
        draw = partial(draw_depth, title="Rounding of the inputs", values=after, before=before)
        found["input_error"] = Picture(250, draw)
    for name in contents.chosen:
        pair = contents.before[name], contents.after[name]
        found[f"magnitudes-{name}"] = Picture(290, partial(draw_magnitudes, pair=pair))
        found[f"maxima-{name}"] = Picture(180, partial(draw_block_maxima, pair=pair))
    if contents.exponents:
        found["exponents"] = Picture(230, partial(draw_exponents, exponents=contents.exponents))
    return found


def _rounding_errors(contents: Contents, views: dict[str, ActivationView]) -> dict[str, dict[int, float]]:
    errors = [(name, view.rounding_error) for name, view in views.items() if view.rounding_error is not None]
    return _by_depth(contents, errors)


def _by_depth(contents: Contents, values: Sequence[tuple[str, float]]) -> dict[str, dict[int, float]]:
    """Means over the linears of a site, by site and block."""
    sums: dict[str, dict[int, list[float]]] = {}
    for linear, value in values:
        block, site = contents.site_of(linear)
        sums.setdefault(site, {}).setdefault(block, []).append(value)
    return {site: {block: sum(x) / len(x) for block, x in blocks.items()} for site, blocks in sums.items()}


def draw_depth(
    figure: Any,
    colors: Palette,
    title: str,
    values: dict[str, dict[int, float]],
    before: dict[str, dict[int, float]] | None = None,
) -> None:
    """One line a site over the decoder blocks; `before` is drawn dashed."""
    axes = figure.subplots()
    for number, (site, blocks) in enumerate(values.items()):
        color = colors.series[number % len(colors.series)]
        if before and site in before:
            axes.plot(list(before[site]), list(before[site].values()), color=color, linestyle=(0, (2, 2)), linewidth=1)
        marker = _MARKERS[number % len(_MARKERS)]
        axes.plot(list(blocks), list(blocks.values()), color=color, marker=marker, label=site)
    axes.set(title=title, xlabel="decoder block", ylabel="relative error")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if before:
        axes.plot([], [], color=colors.ink, linestyle=(0, (2, 2)), linewidth=1, label="before")
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.8, columnspacing=1.1)


def draw_magnitudes(figure: Any, colors: Palette, pair: tuple[ActivationView, ActivationView]) -> None:
    """|x| over channel and token before and after, each in units of its median, in one scale of colours."""
    from matplotlib.colors import LogNorm

    top = max(float(view.magnitudes.max()) / view.median for view in pair)
    darkest = max(top, 2 * LIGHTEST)
    norm = LogNorm(LIGHTEST, darkest, clip=True)
    every = figure.subplots(2, 1, sharex=True)
    for axes, view, title in zip(every, pair, ("Before", "After"), strict=True):
        shown = (view.magnitudes / view.median).clamp_min(LIGHTEST).numpy()
        extent = (0, view.channels, len(shown), 0)
        image = axes.imshow(shown, "magma_r", norm, aspect="auto", interpolation="none", extent=extent)
        axes.set(title=f"{title}: largest is {_plain(view.largest / view.median)} times the median", ylabel="token")
        axes.grid(False)
    every[1].set_xlabel("channel")
    bar = figure.colorbar(image, ax=list(every), orientation="horizontal", aspect=40, pad=0.03, format=_plain)
    bar.set_ticks(log_ticks(LIGHTEST, darkest))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("|x| beside the median")


def log_ticks(low: float, high: float, least: int = 3, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis: powers of ten, and with these between them what it
    takes for `least` ticks; even steps where that is not enough."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
        ticks = [part * 10.0**decade for decade in decades for part in parts if low <= part * 10.0**decade <= high]
        if len(ticks) >= least:
            return ticks[:: -(-len(ticks) // most)]
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def _plain(value: float, _: object = None) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def draw_block_maxima(figure: Any, colors: Palette, pair: tuple[ActivationView, ActivationView]) -> None:
    """How large the maxima of blocks are, before and after, in units of the median."""
    axes = figure.subplots()
    for view, color, label in zip(pair, (colors.before, colors.after), ("before", "after"), strict=True):
        used = torch.nonzero(view.block_maxima).flatten().tolist() or [0]
        first, last = used[0], used[-1] + 1
        edges = [2.0 ** (FIRST_OCTAVE + e / PARTS_OF_OCTAVE) / view.median for e in range(first, last + 1)]
        counts = view.block_maxima[first:last]
        shares = (100 * counts / counts.sum().clamp_min(1)).tolist()
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(shares, edges, color=color, label=label, linewidth=1.3)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks(log_ticks(low, high))
    axes.xaxis.set_major_formatter(_plain)
    axes.minorticks_off()
    axes.set(title="Block maxima", xlabel="max |x| of a block of 32 beside the median", ylabel="blocks, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def draw_exponents(figure: Any, colors: Palette, exponents: dict[str, Tensor]) -> None:
    """How often weights have each block scale, by site."""
    axes = figure.subplots()
    used = torch.nonzero(sum(exponents.values(), torch.zeros(256, dtype=torch.int64))).flatten()
    first, last = int(used.min()), int(used.max()) + 1
    for number, (site, counts) in enumerate(exponents.items()):
        shares = (100 * counts[first:last] / counts.sum()).tolist()
        marker, color = _MARKERS[number % len(_MARKERS)], colors.series[number % len(colors.series)]
        axes.plot(range(first - 127, last - 127), shares, color=color, marker=marker, label=site)
    axes.set(title="Scales of the weights", xlabel="exponent e of the block scale 2^e", ylabel="blocks, %")
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=5, handlelength=1.8, columnspacing=1.1)
