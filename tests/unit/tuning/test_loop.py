import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from mxrot.errors import ConfigError, DataError, NumericsError
from mxrot.tuning import loop
from mxrot.tuning.loop import (
    Check,
    Group,
    Problem,
    Tuning,
    TuningState,
    rate_factor,
    tune,
)
from mxrot.tuning.shares import split_windows, window_batches

OPTIONS = Tuning(steps=20, batch_windows=2, offset_rate=0.1, transform_rate=0.0, checks=5, patience=2)


class Line:
    """Least squares in one dimension: windows are points, the held-out loss may be made to rise from a step on."""

    def __init__(self, rises_from: int = 10**6, decay: float = 0.0) -> None:
        self.decay = decay
        self.slope = nn.Parameter(torch.zeros(1))
        self.steps, self.rises_from = 0, rises_from
        self.x = torch.linspace(-1, 1, 10)

    def backward(self, chosen: Tensor) -> float:
        loss = ((self.slope * self.x[chosen] - 2 * self.x[chosen]) ** 2).mean()
        loss.backward()
        self.steps += 1
        return float(loss.detach())

    def held_out(self) -> float:
        return float((self.slope.detach() - 2).abs()) + 10 * max(0, self.steps - self.rises_from)

    def settle(self) -> None:
        self.settled = float(self.slope.detach())

    def problem(self) -> Problem:
        return Problem(
            [Group([self.slope], 0.1, self.decay)],
            self.backward,
            self.held_out,
            self.settle,
            torch.arange(10),
            "a line",
        )


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_it_gets_better_and_says_so() -> None:
    line = Line()
    checks = tune(line.problem(), OPTIONS, generator())
    assert [check.step for check in checks] == [0, 4, 8, 12, 16, 20]
    assert checks[0] == Check(0, None, 2.0)
    last, first = checks[-1].train, checks[1].train
    assert checks[-1].held_out < 1 and last is not None and first is not None and last < first


def test_it_stops_when_the_held_out_loss_rises_and_goes_back() -> None:
    line = Line(rises_from=6)
    checks = tune(line.problem(), OPTIONS, generator())
    assert [check.step for check in checks] == [0, 4, 8, 12]
    assert abs(float((line.slope.detach() - 2).abs()) - checks[1].held_out) < 1e-6


def test_a_loss_that_is_not_finite_may_end_it_with_the_best_so_far() -> None:
    """The ninth step gives NaN: what the look at step 8 saw is kept, and looked at again."""
    line = Line()

    def backward(chosen: Tensor) -> float:
        loss = line.backward(chosen)
        return math.nan if line.steps == 9 else loss

    checks = tune(replace(line.problem(), backward=backward, rolls_back=True), OPTIONS, generator())
    assert [(check.step, check.train is None) for check in checks] == [(0, True), (4, False), (8, False), (8, True)]
    assert checks[3].held_out == checks[2].held_out == abs(line.slope.item() - 2)
    assert line.settled == line.slope.item()


def test_if_nothing_helps_the_start_is_kept() -> None:
    line = Line(rises_from=0)
    tune(line.problem(), OPTIONS, generator())
    assert line.slope.item() == 0 == line.settled


def test_parameters_are_drawn_back_to_where_they_started() -> None:
    free, drawn, tight = Line(), Line(decay=0.5), Line(decay=10.0)
    for line in (free, drawn, tight):
        line.slope.data.fill_(1.0)
        tune(line.problem(), replace(OPTIONS, steps=200), generator())
    assert 1.0 < tight.slope.item() < drawn.slope.item() < free.slope.item()
    assert abs(free.slope.item() - 2) < 0.01 and tight.slope.item() < 1.2


class Memory:
    """A tuning_checkpoint that copies, like a file."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.kept

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.kept = {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_a_run_that_was_killed_ends_in_the_same_place(monkeypatch: pytest.MonkeyPatch, decay: float) -> None:
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    whole, tuning_checkpoint = Line(decay=decay), Memory()
    expected = tune(whole.problem(), OPTIONS, generator())
    first = Line(decay=decay)

    def stop(done: int, total: int, what: str) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(first.problem(), OPTIONS, generator(), tuning_checkpoint, stop)
    second, done = Line(decay=decay), []
    found = tune(second.problem(), OPTIONS, generator(), tuning_checkpoint, lambda step, total, what: done.append(step))
    assert done[0] == 9  # from the look at step 8
    assert torch.equal(second.slope, whole.slope)
    assert found == expected
    again = Line(decay=decay)
    tune(again.problem(), OPTIONS, generator(), tuning_checkpoint)
    assert again.steps == 0 and torch.equal(again.slope, whole.slope)
    assert again.settled == float(again.slope.detach())


def test_a_short_run_is_kept_once_at_its_end() -> None:
    for line in (Line(), Line(rises_from=6)):  # with all its steps, and stopped before
        tuning_checkpoint, saved = Memory(), []
        keep = tuning_checkpoint.save
        tuning_checkpoint.save = lambda tensors, keep=keep, saved=saved: (
            saved.append(int(tensors["step"])),
            keep(tensors),
        )[1]  # type: ignore[method-assign]
        checks = tune(line.problem(), OPTIONS, generator(), tuning_checkpoint)
        assert saved == [checks[-1].step]


def test_nothing_to_tune() -> None:
    line = Line()
    empty = replace(line.problem(), groups=[Group([], 0.1)])
    assert tune(empty, OPTIONS, generator()) == [] and line.steps == 0


def test_a_loss_that_is_not_finite_names_the_problem() -> None:
    line = Line()
    broken = replace(line.problem(), backward=lambda chosen: math.nan)
    with pytest.raises(NumericsError, match="a line: the loss of tuning is nan at step 0"):
        tune(broken, OPTIONS, generator())
    broken = replace(line.problem(), held_out_loss=lambda: math.inf)
    with pytest.raises(NumericsError, match="a line: the held-out loss of tuning is inf"):
        tune(broken, OPTIONS, generator())


@pytest.mark.parametrize(("windows", "size"), [(10, 2), (10, 3), (3, 8), (1, 1)])
def test_every_window_comes_once_before_any_comes_again(windows: int, size: int) -> None:
    batches = list(window_batches(torch.arange(windows), size, 30, generator()))
    assert len(batches) == 30 and all(len(batch) == min(size, windows) for batch in batches)
    counts = torch.zeros(windows)
    for batch in batches:
        counts += torch.bincount(batch, minlength=windows)
        assert counts.max() - counts.min() <= 2


def test_the_rate_rises_and_falls() -> None:
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.2 and max(factors) == 1
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0.05 <= factors[-1] < 0.06
    assert rate_factor(0, 1) == 1


def test_when_to_stop() -> None:
    def state(*losses: float) -> TuningState:
        return TuningState(checks=[Check(step, 0.0, loss) for step, loss in enumerate(losses)])

    assert not state(3.0).stops(1) and not state(3.0, 2.0).stops(1)
    assert state(3.0, 2.0, 2.0).stops(1) and not state(3.0, 2.0, 2.5).stops(2)
    assert state(3.0, 2.0, 2.5, 2.1).stops(2) and not state(3.0, 2.0, 2.5, 1.9).stops(2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"margin": 0.0},
        {"margin": 0.6},
        {"steps": 0},
        {"checks": 0},
        {"offset_rate": 0.0},
        {"transform_rate": -1.0},
        {"held_out": 0.0},
        {"held_out": 1.0},
        {"reach": 0.5},
        {"reach": float("nan")},
    ],
    ids=str,
)
def test_options_that_cannot_work(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"tuning: .*{next(iter(wrong))}"):
        Tuning(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("windows", "share", "count"), [(40, 0.1, 4), (2, 0.9, 1), (3, 0.01, 1), (7, 0.5, 4)])
def test_held_out_windows_are_spread_and_apart(windows: int, share: float, count: int) -> None:
    train, test = split_windows(windows, share)
    assert len(test) == count and sorted(torch.cat([train, test]).tolist()) == list(range(windows))
    gaps = test.diff()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1


def test_one_window_cannot_be_split() -> None:
    with pytest.raises(DataError, match="it needs 2, and calibration has 1"):
        split_windows(1, 0.1)
