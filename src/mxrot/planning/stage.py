"""The memory at one moment, and the terms that several kinds of stages share."""

from __future__ import annotations

from dataclasses import dataclass

from mxrot.calibration import site_weights
from mxrot.planning.run import Run
from mxrot.planning.shape import SiteShape

CODED_BYTES = 1 + 1 / 32
"""A rounded weight before it is packed: its code and its part of a scale."""


@dataclass(frozen=True)
class Stage:
    """The tensors that are alive at one moment."""

    name: str
    terms: dict[str, float]
    """The bytes, by their use."""

    @property
    def total(self) -> float:
        return sum(self.terms.values())


@dataclass(frozen=True)
class Pieces:
    """The bytes of a site's float64 weights [N, K] that are rounded, and of the rows that are processed together."""

    whole: float
    together: float
    folded: float
    """The bytes of the folded weights that are kept meanwhile."""

    @staticmethod
    def of(here: SiteShape) -> Pieces:
        count = here.rounded * here.inputs
        if count <= site_weights.MOST_TOGETHER:
            return Pieces(8.0 * count, 8.0 * count, 8.0 * count if here.scheme.stages else 0.0)
        rows = max(1, site_weights.ELEMENTS_AT_ONCE // here.inputs)
        return Pieces(8.0 * count, 8.0 * min(rows, max(here.rows)) * here.inputs, 0.0)


def merged_rotations(run: Run) -> dict[str, float]:
    """The matrices that are merged into the weights. They are kept as long as weights are read."""
    return {"rotations": float(run.rotation_bytes)} if run.rotation_bytes else {}
