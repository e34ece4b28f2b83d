"""What is alive at one moment, and what several kinds of stages are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mxrot.calibration import site_weights
from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape

CODED_BYTES = 1 + 1 / 32
"""A rounded weight before it is packed: its code and its part of a scale."""


@dataclass(frozen=True)
class Stage:
    """What is alive at one moment."""

    name: str
    terms: dict[str, float]
    """Bytes, by what they are for."""

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Pieces:
    """Bytes of the float64 weights [N, K] of a site that are rounded, and of those that are taken together."""

    whole: float
    together: float
    folded: float
    """Of the folded weights that are kept meanwhile."""

    @staticmethod
    def of(here: SiteShape) -> Pieces:
        count = here.rounded * here.inputs
        if count <= site_weights.MOST_TOGETHER:
            return Pieces(8.0 * count, 8.0 * count, 8.0 * count if here.scheme.stages else 0.0)
        rows = max(1, site_weights.ELEMENTS_AT_ONCE // here.inputs)
        return Pieces(8.0 * count, 8.0 * min(rows, max(here.rows)) * here.inputs, 0.0)


def merged_rotations(run: Run) -> dict[str, float]:
    """The matrices that are merged into the weights, which are kept as long as these are read."""
    return {"rotations": float(run.rotation_bytes)} if run.rotation_bytes else {}
