"""Steps with phases of their own are told as one phase that never goes back."""

from __future__ import annotations

import pytest

from mxrot.progress.steps import Steps


def test_phases_of_steps_add_up() -> None:
    told: list[tuple[float, str]] = []
    steps = Steps(lambda done, total, what: told.append((done, f"{what} of {total}")), [[1, 3], [4]])
    first, second = steps.of(0, "a"), steps.of(1, "b")
    first(0, 1, "opening")  # of one step: it counts nothing
    first(0, 10, "writing")
    first(5, 10, "writing")
    first(10, 10, "writing")
    first(0, 4, "blocks")
    first(2, 4, "blocks")
    second(0, 2, "tokens")
    second(2, 2, "tokens")
    whats = ["a, opening", *["a, writing"] * 3, *["a, blocks"] * 2, *["b, tokens"] * 2]
    assert [what for _, what in told] == [f"{what} of 100" for what in whats]
    assert [done for done, _ in told] == pytest.approx([0, 0, 6.25, 12.5, 12.5, 31.25, 50, 100])


def test_what_nobody_foresaw_does_not_go_back() -> None:
    """More phases than were named, a step that ends early, and one that is not made at all."""
    told: list[float] = []
    steps = Steps(lambda done, total, what: told.append(done), [[1], [1], [0], [2]])
    step = steps.of(0, "a")
    for done, total in [(0, 2), (2, 2), (0, 5), (5, 5), (0, 2)]:
        step(done, total, "x")
    steps.of(1, "b")(1, 4, "x")
    steps.of(3, "c")(4, 4, "x")
    assert told == sorted(told) and told[-1] == 100
    assert told[-2] == pytest.approx(100 * 1.25 / 4)


def test_a_phase_with_one_part_counts_when_it_is_done() -> None:
    told: list[float] = []
    step = Steps(lambda done, total, what: told.append(done), [[1]]).of(0, "a")
    step(0, 1, "a block")
    step(0.5, 1, "a block")
    step(1, 1, "a block")
    assert told == [0, 50, 100]
