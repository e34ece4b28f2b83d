"""An axis that would have no ticks gets some; one that has keeps its own."""

from __future__ import annotations

import pytest


def test_an_axis_without_ticks_in_view_gets_three() -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    from mxrot.report.drawing import give_ticks

    axes = Figure().subplots()
    axes.set_yscale("log")
    axes.set(xlim=(0, 1), ylim=(1.2, 1.3))
    own = list(axes.get_xticks())
    assert not [tick for tick in axes.get_yticks() if 1.2 <= tick <= 1.3]
    give_ticks(axes)
    assert list(axes.get_yticks()) == pytest.approx([1.2, 1.25, 1.3])
    assert list(axes.get_xticks()) == own
