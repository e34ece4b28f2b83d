"""Rows of a site that are rounded some after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor

from mxrot.calibration import site_weights
from mxrot.formats import block, get_format, quantize
from mxrot.quantizing import rounded
from mxrot.quantizing.run import quantize as quantize_model

ALONE = {"calibration__generated": 0.0}
CHOSEN = {
    "rtn": {"name": "rtn"},
    "smoothquant": {"name": "smoothquant"},
    "mxrot": {"name": "mxrot", **ALONE},
    "target original": {"name": "mxrot", **ALONE, "rounding__target": "original"},
    "descending": {"name": "mxrot", **ALONE, "rounding__scales": "fixed", "rounding__columns": "descending"},
    "scales of the whole tensor": {"name": "rtn", "weights__format": "nvfp4", "weights__rule": "absmax"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize("label", CHOSEN)
def test_the_codes_are_those_of_all_rows_together(folder: Path, monkeypatch: pytest.MonkeyPatch, label: str) -> None:
    """24 rows of 64 or 16 of 96, where sites have up to 192; codes in pieces of 8."""

    def result() -> tuple[dict[str, Tensor], list[Any]]:
        chosen = recipe(**CHOSEN[label])
        found = quantize_model(folder, chosen, windows=None if chosen.is_data_free else random_windows(4, 32))
        assert found.model is not None
        errors = [linear.weight_error for part in found.record.blocks for linear in part.linears]
        return found.model.state_dict(), errors

    expected, errors = result()
    for module, name, value in (
        (site_weights, "MOST_TOGETHER", 1),
        (site_weights, "ELEMENTS_AT_ONCE", 24 * 64),
        (block, "ENCODED_ELEMENTS", 8 * 64),
        (rounded, "ERROR_ELEMENTS", 5 * 64),
    ):
        monkeypatch.setattr(module, name, value)
    found, in_pieces = result()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert in_pieces == pytest.approx(errors, rel=1e-12)


def test_norms_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.randn(9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = quantize(wanted, get_format("mxfp4"))
    lost = (weight.dequantize(torch.float64) - wanted).norm()
    assert rounded.error_norms(weight, wanted) == (lost, wanted.norm())
    monkeypatch.setattr(rounded, "ERROR_ELEMENTS", 2 * 64)
    torch.testing.assert_close(rounded.error_norms(weight, wanted), (lost, wanted.norm()), rtol=1e-14, atol=0)
    assert rounded.error_ratio(lost, torch.zeros((), dtype=torch.float64)) == lost
