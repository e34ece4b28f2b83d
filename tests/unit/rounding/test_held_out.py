"""Dampings that are chosen by what they leave on tokens that were not fitted to."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import FORMATS
from mxrot.rounding import GPTQ
from mxrot.rounding.held_out import Fold, Moments, choose_damping, choose_target_damping, energy, left_on, spaced_rows
from mxrot.rounding.linalg import inverse_factor

ROWS, COLUMNS = 6, 64
INFINITY = math.inf
FORMAT = FORMATS["mxfp4"]
RULE = FORMAT.rule("even")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor, d: Tensor | None = None) -> Moments:
    return Moments(x.T @ x / len(x), None if d is None else d.T @ x / len(x), len(x))


def test_what_is_left_is_the_squared_error_of_the_tokens_themselves() -> None:
    x, d, move = random(50, COLUMNS, seed=0), random(50, ROWS, seed=1), random(ROWS, COLUMNS, seed=2)
    expected = ((x @ move.T - d).square().sum(dim=1) - d.square().sum(dim=1)).mean()
    assert left_on(move, moments(x, d)) == pytest.approx(float(expected), rel=1e-12)
    assert energy(move, moments(x)) == pytest.approx(float((x @ move.T).square().sum(dim=1).mean()), rel=1e-12)
    assert energy(torch.zeros_like(move), moments(x)) == 1.0


def test_moments_together_are_those_of_all_tokens() -> None:
    x, d = random(50, COLUMNS, seed=0), random(50, ROWS, seed=1)
    found = Moments.together([moments(x[:10], d[:10]), moments(x[10:], d[10:])])
    whole = moments(x, d)
    assert found.tokens == 50 and found.shift is not None and whole.shift is not None
    torch.testing.assert_close(found.hessian, whole.hessian)
    torch.testing.assert_close(found.shift, whole.shift)
    assert Moments.together([moments(x[:10]), moments(x[10:])]).shift is None


def test_they_take_the_place_of_the_first_with_the_bits_of_a_sum_that_begins_at_zero() -> None:
    x = random(30, COLUMNS, seed=0)
    x[:, 0] = -0.0
    parts = [moments(x[:7]), moments(x[7:20]), moments(x[20:])]
    parts[0].hessian[1, 2] = -0.0
    expected = torch.zeros_like(parts[0].hessian)
    for part in parts:
        expected.add_(part.hessian, alpha=part.tokens / 30)
    alone = Moments.together([Moments(parts[0].hessian.clone(), None, 7)]).hessian
    assert not torch.signbit(alone[alone == 0]).any()
    found = Moments.together(parts).hessian
    assert found is parts[0].hessian
    assert torch.equal(found.view(torch.int64), expected.view(torch.int64))


def fold(truth: Tensor, other: Tensor, noise: float, tokens: int = 200) -> Fold:
    """Tokens whose outputs lack x truth^T and noise, and unseen ones that lack x other^T."""
    seen, unseen = random(tokens, COLUMNS, seed=3), random(4000, COLUMNS, seed=4)
    d = seen @ truth.T + noise * random(tokens, ROWS, seed=5)
    return Fold(moments(seen, d), moments(unseen, unseen @ other.T))


def factor_of(damping: float, hessian: Tensor) -> Tensor:
    return inverse_factor(hessian, damping, "here")[0]


CANDIDATES = [0.01, 1.0, 10.0, INFINITY]


def test_a_regression_is_damped_as_much_as_unseen_tokens_say() -> None:
    truth = random(ROWS, COLUMNS, seed=6)
    chosen = [
        choose_target_damping([fold(truth, other, noise)], [1.0], CANDIDATES, factor_of)
        for other, noise in ((truth, 0.01), (truth, 20.0), (0 * truth, 0.01), (-truth, 0.01))
    ]
    assert chosen == [0.01, 1.0, INFINITY, INFINITY]  # a rule; a noisy one; a habit of one kind; one that is wrong


def test_the_choice_is_the_least_error_by_an_exhaustive_look() -> None:
    one = fold(random(ROWS, COLUMNS, seed=6), random(ROWS, COLUMNS, seed=6), 8.0)
    assert one.fitted.shift is not None
    left = {}
    for damping in (0.1, 0.3, 1.0, 3.0):
        matrix = one.fitted.hessian + damping * one.fitted.hessian.diagonal().mean() * torch.eye(COLUMNS)
        left[damping] = left_on(one.fitted.shift @ torch.linalg.inv(matrix), one.unseen)
    assert choose_target_damping([one], [1.0], list(left), factor_of) == min(left, key=left.__getitem__)


def test_a_smaller_damping_is_looked_at_as_long_as_each_leaves_less() -> None:
    hessian = torch.eye(2, dtype=torch.float64)
    one = Fold(Moments(hessian, None, 1), Moments(hessian, None, 1))
    for left, best, seen in (
        ({1.0: 3.0, 0.3: 2.0, 0.1: 1.0}, 0.1, [1.0, 0.3, 0.1]),
        ({1.0: 1.0, 0.3: 1.0, 0.1: 0.5}, 1.0, [1.0, 0.3]),
        ({1.0: 2.0, 0.3: 1.0, 0.1: 1.5}, 0.3, [1.0, 0.3, 0.1]),
    ):
        asked: list[float] = []

        def errors_of(damping: float, _: Tensor, left: dict[float, float] = left, asked: list[float] = asked) -> Tensor:
            asked.append(damping)
            return torch.tensor([[left[damping] ** 0.5, 0.0]], dtype=torch.float64)

        assert choose_damping([one], [1.0], [0.3, 0.1, 1.0], errors_of) == best and asked == seen


def test_spread_over_processes_the_choice_is_the_same() -> None:
    """Each of three takes every third task, and each task is done by one."""
    truth, noisy = random(ROWS, COLUMNS, seed=6), random(ROWS, COLUMNS, seed=7)
    folds, done = [fold(truth, noisy, 4.0), fold(noisy, truth + noisy, 2.0)], []

    def spread(tasks: Sequence[Callable[[], float]]) -> list[float]:
        found = [0.0] * len(tasks)
        for rank in (2, 0, 1):
            for place in range(rank, len(tasks), 3):
                found[place] = tasks[place]()
                done.append(place)
        return found

    candidates = [*CANDIDATES, 3.0]
    expected = choose_target_damping(folds, [1.0, 2.0], candidates, factor_of)
    assert choose_target_damping(folds, [1.0, 2.0], candidates, factor_of, spread) == expected
    assert sorted(done) == list(range(2 * 4))

    def errors_of(damping: float, hessian: Tensor) -> Tensor:
        return random(3, COLUMNS, seed=8) * (1 + (damping - 0.3) ** 2) * hessian.diagonal().mean()

    for among in ([0.1, 0.3, 1.0], [0.5, 0.1], [2.0]):
        expected = choose_damping(folds, [1.0, 2.0], among, errors_of)
        assert choose_damping(folds, [1.0, 2.0], among, errors_of, spread) == expected


def test_folds_count_relative_to_their_energies() -> None:
    truth = random(ROWS, COLUMNS, seed=6)
    helps, hurts = fold(truth, truth, 0.01), fold(truth, -truth, 0.01)
    assert choose_target_damping([helps, hurts], [1.0, 1e6], CANDIDATES, factor_of) == 0.01
    assert choose_target_damping([helps, hurts], [1e6, 1.0], CANDIDATES, factor_of) == INFINITY


METHOD = GPTQ(target="residual", target_dampings=(1.0, INFINITY), dampings=(0.001, 1.0))


def test_a_site_gets_the_options_that_unseen_tokens_prefer() -> None:
    weight, truth = random(ROWS, COLUMNS, seed=7), 0.1 * random(ROWS, COLUMNS, seed=6)
    found = METHOD.chosen([fold(truth, truth, 0.01)], weight, FORMAT, RULE, "here")
    assert isinstance(found, GPTQ) and found.target == "residual" and found.target_strength == 1.0
    assert found == replace(METHOD, dampings=(), target_dampings=(), target_damping=1.0, damping=found.damping)
    found = METHOD.chosen([fold(truth, -truth, 0.01)], weight, FORMAT, RULE, "here")
    assert isinstance(found, GPTQ) and found.target == "own" and found.target_strength == 0.0
    crossed = replace(METHOD, first_column="crossed", damping_of="largest")
    assert crossed.chosen([fold(truth, -truth, 0.01)], weight, FORMAT, RULE, "here").target_strength == 0.0
    assert METHOD.chooses_target and not replace(METHOD, target_dampings=()).chooses_target


def test_gptq_is_damped_where_its_tokens_are_few_and_not_where_they_are_those_it_will_see() -> None:
    weight = random(40, COLUMNS, seed=7)
    mixed = random(COLUMNS, COLUMNS, seed=8) / 8 + torch.eye(COLUMNS)
    unseen = moments(random(4000, COLUMNS, seed=4) @ mixed)
    few = moments(random(20, COLUMNS, seed=3) @ mixed)
    method = GPTQ(dampings=(0.001, 1.0))
    chosen = [method.chosen([Fold(one, unseen)], weight, FORMAT, RULE, "here") for one in (few, unseen)]
    assert [found.damping for found in chosen if isinstance(found, GPTQ)] == [1.0, 0.001]


def test_without_candidates_nothing_is_asked_for_and_nothing_changes() -> None:
    plain = GPTQ(target="residual")
    assert plain.requirements.folds == "none" and plain.chosen([], torch.empty(0), FORMAT, RULE, "here") == plain
    assert METHOD.requirements.folds == "kinds"


def test_sampled_rows_are_evenly_spaced() -> None:
    assert spaced_rows(5).tolist() == [0, 1, 2, 3, 4]
    assert spaced_rows(512).tolist() == list(range(0, 512, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampings": (0.0,)}, "dampings must be positive and finite, got 0"),
        ({"dampings": (INFINITY,)}, "dampings must be positive and finite, got inf"),
        ({"target": "residual", "target_dampings": (-1.0,)}, "target_dampings must be positive, got -1"),
    ],
)
def test_candidates_that_mean_nothing_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTQ(**options)
