"""Every kernel that a request could need is compiled before: the few numbers of rows stand for all."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.unit.kernels.test_linear import linear
from torch import Tensor

from mxrot.kernels import PackedWeight, dispatch, warm_up
from mxrot.kernels.crossovers import Crossovers
from mxrot.kernels.fixed_rows import invariant_rows
from mxrot.layers import prepare_site, warm_up_linear

CPU = torch.device("cpu")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways are chosen as on an H100, on whatever device."""

    def choose(rows: int, weight: PackedWeight, device: torch.device) -> dispatch.Choice:
        return dispatch.Choice("matrix units" if rows <= 64 else "fp8", "for a test")

    monkeypatch.setattr(warm_up, "choose_path", choose)
    monkeypatch.setattr(warm_up, "compiles", lambda device: True)
    monkeypatch.setattr(warm_up, "_warm", set())


def weight(rows: int, columns: int) -> PackedWeight:
    empty = torch.empty(rows, columns // 32, device="meta")
    return PackedWeight(torch.empty(rows, columns // 2, device="meta"), empty, empty)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("sharing", ["none", "site", "block"])
@pytest.mark.parametrize("columns", [32, 96, 576, 1536, 4096, 14336])
def test_no_number_of_rows_needs_another_kernel(columns: int, sharing: str) -> None:
    """Exhaustive up to 2048 rows, and every 37th up to 16384."""
    groups = {"none": None, "site": 1, "block": columns // 32}[sharing]
    matrices = None if groups is None else torch.empty(groups, 32, 32, device="meta")
    packed = weight(4096, columns)

    def key(rows: int) -> object:
        return warm_up.variant(rows, warm_up.choose_path(rows, packed, CPU).path, packed, matrices, CPU)

    counts = warm_up.row_counts(packed, matrices, CPU, 16384)
    compiled = {key(rows) for rows in counts}
    assert len(compiled) == len(counts) <= 24 and counts[0] == 1
    assert {key(rows) for rows in [*range(1, 2049), *range(2049, 16385, 37)]} <= compiled


@pytest.mark.usefixtures("hopper")
def test_both_ways_and_every_tile_are_there() -> None:
    counts = warm_up.row_counts(weight(4096, 4096), None, CPU, 8192)
    assert {1, 9, 17, 65} <= set(counts)  # tiles of 8, 16 and 32 inputs; the FP8 product
    assert max(warm_up.row_counts(weight(4096, 4096), None, CPU, 20)) <= 20


@pytest.mark.usefixtures("hopper")
def test_rows_that_do_not_depend_on_each_other_need_fewer_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_up, "choose_path", lambda *asked: dispatch.Choice("fixed tiles", "for a test"))
    packed = weight(4096, 4096)
    before = warm_up.row_counts(packed, None, CPU, 8192)
    with invariant_rows():
        counts = warm_up.row_counts(packed, None, CPU, 8192)
    assert counts[0] == 1 and len(counts) <= 3 < len(before)  # whole tiles or not, one step or several


@pytest.mark.usefixtures("hopper")
def test_a_linear_is_called_once_for_each_and_once_for_its_shape() -> None:
    module = linear(1)
    prepare_site((module,))
    called: list[tuple[int, ...]] = []

    def compute(x: Tensor, *_: object) -> None:
        called.append((*x.shape, x.dtype.itemsize))

    module.compute = compute  # type: ignore[method-assign,assignment]
    counts = warm_up_linear(module, torch.bfloat16, 300)
    assert called == [(rows, 96, 2) for rows in counts] and {1, 65} <= set(counts)
    assert warm_up_linear(module, torch.bfloat16, 300) == [] and len(called) == len(counts)
    assert warm_up_linear(module, torch.float16, 300) == counts


@pytest.mark.usefixtures("hopper")
def test_other_formats_are_called_with_powers_of_two() -> None:
    module = linear(0)
    module.activations = None
    assert warm_up_linear(module, torch.float32, 12) == [1, 2, 3, 4, 5, 8, 9, 12]


def test_nothing_is_called_where_nothing_is_compiled() -> None:
    assert warm_up_linear(linear(1).cpu(), torch.float32, 64) == []


def test_ways_are_found_where_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "crossovers_of", lambda device: Crossovers(packed=128, kept=0))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    device = torch.device("cuda")
    packed = PackedWeight(torch.empty(32, 16), torch.empty(32, 1), torch.empty(32), torch.empty(32))
    assert [(rows, way.path) for rows, way in warm_up.path_changes(packed, device)] == [
        (1, "matrix units"),
        (129, "fp8"),
    ]
    kept = replace(packed, lifted=torch.empty(32, 32))
    assert [(rows, way.path) for rows, way in warm_up.path_changes(kept, device)] == [(1, "fp8")]


def test_the_tiles_of_middle_rows_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tiles that numbers of rows up to the largest choose, in CUDA C++; in Triton, its default tiles."""
    from mxrot.kernels.cuda import middle

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    limits = Crossovers(packed=8, kept=8, few=8, middle=256, middle_kept=64)
    monkeypatch.setattr(dispatch, "crossovers_of", lambda device: limits)
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(middle, "is_there", lambda device: True)
    device = torch.device("cuda")
    weight = PackedWeight(torch.empty(4096, 2048), torch.empty(4096, 128), torch.empty(4096), torch.empty(4096))
    changes = [(rows, way.path) for rows, way in warm_up.path_changes(weight, device)]
    assert changes == [(1, "matrix units"), (9, "middle rows"), (257, "fp8")]
    of_middle = [warm_up.variant(rows, "middle rows", weight, None, device)[2] for rows in range(9, 257)]
    assert set(of_middle) == {middle.choose_tile(rows, 4096, 128) for rows in range(9, 257)}
