"""Weights of a site, some rows at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.calibration import site_weights
from mxrot.calibration.site_weights import SiteWeights, to_fit_to
from mxrot.transforms import BlockDiagonal
from mxrot.transforms.base import random_orthogonal

HEIGHTS = {"q_proj": 40, "k_proj": 8, "v_proj": 9}
LINEARS = tuple(HEIGHTS)
TRANSFORM = BlockDiagonal(random_orthogonal(2, 32, torch.Generator().manual_seed(1)))


def weights_of(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(rows, 64, generator=generator).to(dtype) for name, rows in (HEIGHTS | {"o": 4}).items()}


@pytest.fixture(params=[1 << 20, 7 * 64, 1], ids=["whole", "seven rows", "row by row"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Weights that are taken together."""
    monkeypatch.setattr(site_weights, "MOST_TOGETHER", request.param)
    monkeypatch.setattr(site_weights, "ELEMENTS_AT_ONCE", request.param)
    return int(request.param)


def test_the_groups_are_all_rows_once_and_in_order(at_once: int) -> None:
    site = SiteWeights(weights_of(), LINEARS)
    assert site.shape == (57, 64)
    rows = [(name, row) for group in site.groups for name, start, stop in group.pieces for row in range(start, stop)]
    assert rows == [(name, row) for name in LINEARS for row in range(HEIGHTS[name])]
    places = [place for group in site.groups for place in range(57)[group.place]]
    assert places == list(range(57))
    for group in site.groups:
        assert sum(group.counts) == group.place.stop - group.place.start
        assert sum(group.counts) * 64 <= max(at_once, 64)
    assert [group.pieces for group in site.whole_linears] == [((name, 0, HEIGHTS[name]),) for name in LINEARS]


@pytest.mark.parametrize("transform", [None, TRANSFORM], ids=["as read", "folded"])
def test_rows_are_those_of_the_whole(at_once: int, transform: BlockDiagonal | None) -> None:
    weights = weights_of(torch.bfloat16)
    whole = torch.cat([weights[name].double() for name in LINEARS])
    folded = whole if transform is None else transform.fold(whole)
    site = SiteWeights(weights, LINEARS, transform)
    for groups in (site.groups, site.whole_linears):
        assert torch.equal(torch.cat([site.as_read(rows) for rows in groups]), whole)
        found = torch.cat([site.folded(rows) for rows in groups])
        assert found.dtype == torch.float64
        # A product of 32 numbers in another order.
        torch.testing.assert_close(found, folded, rtol=0, atol=32 * 2.0**-52 * float(whole.abs().max()) * 32)


def parts_on_a_gpu(weight: Tensor, dtype: torch.dtype) -> Tensor:
    first = weight.to(dtype)
    rest = (weight - first).to(dtype)
    return torch.cat([first, rest]) if rest.any() else first


@pytest.mark.parametrize("moved", ["nothing", "one linear", "all"])
def test_parts_are_those_of_the_whole(at_once: int, moved: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where some rows are one number each and others two, too, as a GPU takes them."""
    monkeypatch.setattr(site_weights, "weight_parts", parts_on_a_gpu)
    weights = {name: weight.double() for name, weight in weights_of(torch.bfloat16).items()}
    for name in {"nothing": (), "one linear": ("k_proj",), "all": LINEARS}[moved]:
        weights[name] = weights[name] * (1 + 2.0**-10)
    found = SiteWeights(weights, LINEARS).parts(torch.bfloat16)
    assert len(found) == (57 if moved == "nothing" else 114)
    assert torch.equal(found, parts_on_a_gpu(torch.cat([weights[name] for name in LINEARS]), torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_a_transform_is_fitted_to(dtype: torch.dtype, at_once: int) -> None:
    """float64 of a small site; of a large one what was read, unless smoothing scales it. The numbers are the same."""
    weights = weights_of(dtype)
    expected = torch.cat([weights[name].double() for name in LINEARS])
    found = to_fit_to(weights, LINEARS, None)
    assert found.dtype == (torch.float64 if at_once >= expected.numel() else dtype)
    assert torch.equal(found.double(), expected)
    scales = torch.arange(1, 65).double() / 7
    assert torch.equal(to_fit_to(weights, LINEARS, scales), expected * scales)
