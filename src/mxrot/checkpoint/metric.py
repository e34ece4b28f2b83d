"""A measured figure of a quantized model, as cards and reports show it."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One measured figure of a quantized model, beside that of the original where it is known."""

    name: str
    """The text or task."""
    measure: str
    value: float
    error: float | None = None
    """Standard error of `value`."""
    original: float | None = None
    difference_error: float | None = None
    """Standard error of `value` less `original`, where both were measured on the same text."""
    counted: str = ""
    """On how much it was measured."""
    is_share: bool = False
    """Shown in percent."""
    digits: int = 3
    """Shown behind the point, where it is no share."""

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Name, measure, original, value, difference and what was counted, as tables show them."""
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
