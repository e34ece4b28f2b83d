"""KL of each token of a passage."""

from __future__ import annotations

from functools import partial
from typing import Any

from mxrot.report.contents import ShownPassage
from mxrot.report.drawing import Marks, Palette, Picture, Points
from mxrot.report.sheet import Sheet


def passage_picture(passage: ShownPassage) -> Picture:
    """A bar for each token."""
    columns = ["position", "token", "KL nats", "original expected", "quantized expected"]
    return Picture(170, partial(draw_passage, passage=passage), sheet=Sheet(columns, passage.rows))


def draw_passage(figure: Any, colors: Palette, passage: ShownPassage) -> Marks:
    axes = figure.subplots()
    places = [row[0] for row in passage.rows]
    axes.bar(places, [row[2] for row in passage.rows], color=colors.before, width=0.8)
    axes.set(title="KL in the worst passage", xlabel="position in the window", ylabel="nats a token")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return [Points(axes, [(row[0], row[2], said) for row, said in zip(passage.rows, passage.said, strict=True)])]
