"""Drawing pictures for a page and for files: matplotlib (the extra `report`), colours, SVG.

The pictures of a page are drawn in placeholder colours, which are replaced by CSS variables, so that one drawing suits
a light and a dark page. Each comes with its numbers, as CSV, and the values that a pointer shows.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from mxrot.checkpoint.named_file import write_named
from mxrot.errors import ConfigError
from mxrot.report.sheet import Sheet

WIDTH = 340
"""The width of a picture in points. It is that of a phone, where its letters have the size of the page's."""


@dataclass(frozen=True)
class Palette:
    """The colours of a picture, as #rrggbb."""

    ink: str
    grid: str
    before: str
    after: str
    series: tuple[str, ...]

    def named(self) -> dict[str, str]:
        """Each colour by the name of its CSS variable."""
        series = {f"series{number}": color for number, color in enumerate(self.series)}
        return {"ink": self.ink, "grid": self.grid, "before": self.before, "after": self.after, **series}


LIGHT = Palette(
    "#3b4250", "#d9dde5", "#d97706", "#2563eb", ("#2563eb", "#d97706", "#059669", "#c026d3", "#64748b", "#b91c1c")
)
DARK = Palette(
    "#c3c9d4", "#353b47", "#f5a524", "#7aa7ff", ("#7aa7ff", "#f5a524", "#34d399", "#e879f9", "#94a3b8", "#f87171")
)
_STANDS = Palette("#010203", "#010204", "#010205", "#010206", tuple(f"#0102{number:02x}" for number in range(7, 13)))
"""Placeholders: each stands for a CSS variable of the page."""
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # keep text as text: the page chooses the font
    "text.parse_math": False,
    "image.composite_image": False,
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.fontsize": 10.5,
}
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
LEAST_TICKS = 2
_COLOR_BAR = "<colorbar>"
"""matplotlib's label for the axes of a colour bar, which have a scale on one side only."""


@dataclass(frozen=True)
class Points:
    """Points on axes with a text each: x and y in data coordinates, and the words."""

    axes: Any
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Cells:
    """Axes with a map of `rows` times `columns` values of the picture's sheet."""

    axes: Any
    first: int
    """The row of the sheet that is drawn on top."""
    rows: int
    columns: int
    skipped: int
    """The number of columns of the sheet before the values."""
    unit: str


Marks = Sequence[Points | Cells]
Draw = Callable[[Any, Palette], Marks]
"""Draws on a matplotlib Figure, and returns the marks for the pointer."""


@dataclass(frozen=True)
class Picture:
    """One drawing."""

    height: int
    """The height in points."""
    draw: Draw
    width: int = WIDTH
    sheet: Sheet = field(default_factory=Sheet)
    """The numbers of the picture."""


def check_matplotlib(what: str = "a report") -> None:
    """ConfigError, naming `what` needs matplotlib, if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs the package matplotlib: pip install 'mxrot[report]'")


def inline_svg(name: str, picture: Picture) -> str:
    """The picture as an SVG element of a page, with the CSS variables of `Palette.named`."""
    file, found = _rendered(name, picture, _STANDS, "svg", "none")
    drawn = file.decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for variable, color in _STANDS.named().items():
        svg = svg.replace(color, f"var(--{variable})")
    svg = _own_names(svg, re.sub(r"\W", "-", name))
    return svg.replace("<svg", f'<svg role="img" data-marks="{escape(json.dumps(found, separators=(",", ":")))}"', 1)


def _own_names(svg: str, prefix: str) -> str:
    """The SVG with ids that are unique on the page. Unused ids are dropped."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def write_files(folder: Path, drawn: dict[str, Picture]) -> None:
    """Write every picture as NAME.svg and NAME.png, on white, and its numbers as NAME.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        write_named(folder / f"{name}.csv", picture.sheet.csv().encode())
        for kind in ("svg", "png"):
            write_named(folder / f"{name}.{kind}", render(name, picture, LIGHT, kind, "white"))


def render(name: str, picture: Picture, colors: Palette, kind: str, background: str = "none") -> bytes:
    """The bytes of the file. They are the same for the same picture."""
    return _rendered(name, picture, colors, kind, background)[0]


def _rendered(name: str, picture: Picture, colors: Palette, kind: str, background: str) -> tuple[bytes, list[Any]]:
    """The file, and the pointer marks, in points from the upper left corner."""
    import matplotlib
    from matplotlib.figure import Figure

    own = {**dict.fromkeys(_INKED, colors.ink), "grid.color": colors.grid, "svg.hashsalt": name}
    with matplotlib.rc_context({**_SETTINGS, **own}):
        figure = Figure(figsize=(picture.width / 72, picture.height / 72), layout="constrained", facecolor="none")
        marks = picture.draw(figure, colors)
        for axes in figure.axes:
            axes.set_facecolor("none")
            if axes.get_label() != _COLOR_BAR:
                give_ticks(axes)
        file = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        dpi = 72 if kind == "svg" else 200
        figure.savefig(file, format=kind, facecolor=background, dpi=dpi, metadata=metadata)
        found = [placed for mark in marks for placed in _placed(mark, figure, picture.height)]
    return file.getvalue(), found


def give_ticks(axes: Any) -> None:
    """Set three ticks on an axis with fewer than LEAST_TICKS in view, such as a logarithmic one with a narrow range."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, FormatStrFormatter, LinearLocator

    for axis in (axes.xaxis, axes.yaxis):
        named = isinstance(axis.get_major_formatter(), FixedFormatter)
        low, high = sorted(axis.get_view_interval())
        if not named and sum(low <= tick <= high for tick in axis.get_majorticklocs()) < LEAST_TICKS:
            axis.set_major_locator(FixedLocator(LinearLocator(3).tick_values(low, high)))
            axis.set_major_formatter(FormatStrFormatter("%.3g"))


def _placed(mark: Points | Cells, figure: Any, height: int) -> list[Any]:
    """A mark for the page's script: [x, y, words] for a point, a table with the box for a map."""
    scale = 72 / figure.dpi
    if isinstance(mark, Cells):
        box = mark.axes.get_window_extent()
        place = [box.x0 * scale, height - box.y1 * scale, box.width * scale, box.height * scale]
        own = {key: value for key, value in vars(mark).items() if key != "axes"}
        return [{"box": [round(float(value), 1) for value in place], **own}]
    at = mark.axes.transData.transform([(x, y) for x, y, _ in mark.points]) if mark.points else []
    return [
        [round(float(x) * scale, 1), round(height - float(y) * scale, 1), said]
        for (x, y), (_, _, said) in zip(at, mark.points, strict=True)
    ]
