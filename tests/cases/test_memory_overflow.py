"""Weights at the limits of their type: one line that names the layer, never an Inf or a NaN in silence."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model
from torch import Tensor

import mxrot as package

BLOCK = "model.layers.0"
SMALL = ("--samples", "2", "--seq-len", "32")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base") / "model", torch.float32)


@pytest.fixture
def changed(base: Path, tmp_path: Path) -> Callable[[str, Callable[[Tensor], None]], Path]:
    """The model with one of its tensors changed."""

    def change(name: str, how: Callable[[Tensor], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(base, folder)
        tensors = load_file(folder / "model.safetensors")
        how(tensors[f"{BLOCK}.{name}.weight"])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return change


def largest(value: float) -> Callable[[Tensor], None]:
    """Make one weight this large."""
    return lambda weight: weight.view(-1)[5:6].fill_(value)


def all_up_to(value: float) -> Callable[[Tensor], None]:
    """Scale all weights, so that the largest is this."""
    return lambda weight: weight.mul_(value / weight.abs().max())


@pytest.mark.case("G12")
@pytest.mark.parametrize("linear", ["self_attn.q_proj", "mlp.down_proj"])
@pytest.mark.parametrize("value", [3.4e38, -3.4e38])
def test_a_weight_that_rounds_to_more_than_float32_holds(
    changed: Callable[..., Path], tmp_path: Path, linear: str, value: float
) -> None:
    line = refused("quantize", changed(linear, largest(value)), "-r", "rtn", "-o", tmp_path / "out")
    assert line.startswith(f"{BLOCK}.{linear}: ") and "3.4e+38" in line


@pytest.mark.case("G12")
def test_weights_that_a_rotation_gathers(changed: Callable[..., Path], tmp_path: Path) -> None:
    """Each fits, and 32 of them in one channel do not."""
    model = changed("mlp.down_proj", lambda weight: weight.fill_(2e38))
    line = refused("quantize", model, "-r", "hadamard", "-o", tmp_path / "out")
    assert line.startswith(f"{BLOCK}.mlp.down_proj: ") and "1.13e+39, to more than float32 holds" in line


@pytest.mark.case("G12")
def test_a_large_weight_that_fits_is_kept(changed: Callable[..., Path], tmp_path: Path) -> None:
    model = changed("mlp.down_proj", largest(2.5e38))
    assert mxrot("quantize", model, "-r", "rtn", "-o", tmp_path / "out").exit_code == 0
    kept = package.load(str(tmp_path / "out"), device="cpu").model.layers[0].mlp.down_proj.dequantized_weight()
    assert kept.abs().max() == 1.5 * 2.0**127


@pytest.mark.case("F8")
@pytest.mark.parametrize("linear", ["self_attn.v_proj", "mlp.up_proj"])
def test_weights_whose_squares_overflow(changed: Callable[..., Path], tmp_path: Path, linear: str) -> None:
    words = ["quantize", changed(linear, all_up_to(1e30)), "-r", "mxrot", "-o", tmp_path / "out", *SMALL]
    plain = ("--set", "calibration.generated=0", "--device", "cpu")
    line = refused(*words, *plain, "--set", "permutation=none")
    assert line.startswith(f"{BLOCK}.") and "overflow" in line
    assert refused(*words, *plain).startswith(f"{BLOCK}.")  # orders of channels may meet it first


@pytest.mark.case("G12")
def test_a_gain_that_smoothing_makes_too_large(tmp_path: Path) -> None:
    """float16 ends at 65504, and a gain divided by a small scale goes beyond."""
    model = write_tiny_model(tmp_path / "model", torch.float16)
    tensors = load_file(model / "model.safetensors")
    tensors[f"{BLOCK}.input_layernorm.weight"][3] = 60000.0
    tensors["model.embed_tokens.weight"][:, 3] = 1e-7
    for name in ("q", "k", "v"):
        tensors[f"{BLOCK}.self_attn.{name}_proj.weight"][:, 3] = 100.0
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    line = refused("quantize", model, "-r", "smoothquant", "-o", tmp_path / "out", *SMALL, "--device", "cpu")
    assert line.startswith(f"{BLOCK}.input_layernorm.weight: with smoothing scales it is more than float16 holds")
