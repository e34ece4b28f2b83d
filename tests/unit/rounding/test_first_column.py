"""Options from Qronos and FOEM, each beside a slow form without factors."""

from __future__ import annotations

import pytest
import torch
from tests.unit.rounding.test_gptq import inputs, mean_square, random
from tests.unit.rounding.textbook_obs import round_column
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import Format, as_blocks, get_format
from mxrot.rounding import walk
from mxrot.rounding.gptq import GPTQ
from mxrot.rounding.linalg import inverse_factor, largest_eigenvalue

FORMAT = get_format("mxfp4")
RULE = FORMAT.rule()
K = 96


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Weights, the Hessian of inputs, and a shift towards other outputs."""
    weight, x = random(6, K, seed=3), inputs(400, K)
    target = (x + 0.3 * random(400, K, seed=7)) @ (weight + 0.1 * random(6, K, seed=8)).T
    return weight, mean_square(x), (target - x @ weight.T).T @ x / len(x)


def qronos(weight: Tensor, hessian: Tensor, shift: Tensor, added: float, order: list[int]) -> Tensor:
    """Values [N, K]: the first column from its own minimum, then the minimum of all others, again after each column.

    The objective is w H w^T / 2 - w (H w_0 + shift)^T + added |w - w_0|^2 / 2; scales are of the weights as they came.
    """
    damped = hessian + added * torch.eye(K, dtype=torch.float64)
    wanted = weight @ damped + shift  # its gradient is w damped - wanted
    parts = FORMAT.grid.choose(as_blocks(weight, FORMAT, "w"), RULE)
    found = weight.clone()
    for position, column in enumerate(order):
        rest = order[position:]
        if position == 0:
            other = order[1:]
            found[:, column] = (wanted - weight[:, other] @ damped[other])[:, column] / damped[column, column]
        else:
            done = order[:position]
            found[:, rest] = (wanted - found[:, done] @ damped[done])[:, rest] @ torch.linalg.inv(damped[rest][:, rest])
        group = column // 32
        found[:, column] = round_column(found[:, column], parts.of_blocks(slice(group, group + 1)), FORMAT)
    return found


@pytest.mark.parametrize("columns", ["natural", "descending"])
def test_the_first_column_comes_from_its_own_minimum(problem: tuple[Tensor, Tensor, Tensor], columns: str) -> None:
    """With one damping for both steps all columns behind it are at the minimum of the damped objective.

    Scales are of the weights that the walk begins with, so that they are given to it: here those of the weights.
    """
    weight, hessian, shift = problem
    order = list(range(K)) if columns == "natural" else hessian.diagonal().argsort(descending=True).tolist()
    damping = 0.05
    method = GPTQ(damping, "fixed", columns, "original", damping, first_column="crossed")  # type: ignore[arg-type]
    moves = [shift.clone()]
    prepared = method.prepare(hessian.clone(), moves, "w")
    assert prepared.factor is not None
    started = weight + moves[0]
    parts = FORMAT.grid.choose(as_blocks(weight, FORMAT, "w"), RULE)
    blocks = as_blocks(started, FORMAT, "w")
    values, _ = walk.walk_fixed(blocks, prepared.factor, parts, torch.tensor(order), FORMAT)
    expected = qronos(weight, hessian, shift, damping * float(hessian.diagonal().mean()), order)
    torch.testing.assert_close(values.flatten(1), expected, rtol=1e-15, atol=0)
    joint = GPTQ(damping, "fixed", columns, "original", damping)  # type: ignore[arg-type]
    other = [shift.clone()]
    joint.prepare(hessian.clone(), other, "w")
    assert (other[0] - moves[0]).abs().max() > 1e-3


def test_some_rows_at_a_time_move_as_all_together(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    _, hessian, shift = problem
    method = GPTQ(target="original", first_column="crossed")
    whole, pieces = [shift.clone()], [shift[:2].clone(), shift[2:].clone()]
    for moves in (whole, pieces):
        method.prepare(hessian.clone(), moves, "w")
    torch.testing.assert_close(torch.cat(pieces), whole[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_largest_eigenvalue(size: int) -> None:
    """From below, to a thousandth; and zero for nothing."""
    hessian = mean_square(inputs(4 * size, size))
    exact = torch.linalg.eigvalsh(hessian)[-1]
    found = largest_eigenvalue(hessian)
    assert 0.999 * exact <= found <= exact * (1 + 1e-12)
    assert largest_eigenvalue(torch.zeros_like(hessian)) == 0


def test_damping_relative_to_it() -> None:
    hessian = mean_square(inputs(200, 32))
    factor, used = inverse_factor(hessian, 0.01, "w", relative_to="largest")
    damped = hessian + 0.01 * largest_eigenvalue(hessian) * torch.eye(32, dtype=torch.float64)
    assert used == 0.01
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-8, atol=1e-12)
    for zero in ("mean", "largest"):
        factor, _ = inverse_factor(torch.zeros(8, 8), 0.25, "w", relative_to=zero)  # type: ignore[arg-type]
        torch.testing.assert_close(factor, 2 * torch.eye(8, dtype=torch.float64))
    assert GPTQ(damping_of="largest").round(random(4, 32, seed=1), FORMAT, RULE, hessian, "w").damping == 0.01


def drawn_back(weight: Tensor, hessian: Tensor, damping: float, share: float, reached: bool) -> Tensor:
    """Values [N, K], with a fresh inverse for each column, which moves all open columns at once."""
    now = weight.clone()
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(K, dtype=torch.float64)
    parts = FORMAT.grid.choose(as_blocks(weight, FORMAT, "w"), RULE)
    rounded = torch.zeros_like(weight)
    for column in range(K):
        group = column // 32
        here = parts.of_blocks(slice(group, group + 1))
        if reached and column % 32 == 0:
            chosen = FORMAT.grid.choose(now[:, None, column : column + 32], RULE)
        rounded[:, column] = round_column(now[:, column], chosen if reached else here, FORMAT)
        inverse = torch.linalg.inv(damped[column:, column:])
        error = (now[:, column] - rounded[:, column]) / inverse[0, 0]
        moved = now - weight
        now[:, column + 1 :] -= error[:, None] * inverse[0, 1:] + share * moved[:, column + 1 :]
    return rounded


@pytest.mark.parametrize("scales", ["reached", "fixed"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_open_columns_go_back(
    problem: tuple[Tensor, Tensor, Tensor], scales: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value for value, over several spans too."""
    weight, hessian, _ = problem
    expected = drawn_back(weight, hessian, 0.01, share, scales == "reached")
    for span in (32, 256):
        monkeypatch.setattr(walk, "SPAN", span)
        method = GPTQ(scales=scales, first_order=share)  # type: ignore[arg-type]
        got = method.round(weight, FORMAT, RULE, hessian, "w").weight.dequantize(torch.float64)
        torch.testing.assert_close(got, expected, rtol=1e-15, atol=0)
    plain = GPTQ(scales=scales).round(weight, FORMAT, RULE, hessian, "w").weight  # type: ignore[arg-type]
    assert not torch.equal(plain.dequantize(torch.float64), expected)


@pytest.mark.parametrize("format", ["int4_g32_asym", "nvfp4", "mxfp8_e4m3"])
def test_any_format_goes_back_and_nothing_is_lost(format: str, problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """The remainder is what rounding took from each weight as it was then: codes are of the weight less it."""
    weight, hessian, _ = problem
    chosen: Format = get_format(format)
    method = GPTQ(scales="fixed", first_order=0.2)
    found = method.round(weight, chosen, chosen.rule(), hessian, "w")
    values = found.weight.dequantize(torch.float64)
    first = (values + found.remainder)[:, 0]
    torch.testing.assert_close(first, weight[:, 0], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(found.remainder).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_column": "crossed"}, 'first_column = "crossed" is about a target'),
        ({"first_order": 1.0}, "first_order must be at least 0 and below 1"),
        ({"first_order": float("nan")}, "first_order must be at least 0 and below 1"),
        ({"first_order": 0.1, "scales": "walked"}, 'a column at a time, and scales = "walked" a block; set scales'),
        ({"damping_of": "median"}, "damping_of"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GPTQ(**options)  # type: ignore[arg-type]
