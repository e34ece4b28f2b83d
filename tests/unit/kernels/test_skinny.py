"""Some rows in E5M2 times packed MXFP4 weights: against the plain twin, float64, and every code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import (
    PackedRows,
    plain_lifted_product,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def random(rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, columns, generator=generator))
    return x.to(DEVICE)


def weights(rows: int, columns: int) -> PackedRows:
    return plain_rotate_quantize_packed(random(rows, columns, 1), None, FORMAT, FORMAT.rule())


def product(x: Tensor, shift: int, w: PackedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    from mxrot.kernels.skinny import skinny_product

    return skinny_product(x, shift, w.codes, w.scales, dtype)


@pytest.mark.parametrize("shift", [-2, 0, 3])
@pytest.mark.parametrize("inputs", [1, 16, 33])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (100, 320)])
def test_it_is_the_product(inputs: int, rows: int, columns: int, shift: int) -> None:
    x = plain_rotate_quantize_e5m2(random(inputs, columns, 0), None, FORMAT, FORMAT.rule(), shift)
    w = weights(rows, columns)
    dequantized = QTensor.from_packed(w.codes, BlockScales(w.scales, FORMAT.scale), FORMAT).dequantize(torch.float64)
    exact = x.double() @ dequantized.mT * 2.0**shift
    bound = 2.0**-20 * (x.double().abs() @ dequantized.abs().mT * 2.0**shift)
    for found in (product(x, shift, w), plain_lifted_product(x, shift, w.codes, w.scales, torch.float32)):
        assert found.shape == (inputs, rows) and ((found.double() - exact).abs() <= bound).all()


def test_every_code_at_every_place() -> None:
    x = torch.eye(32, device=DEVICE).to(torch.float8_e5m2)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    for turn in range(16):
        row = codes.roll(turn)
        packed = (row[::2] | row[1::2] << 4)[None].to(DEVICE)
        scales = torch.full((1, 1), 127, dtype=torch.uint8, device=DEVICE)
        found = product(x, 0, PackedRows(packed, scales))[:, 0]
        assert torch.equal(found.cpu(), torch.tensor(FORMAT.element.values)[row.long()])


def test_nan_in_inputs_and_scales() -> None:
    x = random(3, 64, 0).to(torch.float8_e5m2)
    w = weights(5, 64)
    w.scales[3, 0] = 255
    expected = torch.zeros(3, 5, dtype=torch.bool, device=DEVICE)
    expected[:, 3] = True
    if DEVICE == "cuda":  # Triton's interpreter reads NaN in FP8 as a number
        x[1, 40] = float("nan")
        expected[1] = True
    isnan = product(x, 0, w).isnan()
    assert torch.equal(isnan, expected)


def test_leading_shapes_and_no_rows() -> None:
    x, w = random(6, 64, 0).to(torch.float8_e5m2), weights(5, 64)
    found = product(x.view(2, 3, 64), 0, w, torch.float16)
    assert found.shape == (2, 3, 5) and found.dtype == torch.float16
    torch.testing.assert_close(found.view(6, 5).float(), product(x, 0, w), rtol=2.0**-9, atol=1e-4)
    assert product(x[:0], 0, w).shape == (0, 5)
