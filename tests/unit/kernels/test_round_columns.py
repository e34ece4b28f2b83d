"""GPTQ over one block of columns: the fused walk against its plain twin."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mxrot.formats import FORMATS, get_format
from mxrot.formats.element import FloatElement
from mxrot.kernels import RoundedColumns, plain_round_columns
from mxrot.kernels.dispatch import round_columns as dispatched

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ELEMENTS = {
    element.name: element
    for element in (format.element for format in FORMATS.values())
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


def cost(found: RoundedColumns, upper: Tensor) -> Tensor:
    return (found.differences / upper.diagonal()).square().sum(dim=1)


@pytest.mark.parametrize(("element", "width", "candidates"), CASES)
def test_the_fused_walk_is_the_plain_one(element: str, width: int, candidates: int) -> None:
    """In the interpreter bit for bit; compiled, but for rows where a fused multiplication moved a tie."""
    from mxrot.kernels.round_columns import round_columns as fused

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
    from mxrot.kernels.round_columns import round_columns as fused

    element = ELEMENTS["e2m1"]
    columns, scales, upper = problem(element, 16, 1)
    scales = scales.clone()
    scales[:, 7] = 0
    plain = plain_round_columns(columns, scales, upper, None, element)
    for walk in (plain, fused(columns, scales, upper, element)):
        assert (walk.values[7] == 0).all() and walk.differences.isfinite().all()
