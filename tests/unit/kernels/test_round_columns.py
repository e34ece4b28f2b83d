"""GPTQ over one block of columns: the fused walks against their plain twins."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mxrot.formats import FORMATS, RULES, Uniform, get_format
from mxrot.formats.element import FloatElement
from mxrot.kernels import ReachedColumns, RoundedColumns, plain_round_columns, plain_round_reached
from mxrot.kernels.dispatch import round_columns as dispatched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = {
    element.name: element
    for element in (format.element for format in FORMATS.values() if isinstance(format.grid, Uniform))
    if isinstance(element, FloatElement)
}
CASES = [*product(ELEMENTS, (32,), (1, 3)), ("e2m1", 16, 1), ("e2m1", 16, 3)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(element: FloatElement, width: int, candidates: int, rows: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    """Columns with ties, zeros and outliers; scales of each candidate; a factor of an inverse Hessian."""
    columns = random(rows, width, seed=0)
    columns[0] = 0
    columns[1, ::2] = -0.0
    columns[2] *= 1e-30
    columns[3, 5] = 1e6
    columns[4] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0]).double().repeat(width // 8)
    powers = 2.0 ** (columns.abs().amax(dim=1).clamp(min=1e-38).log2().floor() - element.max_exponent)
    scales = torch.stack([powers * 2.0**offset for offset in (0, -1, 1)[:candidates]])
    x = random(200, width, seed=1) @ random(width, width, seed=2)
    upper = torch.linalg.cholesky(torch.linalg.inv(x.mT @ x)).mT
    return columns.to(DEVICE), scales[..., None].expand(-1, -1, width).to(DEVICE), upper.contiguous().to(DEVICE)


def cost(found: RoundedColumns | ReachedColumns, upper: Tensor) -> Tensor:
    return (found.differences / upper.diagonal()).square().sum(dim=1)


@pytest.mark.parametrize(("element", "width", "candidates"), CASES)
def test_the_fused_walk_is_the_plain_one(element: str, width: int, candidates: int) -> None:
    """In the interpreter bit for bit; compiled, but for rows where a fused multiplication moved a tie."""
    from mxrot.kernels.fused.round_columns import round_columns as fused

    columns, scales, upper = problem(ELEMENTS[element], width, candidates)
    expected = plain_round_columns(columns, scales, upper, None, ELEMENTS[element])
    found = fused(columns, scales, upper, ELEMENTS[element])
    same = (found.values == expected.values).all(dim=1) & (found.chosen == expected.chosen)
    if DEVICE == "cpu":
        assert same.all()
    assert same.double().mean() > 0.9
    torch.testing.assert_close(found.differences[same], expected.differences[same], rtol=1e-9, atol=1e-12)
    assert (cost(found, upper) <= 1.5 * cost(expected, upper)).all()


@pytest.mark.parametrize("width", [16, 32])
def test_every_row_keeps_its_cheapest_scales(width: int) -> None:
    """Against walking under each candidate alone."""
    element = get_format("mxfp4").element
    columns, scales, upper = problem(ELEMENTS["e2m1"], width, 3)
    alone = [plain_round_columns(columns, scales[i : i + 1], upper, None, element) for i in range(3)]
    costs = torch.stack([cost(found, upper) for found in alone])
    found = dispatched(columns, scales, upper, None, element)
    # Compiled, a fused multiplication may move a tie, and with it everything behind.
    exact = slice(None) if DEVICE == "cpu" else cost(found, upper) / costs.amin(dim=0) < 1 + 1e-9
    assert torch.equal(costs.argmin(dim=0)[exact], found.chosen[exact])
    torch.testing.assert_close(cost(found, upper)[exact], costs.amin(dim=0)[exact], rtol=1e-12, atol=0)
    assert len(costs.T[exact]) > 30
    assert len(found.chosen.unique()) > 1


def test_of_equals_the_first_candidate_is_kept() -> None:
    columns = torch.zeros(3, 32, dtype=torch.float64, device=DEVICE)
    scales = torch.ones(3, 3, 32, dtype=torch.float64, device=DEVICE)
    upper = torch.eye(32, dtype=torch.float64, device=DEVICE)
    assert dispatched(columns, scales, upper, None, get_format("mxfp4").element).chosen.tolist() == [0, 0, 0]


def test_a_scale_of_zero_gives_zero() -> None:
    """NVFP4's block scales underflow."""
    from mxrot.kernels.fused.round_columns import round_columns as fused

    element = ELEMENTS["e2m1"]
    columns, scales, upper = problem(element, 16, 1)
    scales = scales.clone()
    scales[:, 7] = 0
    plain = plain_round_columns(columns, scales, upper, None, element)
    for walk in (plain, fused(columns, scales, upper, element)):
        assert (walk.values[7] == 0).all() and walk.differences.isfinite().all()


REACHED = [
    (format.name, name, offsets)
    for format in FORMATS.values()
    if isinstance(format.grid, Uniform)
    for name in format.rules
    for offsets in ((0,), (0, -1, 1), (0, -2, -1, 1))
    if isinstance(format.element, FloatElement) and RULES[name].raises_from is not None
    if (format.name, name) == ("mxfp4", "even") or len(offsets) == 3
]


@pytest.mark.parametrize(("format", "rule", "offsets"), REACHED, ids=str)
def test_the_fused_walk_chooses_the_scales_of_the_plain_one(format: str, rule: str, offsets: tuple[int, ...]) -> None:
    """In the interpreter code for code; compiled, but for rows where a fused multiplication moved a tie.

    Columns and factor are parts of larger matrices, as GPTQ has them.
    """
    from mxrot.kernels.fused.round_reached import round_reached as fused

    target = get_format(format)
    assert isinstance(target.element, FloatElement)
    columns, _, upper = problem(target.element, target.block, 1)
    wide, factor = torch.nn.functional.pad(columns, (32, 64)), torch.nn.functional.pad(upper, (16, 8, 16, 8))
    here = slice(32, 32 + target.block), slice(16, 16 + target.block)
    arguments = target, target.rule(rule), offsets
    expected = plain_round_reached(columns, upper, *arguments)
    values, differences = torch.zeros_like(wide), torch.zeros_like(wide).repeat(1, 2)
    into = values[:, here[0]], differences[:, here[0]]
    reciprocals = factor.diagonal().reciprocal()[here[1]]
    found = fused(wide[:, here[0]], factor[here[1], here[1]], *arguments, reciprocals, into)
    assert torch.equal(found.values, values[:, here[0]]) and torch.equal(found.differences, differences[:, here[0]])
    for whole in (values, differences):  # nothing is written beside the block
        assert whole.count_nonzero() == whole[:, here[0]].count_nonzero()
    assert found.scales.stored.shape == expected.scales.stored.shape and found.scales.type == expected.scales.type
    same = (found.values == expected.values).all(dim=1) & (found.scales.stored == expected.scales.stored)[:, 0]
    if DEVICE == "cpu":
        assert same.all()
        assert torch.equal(found.values.signbit(), expected.values.signbit())
    assert same.double().mean() > 0.9
    torch.testing.assert_close(found.differences[same], expected.differences[same], rtol=1e-9, atol=1e-12)
    assert (cost(found, upper) <= 1.5 * cost(expected, upper)).all()


@pytest.mark.parametrize("rule", ["floor", "even", "rceil"])
def test_scales_at_the_edge_of_a_rule_and_of_their_range(rule: str) -> None:
    """Maxima next to where the exponent rises, exact to float64; beyond E8M0; NaN and Inf, which leave no number."""
    from mxrot.kernels.fused.round_reached import round_reached as fused

    target = get_format("mxfp4")
    edges = torch.tensor([1.0, 1.5, 1.75], dtype=torch.float64)
    maxima = torch.cat(
        [edges, edges.nextafter(torch.tensor(0.0).double()), edges.nextafter(torch.tensor(9.0).double())]
    )
    maxima = torch.cat([maxima, maxima * 2.0**-140, torch.tensor([2.0**126, torch.nan, torch.inf]).double()])
    columns = torch.zeros(len(maxima), 32, dtype=torch.float64, device=DEVICE)
    columns[:, 7] = -maxima.to(DEVICE)
    upper = torch.eye(32, dtype=torch.float64, device=DEVICE)
    for offsets in ((0,), (0, -1, 1)):
        expected = plain_round_reached(columns, upper, target, target.rule(rule), offsets)
        into = torch.empty_like(columns), torch.empty_like(columns)
        found = fused(columns, upper, target, target.rule(rule), offsets, upper.diagonal().reciprocal(), into)
        assert torch.equal(found.scales.stored, expected.scales.stored)
        assert found.scales.stored[-2:].tolist() == [[255], [255]]
        torch.testing.assert_close(found.values[:-2], expected.values[:-2], rtol=0, atol=0)
        assert found.values[-2:, 7].isnan().all()
