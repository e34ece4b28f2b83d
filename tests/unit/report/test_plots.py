"""Ticks of logarithmic axes."""

from __future__ import annotations

import pytest

from mxrot.report.ticks import log_ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.5, 2000, [1, 10, 100, 1000]),
        (0.8, 40, [1, 3, 10, 30]),
        (0.9, 8, [1, 2, 5]),
        (2.1, 9.5, [3, 4, 6, 8]),
        (1e-9, 1e9, [1e-9, 1e-6, 1e-3, 1, 1e3, 1e6, 1e9]),
    ],
)
def test_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("low", [1e-6, 0.37, 1.0, 1.49, 9.9, 12345.6])
@pytest.mark.parametrize("factor", [1.05, 1.19, 2**0.5, 2, 3, 9, 11, 99, 1e4, 1e12])
def test_any_range_has_a_few(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 2 <= len(ticks) <= 10 and ticks == sorted(set(ticks))
    assert all(low <= tick <= low * factor for tick in ticks)
