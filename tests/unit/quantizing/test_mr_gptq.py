"""mr-gptq on one site, against its steps written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer
from mxrot.layers import QuantLinear
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe
from mxrot.rounding.gptq import GPTQ
from mxrot.transforms.hadamard import hadamard_matrix

WINDOWS = random_windows(8, 32)
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", torch.float32)


def first_linear(folder: Path, chosen: Recipe) -> QuantLinear:
    model = quantize(folder, chosen, windows=WINDOWS).model
    assert model is not None
    found = model.get_submodule(FIRST)
    assert isinstance(found, QuantLinear)
    return found


FACTOR = float(torch.tensor(32**-0.5).to(torch.bfloat16))
"""Of the signs of a Hadamard matrix, as it is applied; weights get the inverse of all of it."""


def rotated(x: Tensor, factor: float) -> Tensor:
    sign = hadamard_matrix(32).sign().double()
    return (x.double().unflatten(-1, (-1, 32)) @ sign).flatten(-2) * factor


def first_inputs(folder: Path) -> Tensor:
    """What the first site reads: the embedding under the first norm, [tokens, K]."""
    tensors = load_file(folder / "model.safetensors")
    hidden = tensors["model.embed_tokens.weight"][WINDOWS.flatten()].double()
    rms = (hidden.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
    return hidden / rms * tensors["model.layers.0.input_layernorm.weight"].double()


def test_the_codes_are_those_of_its_steps(folder: Path) -> None:
    """Sums are float64 here and float32 there: at most a few codes of 4096 may lie that close to a boundary."""
    chosen = recipe("mr-gptq")
    found = first_linear(folder, chosen).qtensor()
    x = rotated(first_inputs(folder), FACTOR)
    weight = rotated(load_file(folder / "model.safetensors")[f"{FIRST}.weight"], 1 / (32 * FACTOR))
    quantizer = chosen.weights.quantizer()
    method = GPTQ(scales="fixed", columns="descending", damping=0.01)

    def codes(inputs: Tensor) -> Tensor:
        hessian = inputs.T @ inputs / len(inputs)
        return method.round(weight, quantizer.format, quantizer.rule, hessian, "w").weight.codes

    assert (found.codes != codes(x)).float().mean() < 1e-3
    seen = TensorQuantizer.of("mxfp4")(x.float()).double()
    assert (found.codes != codes(seen)).float().mean() > 0.02


@pytest.mark.parametrize("name", ["mr-gptq", "mr-gptq-4-3"])
def test_what_a_hessian_is_of_is_an_option(folder: Path, name: str) -> None:
    here, there = (
        first_linear(folder, recipe(name, rounding__inputs=inputs)).weight_packed
        for inputs in ("unquantized", "quantized")
    )
    assert not torch.equal(here, there)
    alone = {"activations": "none"}
    same = [first_linear(folder, recipe(name, rounding__inputs=x, **alone)) for x in ("unquantized", "quantized")]
    assert torch.equal(same[0].weight_packed, same[1].weight_packed)


def test_blocks_of_128_need_widths_of_128(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"128") as caught:
        quantize(folder, recipe("mr-gptq-128"), windows=WINDOWS)
    assert "64" in str(caught.value) or "96" in str(caught.value)
