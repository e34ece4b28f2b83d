"""A quantized head: logits against a slow version, gradients, types, and what it becomes of a model of another type."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer, quantize
from mxrot.kernels.plain import coded_weights
from mxrot.layers import HeadLinear, InputTransform, prepare_site
from mxrot.transforms import BlockDiagonal, SiteTransform
from mxrot.transforms.base import random_orthogonal

K, N = 96, 70
KINDS = [
    ("mxint8", None, False),
    ("mxfp8_e4m3", None, False),
    ("mxfp4", None, True),
    ("mxfp6_e2m3", None, False),
    ("mxfp4", "mxfp4", True),
    ("mxfp8_e4m3", "mxfp8_e4m3", False),
]
kinds = pytest.mark.parametrize(("weights", "inputs", "is_rotated"), KINDS)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_of(weights: str, inputs: str | None, is_rotated: bool, bias: Tensor | None = None) -> HeadLinear:
    quantizer = TensorQuantizer.of(weights)
    head = HeadLinear(K, N, quantizer, None if inputs is None else TensorQuantizer.of(inputs), bias)
    head.set_weight(quantize(drawn(N, K, seed=1), quantizer.format, quantizer.rule))
    if is_rotated:
        matrices = random_orthogonal(1, 32, torch.Generator().manual_seed(3))
        head.own_transform("head", InputTransform.of(SiteTransform((BlockDiagonal(matrices),))))
    return head


def slow(head: HeadLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, one row and one token at a time; and how far float32 sums may be off."""
    values = head.dequantized_weight().double()
    inputs = head.quantized_input(x)
    if head.activations is None:
        inputs = inputs.to(x.dtype)
    flat = inputs.reshape(-1, K).double()
    found = torch.stack([torch.stack([(row * values[n]).sum() for n in range(N)]) for row in flat])
    off = K * 2.0**-24 * (flat.abs() @ values.abs().t())
    if head.bias is not None:
        found = found + head.bias.double()
    return found.view(*x.shape[:-1], N), off.view(*x.shape[:-1], N)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_logits_are_those_of_a_slow_version(
    weights: str, inputs: str | None, is_rotated: bool, dtype: torch.dtype, has_bias: bool
) -> None:
    head = head_of(weights, inputs, is_rotated, drawn(N, seed=2) if has_bias else None)
    x = drawn(2, 3, K).to(dtype)
    found = head(x)
    expected, off = slow(head, x)
    assert found.dtype == dtype and found.shape == expected.shape
    rounding = torch.finfo(dtype).eps / 2 * expected.abs()
    assert ((found.double() - expected).abs() <= off + (1 + 2.0**-10) * rounding + 2.0**-24 * expected.abs()).all()


def test_how_many_rows_are_written_out_at_once_changes_only_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = head_of("mxint8", None, False), drawn(4, K)
    at_once = head(x)
    monkeypatch.setattr(coded_weights, "WRITTEN_OUT", 9 * K)
    _, off = slow(head, x)
    assert ((head(x) - at_once).abs() <= 2 * off).all()


@pytest.mark.parametrize("is_rotated", [False, True])
def test_gradients_are_those_of_the_written_out_product(is_rotated: bool) -> None:
    head = head_of("mxfp8_e4m3", None, is_rotated, drawn(N, seed=2))
    assert head.bias is not None
    head.bias.requires_grad_(True)
    x = drawn(5, K).requires_grad_(True)
    with torch.no_grad():
        forward = head(x)
    traced = head(x)
    assert torch.equal(traced, forward)
    gradient = drawn(5, N, seed=4)
    traced.backward(gradient)
    assert x.grad is not None and head.bias.grad is not None
    inputs = x.detach().double().requires_grad_(True)
    matrices = torch.eye(32, dtype=torch.float64)[None]
    if head.transform is not None:
        matrices = head.transform.matrices().double()
    rotated = (inputs.unflatten(1, (-1, 1, 32)) @ matrices[0]).flatten(1)
    (rotated @ head.dequantized_weight().double().t()).backward(gradient.double())
    assert inputs.grad is not None
    torch.testing.assert_close(x.grad.double(), inputs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(head.bias.grad, gradient.sum(0))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[2]])
def test_compiled_it_gives_the_same_bits(kind: tuple[str, str | None, bool]) -> None:
    head, x = head_of(*kind), drawn(5, K)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), head(x))


@kinds
def test_a_cast_of_the_model_leaves_codes_and_a_copy_gives_the_same(
    weights: str, inputs: str | None, is_rotated: bool
) -> None:
    head, x = head_of(weights, inputs, is_rotated, drawn(N, seed=2).bfloat16().float()), drawn(3, K).bfloat16()
    expected = head(x)
    prepare_site((head,))
    assert torch.equal(head(x), expected)
    assert torch.equal(copy.deepcopy(head)(x), expected)
    cast = head.to(torch.bfloat16)
    assert cast.weight_packed.dtype == torch.uint8 and cast.bias is not None and cast.bias.dtype == torch.bfloat16
    assert torch.equal(cast(x), expected)


def test_what_computes_it_is_said() -> None:
    assert "not on cpu" in head_of("mxint8", None, False).choose_path(1).reason
    assert head_of("mxfp4", "mxfp4", True).choose_path(1).reason == "cpu has no FP4 or FP8 products"


def test_no_tokens() -> None:
    assert head_of("mxint8", None, False)(drawn(2, 0, K)).shape == (2, 0, N)
