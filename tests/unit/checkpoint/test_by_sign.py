"""Two scales a block, all the way to disk and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracles.sample_blocks import bits
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import logits, recipe, windows_for, write
from torch import Tensor

from mxrot import quantizing
from mxrot.checkpoint import load
from mxrot.formats import TensorQuantizer, fake_quantize, get_format
from mxrot.layers import QuantLinear
from mxrot.rounding import get_rounding

AMXFP4 = get_format("amxfp4")
QUANTIZER = TensorQuantizer(AMXFP4, AMXFP4.rule())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_linear_gives_its_weight_back(method: str, tmp_path: Path) -> None:
    x = random(300, 128, seed=2) @ random(128, 128, seed=3)
    rounded = get_rounding(method)().round(random(24, 128), AMXFP4, QUANTIZER.rule, x.T @ x / 300, "w").weight
    linear, empty = (QuantLinear(128, 24, QUANTIZER, QUANTIZER) for _ in range(2))
    linear.set_weight(rounded)
    save_file(linear.state_dict(), tmp_path / "linear.safetensors")
    empty.load_state_dict(load_file(tmp_path / "linear.safetensors"))
    assert [*empty.state_dict()] == ["weight_packed", "weight_scale", "weight_negative_scale"]
    assert torch.equal(bits(empty.dequantized_weight()), bits(rounded.dequantize()))
    expected = fake_quantize(x.float(), AMXFP4) @ rounded.dequantize().T
    assert torch.equal(empty(x.float()), expected)


@pytest.mark.parametrize("name", ["amxfp4", "duquant++-gptq"])
def test_a_model_is_quantized_written_and_read(name: str, tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "source")
    same = {"format": "amxfp4", "rule": "absmax"}
    changes = {f"{part}__{key}": value for part in ("weights", "activations") for key, value in same.items()}
    chosen = recipe(name, **changes)
    write(source, tmp_path / "out", chosen)
    made = quantizing.quantize(source, chosen, windows=windows_for(chosen)).model
    assert made is not None
    linears = [module for module in made.modules() if isinstance(module, QuantLinear)]
    assert linears and all(linear.weights.format is linear.activations.format is AMXFP4 for linear in linears)
    assert torch.equal(logits(load(tmp_path / "out")), logits(made))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "amxfp4 weights and amxfp4 activations" in card and "| 4.500 |" in card
