import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tests.oracles.sample_blocks import bits
from torch import Tensor

from mxrot.formats import FORMATS, Format, TensorQuantizer, Uniform, fake_quantize, get_format, quantize
from mxrot.layers import InputTransform, QuantLinear
from mxrot.transforms import BlockDiagonal, SiteTransform
from mxrot.transforms.base import random_orthogonal

K, N = 128, 24
SHAPES = [(K,), (5, K), (2, 3, K), (0, K), (2, 0, K), (1, 1, 1, K)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(name: str, rule: str | None = None) -> TensorQuantizer:
    return TensorQuantizer(get_format(name), get_format(name).rule(rule))


def transform_of(count: int) -> InputTransform:
    matrices = random_orthogonal(count, 32, torch.Generator().manual_seed(3))
    return InputTransform.of(SiteTransform((BlockDiagonal(matrices),)))


def linear_of(
    weights: str = "mxfp4", inputs: str | None = "mxfp4", count: int = 0, bias: Tensor | None = None
) -> QuantLinear:
    """A quantized linear of random weights, with a transform of `count` matrices."""
    weight_quantizer = quantizer(weights)
    linear = QuantLinear(K, N, weight_quantizer, None if inputs is None else quantizer(inputs), bias)
    linear.set_weight(quantize(random(N, K, seed=1), weight_quantizer.format, weight_quantizer.rule))
    if count:
        linear.own_transform("layer0_down", transform_of(count))
    return linear


configurations = pytest.mark.parametrize(
    ("weights", "inputs", "count"),
    [
        ("mxfp4", "mxfp4", 0),
        ("mxfp4", "mxfp4", 1),
        ("mxfp4", "mxfp4", 4),
        ("mxfp4", None, 4),
        ("mxfp6_e2m3", "mxfp8_e4m3", 1),
        ("nvfp4", "nvfp4", 1),
        ("int4_g32_asym", "mxint8", 4),
    ],
)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@configurations
def test_forward_on_a_cpu_is_its_definition_bit_for_bit(
    weights: str, inputs: str | None, count: int, shape: tuple[int, ...]
) -> None:
    """F.linear(Q(x T), W_q), all in float32."""
    bias = random(N, seed=2)
    linear, x = linear_of(weights, inputs, count, bias), random(*shape)
    transformed = x if linear.transform is None else linear.transform(x)
    quantized = transformed if inputs is None else fake_quantize(transformed, get_format(inputs))
    W_q = quantize(random(N, K, seed=1), get_format(weights)).dequantize()
    got = linear(x)
    assert got.shape == (*shape[:-1], N)
    assert torch.equal(bits(got), bits(F.linear(quantized, W_q) + bias))


def test_a_large_weight_is_written_out_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, x = linear_of(count=1), random(2, 5, K)
    expected = linear(x)
    written: list[int] = []
    own = F.linear
    monkeypatch.setattr("mxrot.kernels.chunked.WEIGHT_CHUNK", 10 * K + 5)
    monkeypatch.setattr(F, "linear", lambda *a: (written.append(len(a[1])), own(*a))[1])
    torch.testing.assert_close(linear(x), expected, rtol=1e-6, atol=1e-6)
    assert written == [10, 10, 4]


@configurations
def test_forward_is_within_float32_of_the_exact_product(weights: str, inputs: str | None, count: int) -> None:
    """K products and sums and one addition of the bias, each rounded to half a unit: (K + 1) 2^-24 of the sizes."""
    bias = random(N, seed=2)
    linear, x = linear_of(weights, inputs, count, bias), random(7, K)
    Q, W = linear.quantized_input(x).double(), linear.dequantized_weight().double()
    error = (linear(x).double() - (Q @ W.T + bias.double())).abs()
    assert (error <= (K + 1) * 2.0**-24 * 1.01 * (Q.abs() @ W.abs().T + bias.abs())).all()


@pytest.mark.parametrize("count", [1, 4])
def test_the_input_transform_is_what_the_weights_were_folded_against(count: int) -> None:
    """x T with the T of a checkpoint: B products in float32."""
    matrices = random_orthogonal(count, 32, torch.Generator().manual_seed(3))
    exact = BlockDiagonal(matrices).as_applied()
    x = random(5, K)
    got, expected = transform_of(count)(x), exact.apply(x.double())
    bound = 33 * 2.0**-24 * BlockDiagonal(exact.matrices.abs()).apply(x.double().abs())
    assert got.dtype == torch.float32 and ((got.double() - expected).abs() <= bound).all()


def test_without_quantizing_a_fold_cancels() -> None:
    """Weights in 8 bits, inputs as they are: y = x W^T to the error of the weights."""
    weight, transform = random(N, K, seed=1), transform_of(4)
    folded = BlockDiagonal.from_stored(transform.weight).fold(weight)
    format = get_format("mxint8")
    linear = QuantLinear(K, N, TensorQuantizer(format, format.rule()), None)
    linear.set_weight(quantize(folded, format))
    linear.own_transform("layer0_down", transform)
    x = random(9, K)
    expected = x @ weight.T
    assert (linear(x) - expected).norm() < 0.02 * expected.norm()
    linear.share_transform(transform_of(1))
    assert (linear(x) - expected).norm() > 0.5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_result_has_the_type_of_the_input(dtype: torch.dtype) -> None:
    """Computed in float32 and rounded once at the end."""
    linear, x = linear_of(count=1, bias=random(N, seed=2)), random(6, K).to(dtype)
    assert torch.equal(linear(x), linear(x.float()).to(dtype))
    assert linear(x).dtype == dtype


def test_a_bias_of_the_checkpoints_type_is_added_in_float32() -> None:
    bias = random(N, seed=2).half()
    with_bias, without = linear_of(bias=bias), linear_of()
    x = random(6, K)
    assert torch.equal(with_bias(x), without(x) + bias.float())
    assert with_bias.state_dict()["bias"].dtype == torch.float16 and "bias" not in without.state_dict()


# Storage


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_storage_is_the_bits_of_the_format(format: Format) -> None:
    """Codes and scales; a zero point takes a whole byte here, and NVFP4 has a float32 a tensor besides."""
    linear = linear_of(format.name, None)
    stored_bytes = sum(value.numel() * value.element_size() for value in linear.state_dict().values() if value.dim())
    spared_bits = 0 if "zero_point" not in linear.weights.part_names else 8 - format.element.bits
    assert stored_bytes * 8 / (N * K) == format.bits_in(K) / K + spared_bits / format.block_in(K)
    if format.name == "mxfp4":
        assert stored_bytes * 8 == 4.25 * N * K


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_is_set_comes_back(format: Format) -> None:
    for rule in map(format.rule, format.rules):
        weight = quantize(random(N, K, seed=1), format, rule)
        linear = QuantLinear(K, N, TensorQuantizer(format, rule), None)
        shapes = {name: (value.shape, value.dtype) for name, value in linear.state_dict().items()}
        linear.set_weight(weight)
        assert torch.equal(linear.qtensor().codes, weight.codes)
        assert torch.equal(bits(linear.dequantized_weight()), bits(weight.dequantize()))
        state = linear.state_dict()
        assert shapes.items() <= {name: (value.shape, value.dtype) for name, value in state.items()}.items()
        assert not any(parameter.requires_grad for parameter in linear.parameters())


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_file_gives_the_weight_back_bit_for_bit(format: Format, tmp_path: Path) -> None:
    """Of every format and rule: a checkpoint holds all of it, and an empty linear has a place for all."""
    for rule in map(format.rule, format.rules):
        stored, empty = (QuantLinear(K, N, TensorQuantizer(format, rule), None) for _ in range(2))
        stored.set_weight(quantize(random(N, K, seed=1), format, rule))
        save_file(stored.state_dict(), tmp_path / "linear.safetensors")
        empty.load_state_dict(load_file(tmp_path / "linear.safetensors"))
        assert [*empty.state_dict()] == [*TensorQuantizer(format, rule).stored_parts(N, K)]
        assert torch.equal(empty.qtensor().codes, stored.qtensor().codes)
        assert torch.equal(bits(empty.dequantized_weight()), bits(stored.dequantized_weight()))


def test_a_weight_of_another_rule_is_refused() -> None:
    """Its scale of the whole tensor would be lost."""
    format, linear = get_format("mxfp4"), linear_of()
    before = linear.dequantized_weight()
    for weight in (quantize(random(N, K), format, format.rule("x3")), quantize(random(N, K), get_format("mxint8"))):
        with pytest.raises(ValueError, match=r"^expected mxfp4 even with \('scale',\), got \('scale'"):
            linear.set_weight(weight)
    assert torch.equal(linear.dequantized_weight(), before)


@pytest.mark.parametrize("weights", ["mxfp4", "nvfp4", "int4_g32_asym"])
def test_values_and_gradients_are_the_same_when_compiled(weights: str) -> None:
    """One operation takes any number of parts: one, two with a scalar, and zero points."""
    linear = linear_of(weights, "mxfp4", 4, random(N, seed=2))
    torch.compiler.reset()
    found = []
    for called in (linear, torch.compile(linear, backend="aot_eager", fullgraph=True)):
        x = random(5, K, seed=4).requires_grad_()
        y = called(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    upstream = 2 * found[0][0].double()
    transform = linear.transform
    assert transform is not None
    T = torch.block_diag(*transform.matrices().double())
    expected = upstream @ linear.dequantized_weight().double() @ T.T
    torch.testing.assert_close(found[0][1].double(), expected, rtol=1e-4, atol=1e-3)


# One transform for several linears


def test_a_shared_transform_is_registered_once() -> None:
    owner, other = linear_of(count=4), linear_of()
    assert owner.transform is not None
    other.share_transform(owner.transform)
    assert [name for name, _ in owner.named_parameters()][-1] == "layer0_down_input.weight"
    assert not any("input" in name for name in other.state_dict()) and not list(other.children())
    x = random(3, K)
    assert torch.equal(owner(x), other(x))


def test_a_copy_of_a_site_shares_its_own_transform() -> None:
    owner, other = linear_of(count=4), linear_of()
    assert owner.transform is not None
    other.share_transform(owner.transform)
    copied = copy.deepcopy(torch.nn.ModuleList([owner, other]))
    first, second = copied
    assert isinstance(first, QuantLinear) and isinstance(second, QuantLinear)
    assert first.transform is second.transform is not owner.transform


# Where bfloat16 holds every number


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_what_is_said_to_be_exact_in_bfloat16_is(format: Format) -> None:
    x = random(64, 2 * K, seed=5) * torch.logspace(-20, 20, 64)[:, None]
    for rule in map(format.rule, format.rules):
        if isinstance(format.grid, Uniform) and rule.is_power_of_two and format.scale.dtype == torch.uint8:
            assert TensorQuantizer(format, rule).is_exact_in_bfloat16
        if TensorQuantizer(format, rule).is_exact_in_bfloat16:
            values = fake_quantize(x, format, rule)
            values = values[values.isfinite()]  # a scale that is no power of two may overflow its type
            assert len(values) > x.numel() // 2 and torch.equal(values.bfloat16().float(), values)
    no_powers = {"x3", "log256", "absmax"} if isinstance(format.grid, Uniform) else set()
    for name in no_powers & set(format.rules):
        assert not TensorQuantizer(format, format.rule(name)).is_exact_in_bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@configurations
def test_a_gpu_computes_the_same(weights: str, inputs: str | None, count: int, shape: tuple[int, ...]) -> None:
    """On bfloat16 matrix hardware where that is exact: the product differs by the order of its sums alone.

    Compared on inputs quantized there, because the sums of the transform differ too.
    """
    linear, x = linear_of(weights, inputs, count, random(N, seed=2)).cuda(), random(*shape).cuda()
    Q, W = linear.quantized_input(x).double(), linear.dequantized_weight().double()
    assert linear.bias is not None
    sizes = Q.abs() @ W.abs().T + linear.bias.abs()
    got = linear(x)
    assert got.shape == (*shape[:-1], N) and got.dtype == torch.float32
    # Tensor cores may cut a sum of exact products to 2^-23 instead of rounding it.
    assert ((got.double() - (Q @ W.T + linear.bias.double())).abs() <= (K + 1) * 2.0**-23 * sizes).all()
