"""How a picture gets into a page and into a file: matplotlib (the extra `report`), colours, SVG.

Each picture of a page is drawn in colours that only stand for something, and these become CSS variables, so that one
drawing suits a light and a dark page.
"""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxrot.checkpoint.named_file import write_named
from mxrot.errors import ConfigError

WIDTH = 340
"""Of a picture, in points: as wide as a phone, so that its letters are of the page's size there."""


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
"""No colours: each stands for a variable of the page."""
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # letters stay letters: the page chooses the font
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
Draw = Callable[[Any, Palette], None]
"""Draws on a matplotlib Figure."""


@dataclass(frozen=True)
class Picture:
    """One drawing."""

    height: int
    """In points."""
    draw: Draw
    width: int = WIDTH


def check_matplotlib(what: str = "a report") -> None:
    """ConfigError, which says `what` needs it, if it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs the package matplotlib: pip install 'mxrot[report]'")


def inline_svg(name: str, picture: Picture) -> str:
    """The picture as an SVG element of a page, in the CSS variables of `Palette.named`."""
    drawn = render(name, picture, _STANDS, "svg").decode()
    svg = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for variable, color in _STANDS.named().items():
        svg = svg.replace(color, f"var(--{variable})")
    return _own_names(svg, re.sub(r"\W", "-", name))


def _own_names(svg: str, prefix: str) -> str:
    """Each id under a name that no other picture of the page has; those that nothing refers to are dropped."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def write_files(folder: Path, drawn: dict[str, Picture]) -> None:
    """Every picture as NAME.svg and NAME.png, on white."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in drawn.items():
        for kind in ("svg", "png"):
            write_named(folder / f"{name}.{kind}", render(name, picture, LIGHT, kind, "white"))


def render(name: str, picture: Picture, colors: Palette, kind: str, background: str = "none") -> bytes:
    """The bytes of a file; the same for the same picture."""
    import matplotlib
    from matplotlib.figure import Figure

    own = {**dict.fromkeys(_INKED, colors.ink), "grid.color": colors.grid, "svg.hashsalt": name}
    with matplotlib.rc_context({**_SETTINGS, **own}):
        figure = Figure(figsize=(picture.width / 72, picture.height / 72), layout="constrained", facecolor="none")
        picture.draw(figure, colors)
        for axes in figure.axes:
            axes.set_facecolor("none")
        file = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        dpi = 72 if kind == "svg" else 200
        figure.savefig(file, format=kind, facecolor=background, dpi=dpi, metadata=metadata)
    return file.getvalue()
