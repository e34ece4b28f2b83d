"""The elements of pages: headings with a table of contents, figures, tables. A page is one file that loads nothing
else.

The only script of a page (page.js) shows values under the pointer and sorts tables. A page is complete without it. No
other script can run, because the page's policy names the hash of this one. All arguments are HTML, except those
described as plain text.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from mxrot.report.drawing import DARK, LIGHT, Palette, Picture, inline_svg

_PAGE = Path(__file__).with_name("page.html")
_SCRIPT = Path(__file__).with_name("page.js")
Drawn = dict[str, str]
"""SVG pictures by name, each with a link to its numbers."""


@dataclass(frozen=True)
class Section:
    """A part of a page."""

    title: str
    """Plain text."""
    body: str


@dataclass(frozen=True)
class Cell:
    """A table cell with more than its HTML."""

    html: str
    value: float | None = None
    """The value for sorting."""
    is_far: bool = False
    """True if it is far off."""
    is_text: bool = False
    """True for text that can take several lines."""


def page_of(title: str, heading: str, sections: Sequence[Section]) -> str:
    """A page with a list of its sections. Sections without a body are left out."""
    shown = [section for section in sections if section.body]
    names = [_anchor(section.title) for section in shown]
    links = "".join(
        f'<a href="#{name}">{escape(section.title)}</a>' for name, section in zip(names, shown, strict=True)
    )
    parts = [
        f'<section id="{name}">\n<h2>{escape(section.title)}</h2>\n{section.body}\n</section>'
        for name, section in zip(names, shown, strict=True)
    ]
    script = _SCRIPT.read_text(encoding="utf-8")
    filled = Template(_PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(title),
        light=_variables(LIGHT),
        dark=_variables(DARK),
        body="\n".join([heading, f'<nav aria-label="Contents">{links}</nav>', *parts]),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    return filled.encode("utf-8", "xmlcharrefreplace").decode()  # a path can be non-UTF-8


def drawn_for_page(pictures: dict[str, Picture]) -> Drawn:
    """Each picture as SVG, with its numbers as a link."""
    return {
        name: f'{inline_svg(name, picture)}<a class="csv" download="{escape(name)}.csv" '
        f'href="{picture.sheet.link()}">CSV</a>'
        for name, picture in pictures.items()
    }


def figure(drawn: str, caption: str = "") -> str:
    """A picture of `drawn_for_page`. The caption is plain text."""
    return f"<figure>{drawn}{f'<figcaption>{escape(caption)}</figcaption>' if caption else ''}</figure>"


def tiles(shown: Iterable[tuple[str, str]]) -> str:
    """Figures with their labels, both plain text."""
    each = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(t)}</span></div>' for b, t in shown)
    return f'<div class="tiles">{each}</div>'


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str | Cell]],
    wide_last: bool = False,
    is_text: bool = False,
    is_sortable: bool = False,
) -> str:
    """A table. Headings are plain text. It scrolls on its own if it is too wide."""
    kind = ' class="text"' if is_text else ""
    top = "".join(f"<th{kind}>{escape(heading)}</th>" for heading in headings)
    body = []
    for row in rows:
        last = "track" if wide_last else "text" if is_text else ""
        kinds = [*("text" if is_text else "" for _ in row[:-1]), last]
        body.append(f"<tr>{''.join(_cell(cell, kind) for cell, kind in zip(row, kinds, strict=True))}</tr>")
    head = f"<thead><tr>{top}</tr></thead>" if any(headings) else ""
    sortable = ' class="sortable"' if is_sortable else ""
    return f'<div class="scroll"><table{sortable}>{head}<tbody>{"".join(body)}</tbody></table></div>'


def details(summary: str, body: str) -> str:
    """Content that opens on a click. The summary is plain text."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def command_words(command: str) -> str:
    """The command with unbreakable words: a browser can break a line after any hyphen."""
    return " ".join(f'<span class="word">{escape(word)}</span>' for word in command.split(" "))


def number(value: float | None, style: str = ".4f", is_far: bool = False) -> Cell:
    """A number as a cell."""
    if value is None or not math.isfinite(value):
        return Cell("" if value is None else escape(str(value)))
    return Cell(f"{value:{style}}", value, is_far)


def _cell(cell: str | Cell, kind: str) -> str:
    if isinstance(cell, str):
        cell = Cell(cell)
    kinds = " ".join(each for each in (kind, "text" if cell.is_text else "", "far" if cell.is_far else "") if each)
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    return f"<td{f' class={chr(34)}{kinds}{chr(34)}' if kinds else ''}{value}>{cell.html}</td>"


def _anchor(title: str) -> str:
    return "-".join(title.lower().split())


def _variables(palette: Palette) -> str:
    return " ".join(f"--{name}: {color};" for name, color in palette.named().items())
