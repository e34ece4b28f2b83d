"""A measured figure of a quantized model, as cards and reports show it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One measured figure of a quantized model, with that of the original if it is known."""

    name: str
    """The text or task."""
    measure: str
    value: float
    error: float | None = None
    """The standard error of `value`."""
    original: float | None = None
    difference_error: float | None = None
    """The standard error of `value` minus `original`, if both were measured on the same text."""
    counted: str = ""
    """The amount of text or examples that was measured."""
    is_share: bool = False
    """The figure is shown in percent."""
    digits: int = 3
    """Digits after the point, for a figure that is not a share."""

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """The name, measure, original, value, difference and measured amount, as tables show them."""
        difference = None if self.original is None else self.value - self.original
        return (
            self.name,
            self.measure + (", %" if self.is_share else ""),
            self._shown(self.original),
            self._shown(self.value, self.error),
            self._shown(difference, self.difference_error, signed=True),
            self.counted,
        )

    def _shown(self, value: float | None, error: float | None = None, signed: bool = False) -> str:
        if value is None:
            return ""
        factor, digits = (100, 2) if self.is_share else (1, self.digits)
        shown = f"{factor * value:{'+' if signed else ''}.{digits}f}"
        return shown if error is None or math.isnan(error) else f"{shown} ± {factor * error:.{digits}f}"
