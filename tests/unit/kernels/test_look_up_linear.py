"""A quantized linear whose weights are looked up: which way it is computed, and that all ways compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.kernels import Inputs, LookUpWeight, choose_look_up, dispatch
from mxrot.kernels.dispatch import LOOK_UP_ROWS
from mxrot.kernels.linear import by_look_up
from mxrot.layers import InputTransform, QuantLinear
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.site_transform import SiteTransform
from mxrot.transforms.stages import BlockDiagonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = torch.device("cuda")
INPUTS = ("int4_row absmax clip 0.9", "int8_row absmax", "int4_row_asym minmax")


def linear(inputs: str | None, width: int = 96, height: int = 20, rotated: bool = False) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    activations = None if inputs is None else TensorQuantizer.named(inputs)
    found = QuantLinear(
        width, height, TensorQuantizer.of("lut2"), activations, torch.randn(height, generator=generator)
    )
    found.set_weight(quantize(torch.randn(height, width, generator=generator), get_format("lut2")))
    if rotated:
        matrices = random_orthogonal(1, 32, generator)
        found.own_transform("test", InputTransform.of(SiteTransform((BlockDiagonal(matrices),))))
    return found.to(DEVICE)


def random(rows: int, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def weight_of(group: int) -> LookUpWeight:
    zeros = torch.zeros(2, 1, 4, dtype=torch.int8)
    return LookUpWeight(torch.zeros(2, group // 4, dtype=torch.uint8), zeros[..., 0].half(), zeros)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("rows", [1, 5])
def test_the_kernels_compute_the_linear(inputs: str, rows: int) -> None:
    module, x = linear(inputs), random(rows)
    assert module.activations is not None and module.bias is not None
    weight = module.stored_weight().looked_up()
    found = by_look_up(Inputs(x, None, module.activations.format, module.activations.rule), weight) + module.bias
    # In float64: (x W^T) of what both sides stand for.
    expected = module.activations(x).double() @ module.dequantized_weight().double().T + module.bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_linear_takes_the_kernel_where_it_runs(rotated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = linear(INPUTS[0], rotated=rotated), random(2, dtype=torch.bfloat16)
    expected, taken = module(x), []

    def chosen(rows: int, *_: object) -> dispatch.Choice:
        taken.append(rows)
        return dispatch.Choice("look-up", "a test says so")

    monkeypatch.setattr(dispatch, "choose_look_up", chosen)
    found = module(x)
    assert taken == [2] and found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize(("rows", "path"), [(0, "look-up"), (1, "look-up"), (1024, "look-up"), (1025, None)])
def test_few_rows_are_looked_up(rows: int, path: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    assert choose_look_up(rows, weight_of(96), get_format("int4_row"), GPU).path == path


def test_what_is_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    assert "multiple of 16" in choose_look_up(1, weight_of(24), get_format("int4_row"), GPU).reason
    for format in ("mxfp4", "int4_g32", "amxfp4"):
        assert "integers" in choose_look_up(1, weight_of(96), get_format(format), GPU).reason
    assert "Nvidia" in choose_look_up(1, weight_of(96), get_format("int4_row"), torch.device("cpu")).reason
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose_look_up(1, weight_of(96), get_format("int4_row"), GPU).path is None


def test_a_linear_says_what_computes_it() -> None:
    assert "look" in linear(INPUTS[0]).choose_path(1).reason
    assert "MXFP4" in linear(None).choose_path(1).reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("width", "dtype"), [(576, torch.bfloat16), (1536, torch.float32)])
def test_few_rows_and_many_are_the_same(width: int, dtype: torch.dtype) -> None:
    """One path looks weights up, the other writes them out."""
    module, x = linear(INPUTS[0], width, 200), random(LOOK_UP_ROWS + 1, width, dtype)
    assert module.choose_path(20).path == "look-up" and module.choose_path(len(x)).path is None
    many, few = module(x)[:20], torch.cat([module(piece) for piece in x[:20].split([1, 8, 11])])
    tolerance = 1e-4 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(few, many, rtol=tolerance, atol=tolerance)
