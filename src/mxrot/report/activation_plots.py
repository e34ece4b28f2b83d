"""Pictures of the inputs of a site, before its transform and after it, in units of the median of |x|."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.evaluation import ActivationView
from mxrot.evaluation.activations import FIRST_OCTAVE, PARTS_OF_OCTAVE
from mxrot.report.drawing import Cells, Marks, Palette, Picture, Points
from mxrot.report.sheet import Sheet
from mxrot.report.ticks import log_ticks, plain

LIGHTEST = 0.5
"""Relative to the median. Smaller values have the same colour."""
SURFACE = 64
"""The most rows and columns of a surface. Each shows the largest value of those that it covers."""
_TITLES = ("before", "after")
Pair = tuple[ActivationView, ActivationView]


def magnitudes_picture(pair: Pair) -> Picture:
    """|x| over channel and token."""
    return Picture(290, partial(draw_magnitudes, pair=pair), sheet=_sheet([_relative(view) for view in pair], pair))


def maxima_picture(pair: Pair) -> Picture:
    """The distribution of the maxima of blocks."""
    rows = [
        [title, low, high, share]
        for view, title in zip(pair, _TITLES, strict=True)
        for low, high, share in _maxima(view)
    ]
    sheet = Sheet(["transform", "from", "to", "blocks %"], rows)
    return Picture(180, partial(draw_block_maxima, pair=pair), sheet=sheet)


def surface_picture(pair: Pair) -> Picture:
    """|x| over channel and token as a surface."""
    maps = [_coarse(_relative(view)) for view in pair]
    return Picture(250, partial(draw_surfaces, maps=maps, channels=pair[0].channels), 520, _sheet(maps, pair))


def _relative(view: ActivationView) -> Tensor:
    return view.magnitudes / view.median


def _sheet(maps: list[Tensor], pair: Pair) -> Sheet:
    """A line for each row of the maps, with three digits to keep the page small."""
    rows = []
    for values, view, title in zip(maps, pair, _TITLES, strict=True):
        step = -(-min(len(view.magnitudes), SURFACE * 2) // len(values))
        rows += [[title, number * step, *(f"{x:.3g}" for x in row)] for number, row in enumerate(values.tolist())]
    width = -(-pair[0].channels // maps[0].shape[1])
    return Sheet(["transform", "token", *(f"channel {width * each}" for each in range(maps[0].shape[1]))], rows)


def _coarse(values: Tensor) -> Tensor:
    """Maxima of neighbours, with at most SURFACE rows and columns."""
    sizes = [-(-side // SURFACE) for side in values.shape]
    missing = [-side % size for side, size in zip(values.shape, sizes, strict=True)]
    padded = nn.functional.pad(values, (0, missing[1], 0, missing[0]))
    return nn.functional.max_pool2d(padded[None], tuple(sizes))[0]


def draw_magnitudes(figure: Any, colors: Palette, pair: Pair) -> Marks:
    """|x| over channel and token before and after, each in units of its median, with a common colour scale."""
    from matplotlib.colors import LogNorm

    top = max(float(_relative(view).max()) for view in pair)
    darkest = max(top, 2 * LIGHTEST)
    norm = LogNorm(LIGHTEST, darkest, clip=True)
    every = figure.subplots(2, 1, sharex=True)
    for axes, view, title in zip(every, pair, ("Before", "After"), strict=True):
        shown = _relative(view).clamp_min(LIGHTEST).numpy()
        extent = (0, view.channels, len(shown), 0)
        image = axes.imshow(shown, "magma_r", norm, aspect="auto", interpolation="none", extent=extent)
        axes.set(title=f"{title}: largest is {plain(view.largest / view.median)} times the median", ylabel="token")
        axes.grid(False)
    every[1].set_xlabel("channel")
    bar = figure.colorbar(image, ax=list(every), orientation="horizontal", aspect=40, pad=0.03, format=plain)
    bar.set_ticks(log_ticks(LIGHTEST, darkest))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label("|x| beside the median")
    rows, columns = pair[0].magnitudes.shape
    firsts = (0, rows)
    return [
        Cells(axes, first, len(view.magnitudes), columns, 2, "times the median")
        for axes, view, first in zip(every, pair, firsts, strict=True)
    ]


def draw_block_maxima(figure: Any, colors: Palette, pair: Pair) -> Marks:
    """The distribution of the maxima of blocks, before and after, in units of the median."""
    axes = figure.subplots()
    points = []
    for view, color, label in zip(pair, (colors.before, colors.after), _TITLES, strict=True):
        bins = _maxima(view)
        edges, shares = [*(low for low, _, _ in bins), bins[-1][1]], [share for _, _, share in bins]
        points += [
            ((low * high) ** 0.5, share, f"{label}, {plain(low)} to {plain(high)}: {share:.2f} % of the blocks")
            for low, high, share in bins
        ]
        axes.stairs(shares, edges, fill=True, color=color, alpha=0.25)
        axes.stairs(shares, edges, color=color, label=label, linewidth=1.3)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xticks(log_ticks(low, high))
    axes.xaxis.set_major_formatter(plain)
    axes.minorticks_off()
    axes.set(title="Block maxima", xlabel="max |x| of a block of 32 beside the median", ylabel="blocks, %")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return [Points(axes, points)]


def _maxima(view: ActivationView) -> list[tuple[float, float, float]]:
    """Both ends of each bin in units of the median, and its share of blocks in per cent."""
    used = torch.nonzero(view.block_maxima).flatten().tolist() or [0]
    first, last = used[0], used[-1] + 1
    edges = [2.0 ** (FIRST_OCTAVE + e / PARTS_OF_OCTAVE) / view.median for e in range(first, last + 1)]
    counts = view.block_maxima[first:last]
    shares = (100 * counts / counts.sum().clamp_min(1)).tolist()
    return list(zip(edges, edges[1:], shares, strict=False))


def draw_surfaces(figure: Any, colors: Palette, maps: list[Tensor], channels: int) -> Marks:
    """The surfaces side by side, with a common height."""
    figure.set_layout_engine("none")
    top = max(float(values.max()) for values in maps)
    for number, (values, title) in enumerate(zip(maps, _TITLES, strict=True)):
        axes = figure.add_axes((0.01 + 0.49 * number, 0.06, 0.43, 0.86), projection="3d")
        x = torch.linspace(0, channels, values.shape[1]).expand(values.shape)
        y = torch.arange(len(values)).unsqueeze(1).expand(values.shape)
        axes.plot_surface(
            *(each.numpy() for each in (x, y, values)),
            cmap="magma_r",
            vmin=0,
            vmax=top,
            rcount=SURFACE,
            ccount=SURFACE,
            linewidth=0,
            antialiased=True,
            rasterized=True,
        )
        axes.set(title=f"{title.capitalize()}: largest {plain(float(values.max()))}", zlim=(0, top))
        axes.set_xlabel("channel", labelpad=-4)
        axes.set_ylabel("token", labelpad=-4)
        axes.tick_params(labelsize=8, pad=-2)
        axes.locator_params(nbins=4)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color((0, 0, 0, 0))
            axis._axinfo["grid"]["color"] = colors.grid
    return []
