"""Codes are made some rows at a time: the same codes."""

from __future__ import annotations

import pytest
import torch

from mxrot.formats import FORMATS, QTensor, block, quantize


@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("name", FORMATS)
def test_rows_at_a_time_are_encoded_as_all_of_them(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    format = FORMATS[name]
    x = torch.randn(10, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    whole = quantize(x, format)
    monkeypatch.setattr(block, "ENCODED_ELEMENTS", 128 * rows)
    found = quantize(x, format)
    assert torch.equal(found.codes, whole.codes)
    assert torch.equal(found.dequantize(), whole.dequantize())


@pytest.mark.parametrize("name", FORMATS)
def test_one_above_other_undoes_a_split(name: str) -> None:
    whole = quantize(torch.randn(10, 128, generator=torch.Generator().manual_seed(0)), FORMATS[name])
    found = QTensor.one_above_other(whole.split_rows([1, 0, 6, 3]))
    assert torch.equal(found.codes, whole.codes)
    assert all(torch.equal(found.parts.tensors[part], tensor) for part, tensor in whole.parts.tensors.items())
