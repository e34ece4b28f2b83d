"""Scales of inputs that E5M2 does not hold: found, told, and moved into the weights without a change of any value."""

from __future__ import annotations

import warnings
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import TOKENS, recipe, windows_for, write

import mxrot
from mxrot.checkpoint import load
from mxrot.errors import MxrotWarning
from mxrot.formats import TensorQuantizer, get_format
from mxrot.kernels.plain import E5M2_EXPONENTS
from mxrot.layers import QuantLinear
from mxrot.quantizing import input_scales
from mxrot.quantizing.input_scales import exponents_of, shift_for

FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())
LEAST, MOST = E5M2_EXPONENTS


def test_the_shift_of_every_span() -> None:
    """Exhaustive: what fits is left alone, what can fit does after it, and else the largest scale is just inside."""
    for lowest, highest in product(range(-60, 61), repeat=2):
        if lowest > highest:
            continue
        shift = shift_for(lowest, highest)
        fits = lowest - shift >= LEAST and highest - shift <= MOST
        assert fits == (highest - lowest <= MOST - LEAST)
        assert fits or highest - shift == MOST
        assert shift == 0 or lowest < LEAST or highest > MOST


@pytest.mark.parametrize("exponent", [-40, -16, -15, 0, 13, 14, 60])
def test_exponents_are_those_of_the_quantizer(exponent: int) -> None:
    x = torch.zeros(3, 64)
    x[1, 40], x[2, 3] = 4 * 2.0**exponent, -4 * 2.0 ** (exponent + 2)
    assert exponents_of(x, QUANTIZER) == (exponent, exponent + 2)
    assert exponents_of(torch.zeros(2, 32), QUANTIZER) == (0, 0)
    x[0] = float("nan")
    assert exponents_of(x, QUANTIZER) == (exponent, exponent + 2)


@pytest.fixture(scope="module", params=[2.0**20, 2.0**-22], ids=["large", "small"])
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose first norm gives large or small numbers, and whose query, key and value take that back."""
    folder = write_tiny_model(tmp_path_factory.mktemp("scaled") / "model", torch.bfloat16)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    for name, factor in (
        ("input_layernorm", request.param),
        *((f"self_attn.{x}_proj", 1 / request.param) for x in "qkv"),
    ):
        tensors[f"model.layers.0.{name}.weight"] *= factor
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def quantized(source: Path, output: Path, name: str) -> list[str]:
    """The warnings of a run."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MxrotWarning)
        write(source, output, recipe(name, calibration__generated=0.0) if name == "mxrot" else recipe(name))
    return [str(one.message) for one in caught if one.category is MxrotWarning]


def test_a_shift_moves_them_and_no_value_changes(scaled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert quantized(scaled, tmp_path / "moved", "mr-gptq") == []
    monkeypatch.setattr(input_scales, "within_e5m2", None)
    monkeypatch.setattr("mxrot.quantizing.site.within_e5m2", lambda transform, *rest: transform)
    assert quantized(scaled, tmp_path / "left", "mr-gptq") == []
    moved, left = (load(tmp_path / name, dtype=torch.float32) for name in ("moved", "left"))
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    gain = load_file(next(scaled.glob("*.safetensors")))["model.layers.0.input_layernorm.weight"].float()
    for name, module in moved.named_modules():
        if isinstance(module, QuantLinear):
            other = left.get_submodule(name)
            assert isinstance(other, QuantLinear) and torch.equal(module.weight_packed, other.weight_packed)
    site, before = (model.get_submodule("model.layers.0.self_attn.q_proj") for model in (moved, left))
    assert isinstance(site, QuantLinear) and isinstance(before, QuantLinear)
    inputs = [one.quantized_input(x * gain) for one in (site, before)]
    shift = (site.weight_scale.int() - before.weight_scale.int()).unique()
    assert len(shift) == 1 and int(shift) != 0
    assert torch.equal(inputs[0] * 2.0 ** int(shift), inputs[1])
    with torch.no_grad():
        assert torch.equal(moved(TOKENS).logits, left(TOKENS).logits)


def test_what_has_no_transform_is_told_alone(scaled: Path, tmp_path: Path) -> None:
    chosen = recipe("rtn", calibration__samples=4, rounding__method="gptq")
    assert windows_for(chosen) is not None
    with pytest.warns(MxrotWarning, match="give this site a block transform"):
        write(scaled, tmp_path / "out", chosen)


def test_nobody_is_told_of_scales_that_fit(source: Path, tmp_path: Path) -> None:
    assert quantized(source, tmp_path / "out", "mxrot") == []
    assert mxrot.load(tmp_path / "out") is not None
