"""The time to go, from when how much was done."""

from __future__ import annotations

import pytest

from mxrot.progress.pace import Pace, duration


def pace_of(*told: tuple[float, float], total: int = 10) -> Pace:
    """A pace that was told (when, how much is done)."""
    pace = Pace(told[0][0])
    for now, done in told:
        pace.tell(now, done, total, "")
    return pace


def test_nothing_is_known_before_the_first_step() -> None:
    assert Pace(0.0).is_one_step and Pace(0.0).seconds_to_go(5.0) == 0.0
    assert pace_of((0, 0)).seconds_to_go(100.0) is None
    assert pace_of((0, 3)).seconds_to_go(100.0) is None


def test_it_counts_down_between_two_steps() -> None:
    pace = pace_of((0, 0), (100, 1))
    assert pace.seconds_to_go(100) == pytest.approx(900)
    assert pace.seconds_to_go(150) == pytest.approx(850)


def test_a_step_that_takes_longer_than_all_the_rest_should_have_corrects_it() -> None:
    pace = pace_of((0, 0), (10, 9))
    assert pace.seconds_to_go(10.5) == pytest.approx(10 / 9 - 0.5)
    assert pace.seconds_to_go(100) == pytest.approx(100 / 9)


def test_blocks_that_an_earlier_run_has_finished_are_soon_forgotten() -> None:
    """Eight of ten in a second; then each takes a minute."""
    pace = pace_of(*((index / 8, index) for index in range(9)), (31, 8.5), (61, 9))
    assert pace.seconds_to_go(61) == pytest.approx(60)


def test_a_long_stretch_without_a_step_keeps_the_last_rate() -> None:
    pace = pace_of((0, 0), (1, 1), (2, 2), (1000, 2))
    assert pace.seconds_to_go(2) == pytest.approx(8)
    assert pace.seconds_to_go(1000) is not None


def test_a_new_phase_begins_where_the_count_goes_back_or_the_total_changes() -> None:
    pace = pace_of((0, 0), (10, 5))
    pace.tell(20, 2, 10, "")
    assert pace.begun == 20 and pace.seconds_to_go(25) is None
    pace.tell(30, 3, 20, "")
    assert pace.begun == 30
    pace.tell(40, 3 - 1e-12, 20, "sums of fractions go back a little")
    assert pace.begun == 30


def test_the_rate_is_that_of_the_time_to_go() -> None:
    """Ten a minute; and once a step takes longer than all the rest should have, it slows the rate."""
    assert pace_of((0, 0)).an_hour(100.0) is None and pace_of((0, 0), (9, 10)).an_hour(9.0) is None
    pace = pace_of((0, 0), (30, 5))
    assert pace.an_hour(30) == pace.an_hour(59) == pytest.approx(600)
    assert pace.an_hour(100) == pytest.approx(180)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (119, "119 s"), (121, "2 min"), (3600, "60 min"), (7200, "2 h 0 min"), (12000, "3 h 20 min")],
)
def test_duration(seconds: float, said: str) -> None:
    assert duration(seconds) == said
