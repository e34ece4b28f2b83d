"""Ticks of axes, and the spelling of their numbers."""

from __future__ import annotations

import math


def log_ticks(low: float, high: float, least: int = 3, most: int = 8) -> list[float]:
    """Round numbers from `low` to `high` for a logarithmic axis: powers of ten, with as many between them as `least`
    ticks need. Even steps if this is not enough."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for parts in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)):
        ticks = [part * 10.0**decade for decade in decades for part in parts if low <= part * 10.0**decade <= high]
        if len(ticks) >= least:
            return ticks[:: -(-len(ticks) // most)]
    return [float(tick) for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]


def plain(value: float, _: object = None) -> str:
    """The number with three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
