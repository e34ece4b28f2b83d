"""A linear whose input transform is of several stages: a permutation, a Hadamard matrix of the width, blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.oracles.sample_blocks import bits
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.layers import InputTransform, QuantLinear, SiteProducts, prepare_site
from mxrot.transforms import (
    BlockDiagonal,
    HadamardOfWidth,
    Permutation,
    SiteTransform,
    Stage,
)
from mxrot.transforms.base import random_orthogonal

K = 96
MXFP4 = TensorQuantizer(get_format("mxfp4"), get_format("mxfp4").rule())


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blocks(size: int, count: int, seed: int = 1) -> BlockDiagonal:
    return BlockDiagonal(random_orthogonal(count, size, torch.Generator().manual_seed(seed)))


PERMUTATION = Permutation(torch.randperm(K, generator=torch.Generator().manual_seed(2)))
TRANSFORMS: dict[str, tuple[Stage, ...]] = {
    "permutation, hadamard, blocks": (PERMUTATION, HadamardOfWidth(), blocks(32, 3)),
    "hadamard": (HadamardOfWidth(),),
    "blocks, permutation": (blocks(32, 3), PERMUTATION),
    "two blocks": (blocks(48, 2), PERMUTATION, blocks(32, 1, seed=3)),
    "blocks of 48": (blocks(48, 2),),
    "one block of 96": (blocks(96, 1),),
}
each = pytest.mark.parametrize("name", TRANSFORMS)


def transform_called(name: str) -> SiteTransform:
    return SiteTransform(TRANSFORMS[name]).as_applied()


def linear_with(transform: SiteTransform, rows: int = 5, seed: int = 7) -> QuantLinear:
    linear = QuantLinear(K, rows, MXFP4, MXFP4)
    linear.set_weight(quantize(random(rows, K, seed=seed), MXFP4.format))
    linear.own_transform("layer0_down", InputTransform.of(transform))
    return linear


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_quantizes_what_the_transform_says(name: str, dtype: torch.dtype) -> None:
    transform, x = transform_called(name), random(4, K, seed=0).to(dtype)
    linear = linear_with(transform)
    expected = MXFP4(transform.apply(x))
    assert torch.equal(bits(linear.quantized_input(x).float()), bits(expected))
    product = (expected.double() @ linear.dequantized_weight().double().T).to(dtype)
    # Sums of 96 products in float32, then one rounding to the dtype.
    torch.testing.assert_close(linear(x), product, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # of inductor's own
@each
def test_compiled_it_computes_the_same(name: str) -> None:
    torch._dynamo.reset()
    linear = linear_with(transform_called(name))
    x = random(4, K, seed=0).to(torch.bfloat16)
    for backend in ("aot_eager", "inductor"):  # the latter leaves out roundings between operations that it sees
        compiled = torch.compile(linear, fullgraph=True, backend=backend)
        assert torch.equal(bits(compiled(x)), bits(linear(x)))


@each
def test_the_gradient_is_that_of_the_transformed_product(name: str) -> None:
    """Straight through the rounding of the inputs: x T W_q^T, differentiated by PyTorch in float64."""
    transform = transform_called(name)
    linear = linear_with(transform)
    x, direction = random(4, K, seed=0).requires_grad_(), random(4, 5, seed=9)
    (got,) = torch.autograd.grad(linear(x), x, direction)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(
        transform.apply(exact) @ linear.dequantized_weight().double().T, exact, direction.double()
    )
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@each
def test_linears_of_a_site_apply_it_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = linear_with(transform_called(name))
    second = QuantLinear(K, 3, MXFP4, MXFP4)
    second.set_weight(quantize(random(3, K, seed=8), MXFP4.format))
    assert first.transform is not None
    second.share_transform(first.transform)
    x = random(4, K, seed=0)
    alone = first(x), second(x)
    first.site = second.site = SiteProducts((first, second))
    prepare_site((first, second))
    calls: list[Tensor] = []
    lead = InputTransform.lead
    monkeypatch.setattr(InputTransform, "lead", lambda self, x: calls.append(x) or lead(self, x))
    for got, expected in zip((first(x), second(x)), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert len(calls) == 1


@each
def test_a_state_dict_holds_it_whole(name: str) -> None:
    transform = transform_called(name)
    full = linear_with(transform)
    empty = QuantLinear(K, 5, MXFP4, MXFP4)
    empty.own_transform("layer0_down", InputTransform.empty(transform.specs, K, "cpu"))
    empty.load_state_dict(full.state_dict())
    x = random(4, K, seed=0)
    assert torch.equal(empty(x), full(x))
    assert torch.equal(copy.deepcopy(full)(x), full(x))
    half = copy.deepcopy(full).to(torch.float16)
    assert torch.equal(half(x), full(x)) and all(not p.requires_grad for p in half.parameters())


def test_offloaded_stages_are_brought_by_a_call() -> None:
    """accelerate puts parameters on the meta device and brings them for the time of a module's call."""
    transform = transform_called("permutation, hadamard, blocks")
    linear = linear_with(transform)
    x, owner = random(4, K, seed=0), linear.transform
    assert owner is not None
    expected = linear(x)
    kept = {name: parameter.data for name, parameter in owner.named_parameters()}

    def bring(module: nn.Module, *_: object) -> None:
        for name, value in kept.items():
            setattr(module, name, nn.Parameter(value, requires_grad=False))

    def take(module: nn.Module, *_: object) -> None:
        for name, value in kept.items():
            setattr(module, name, nn.Parameter(value.to("meta"), requires_grad=False))

    take(owner)
    owner.register_forward_pre_hook(bring)
    owner.register_forward_hook(take)
    assert torch.equal(linear(x), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each
@pytest.mark.parametrize("rows", [4, 600])
def test_kernels_multiply_what_the_transform_says(name: str, rows: int) -> None:
    """On every path of the product; blocks that the kernels do not mix are multiplied in float32 before them."""
    transform = transform_called(name)
    linear = linear_with(transform, rows=48).cuda()
    x = random(rows, K, seed=0).to("cuda", torch.bfloat16)
    seen = linear.quantized_input(x).double()
    on_cpu = MXFP4(transform.apply(x.cpu())).double()
    # Sums in another order round to another code where they lie at a tie.
    assert ((seen.cpu() != on_cpu).double().mean() < 0.01) and (seen.cpu() - on_cpu).norm() < 0.05 * on_cpu.norm()
    expected = seen @ linear.dequantized_weight().double().T
    prepare_site((linear,))
    found = linear(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)
