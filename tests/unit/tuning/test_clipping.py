"""Learned clipping: what it rounds to, its gradient beside one by autograd, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.oracles.sample_blocks import bits
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import digests, logits, without_run, write
from torch import Tensor

from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.layers import QuantLinear
from mxrot.quantizing import run as pipeline
from mxrot.recipe import load_recipe
from mxrot.tuning.clipping import ClippedLinear, RoundClipped
from mxrot.tuning.tunable import TunableInputs

FORMATS = ["int4_row_asym", "int4_row", "int4_g32_asym", "mxfp4"]
SHORT = {"tuning.steps": 6, "tuning.checks": 2, "tuning.held_out": 0.2, "transform.steps": 4}
ROWS, K = 6, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(name: str) -> TensorQuantizer:
    return TensorQuantizer.of(name)


def clipped(name: str, weight: Tensor) -> ClippedLinear:
    """A linear as rounding leaves it, with what that took away, about to be clipped."""
    own = quantizer(name)
    linear = QuantLinear(K, len(weight), own, own)
    linear.set_weight(quantize(weight, own.format, own.rule))
    linear.remainder = (weight - linear.qtensor().dequantize()).to(torch.bfloat16)
    return ClippedLinear(linear, TunableInputs(None, own, 1, torch.device("cpu")))


def set_ends(linear: ClippedLinear, seed: int = 3) -> None:
    with torch.no_grad():
        linear.lower.copy_(random(*linear.lower.shape, seed=seed))
        linear.upper.copy_(random(*linear.upper.shape, seed=seed + 1))


@pytest.mark.parametrize("name", FORMATS)
def test_the_weights_are_what_a_checkpoint_will_hold(name: str) -> None:
    linear = clipped(name, random(ROWS, K))
    set_ends(linear)
    expected = linear.weight()
    assert not torch.equal(linear._linear[0].qtensor().dequantize(), expected)
    finished = linear.finished()
    assert torch.equal(bits(finished.qtensor().dequantize()), bits(expected))
    assert finished.remainder is None


@pytest.mark.parametrize("name", ["int4_row_asym", "int4_g32_asym"])
def test_clipping_by_the_formula(name: str) -> None:
    """Row by row: s = (sigmoid(upper) max - sigmoid(lower) min) / 15 in FP16, z = round(-low / s)."""
    linear = clipped(name, random(ROWS, K))
    set_ends(linear)
    block = get_format(name).block_in(K)
    for row in range(ROWS):
        for group in range(K // block):
            w = linear.blocks[row, group].double()
            low = torch.sigmoid(linear.lower[row, group]).double() * min(float(w.min()), 0.0)
            high = torch.sigmoid(linear.upper[row, group]).double() * max(float(w.max()), 0.0)
            scale = ((high - low) / 15).half().double()
            zero = (-low / scale).round()
            codes = ((w / scale).round() + zero).clamp(0, 15)
            expected = (codes - zero) * scale
            got = linear.weight()[row].unflatten(0, (-1, block))[group].double()
            assert (got - expected).abs().max() <= 1e-6


def straight(x: Tensor, rounded: Tensor) -> Tensor:
    return x + (rounded - x).detach()


def by_autograd(low: Tensor, high: Tensor, blocks: Tensor, name: str) -> Tensor:
    """The rounding again, of operations that autograd knows and roundings that it does not see."""
    element = get_format(name).element
    if element.is_signed:
        scale = torch.maximum(high, -low) / element.max
        zero = torch.zeros_like(low)[..., None]
    else:
        scale = (high - low) / element.max
    scale = straight(scale, scale.half().to(scale.dtype))[..., None]
    if not element.is_signed:
        zero = -low[..., None] / scale
        zero = straight(zero, zero.round())
    codes = straight(blocks / scale, (blocks / scale).round()) + zero
    return (codes.clamp(-7 if element.is_signed else 0, element.max) - zero) * scale


@pytest.mark.parametrize("name", ["int4_row_asym", "int4_row", "int4_g32_asym"])
def test_the_gradient_is_that_of_autograd(name: str) -> None:
    """Blocks clipped by very little and by half, where most of the gradient is that of saturated elements."""
    own = quantizer(name)
    for share in (0.98, 0.5):
        weight = random(ROWS, K, seed=7)
        blocks = weight.unflatten(1, (-1, own.format.block_in(K)))
        low = (share * blocks.amin(dim=-1)).requires_grad_()
        high = (0.9 * share * blocks.amax(dim=-1)).requires_grad_()
        direction = random(*blocks.shape, seed=8)
        rounded = RoundClipped.apply(low, high, blocks, own)
        expected = by_autograd(low, high, blocks, name)
        assert (rounded - expected).abs().max() <= 1e-5
        got = torch.autograd.grad(rounded, (low, high), direction)
        wanted = torch.autograd.grad(expected, (low, high), direction)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_dead_rows_have_no_gradient() -> None:
    linear = clipped("int4_row_asym", torch.zeros(ROWS, K))
    linear.weight().sum().backward()
    for end in (linear.lower, linear.upper):
        assert end.grad is not None and torch.equal(end.grad, torch.zeros_like(end))


# Whole runs


LEARNED = load_recipe("duquant-lwc")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What reads a norm has ten times as large weights for a channel that the norm nearly silences."""
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if "layernorm" in name:
            value[5] = 0.001
        elif any(linear in name for linear in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            value[:, 5] *= 10
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_it_brings_blocks_closer_by_scales_alone(source: Path) -> None:
    """Without a transform, which would spread the large weights: their clipping is learned."""
    chosen = LEARNED.changed(
        {"transform.method": "identity", "smoothing": "none", "tuning.clip_rate": 0.3, "tuning.steps": 40}
    )
    found = pipeline.quantize(source, chosen, windows=random_windows(40, 32))
    for block in found.record.blocks:
        assert block.tuning is not None
        assert min(check.held_out for check in block.tuning) < 0.7 * block.tuning[0].held_out
    plain = pipeline.quantize(source, chosen.changed({"tuning": "none"}), windows=random_windows(40, 32))
    assert found.model is not None and plain.model is not None
    before, after = plain.model.state_dict(), found.model.state_dict()
    name = "model.layers.0.mlp.gate_proj.weight_scale"
    assert after[name].float().mean() < 0.7 * before[name].float().mean()


def test_a_clipped_model_is_an_ordinary_quantized_one(source: Path, tmp_path: Path) -> None:
    """Reloaded it gives the same bits; a second run too; and nothing of tuning is left in it."""
    chosen, windows = LEARNED.changed(SHORT), random_windows(10, 32)
    model = pipeline.quantize(source, chosen, windows=windows).model
    assert model is not None
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14 and all(linear.remainder is None for linear in linears)
    write(source, tmp_path / "one", chosen, windows=windows)
    assert torch.equal(logits(load(tmp_path / "one")), logits(model))
    write(source, tmp_path / "two", chosen, windows=windows)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "two"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning.scope": "network"}, 'moves = "clipping" needs scope = "block", got \'network\''),
        ({"tuning.clip_rate": 0.0}, "clip_rate 0.0 is not positive and finite"),
        (
            {"rounding.method": "gptq", "rounding.scales": "fixed"},
            'rounding gptq does otherwise; set rounding.method = "rtn"',
        ),
        ({"weights.format": "mxfp4", "weights.rule": "mse"}, "rule 'mse' of mxfp4 looks at more"),
        ({"weights.format": "nvfp4", "weights.rule": ""}, "rule 'absmax' of nvfp4 looks at more"),
        ({"activations": "none"}, "tuning needs quantized activations"),
    ],
    ids=str,
)
def test_what_cannot_be_clipped(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        LEARNED.changed(changes)
    assert message in str(raised.value)
