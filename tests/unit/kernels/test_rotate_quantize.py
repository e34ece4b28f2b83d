"""The fused activation quantizer against its plain twin."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mxrot.formats import FORMATS, RULES, Format, ScaleRule
from mxrot.formats.element import FloatElement
from mxrot.kernels import plain_rotate_quantize
from mxrot.kernels.dispatch import rotate_quantize as dispatched
from mxrot.layers import TensorQuantizer
from mxrot.transforms.base import random_orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COVERED = [
    pytest.param(format, format.rule(name), id=f"{format.name}-{name}")
    for format in FORMATS.values()
    for name in format.rules
    if isinstance(format.element, FloatElement) and RULES[name].raises_from is not None and format.block == 32
]
TYPES = [torch.float16, torch.bfloat16, torch.float32]

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def fused(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    from mxrot.kernels.rotate_quantize import rotate_quantize

    return rotate_quantize(x, matrices, format, rule)


def sample(dtype: torch.dtype, rows: int = 150, columns: int = 96, seed: int = 0) -> Tensor:
    """Heavy-tailed rows, with zeros, -0, ties, a huge and a tiny row."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator) * 2
    x = torch.randn(rows, columns, generator=generator) * spread.exp()
    x[0], x[1] = 0.0, -0.0
    x[2, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    x[3] *= 2.0**-14
    x[4] = 2.0**15 * torch.rand(columns, generator=generator)
    return x.to(dtype).to(DEVICE)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """NaN equals NaN, and nothing but NaN; -0 differs from 0."""
    equal = found.float().view(torch.int32) == expected.float().view(torch.int32)
    return bool((equal | (found.isnan() & expected.isnan())).all())


def test_the_kernel_covers_something() -> None:
    assert len(COVERED) >= 9


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_without_a_transform_every_bit_is_the_twins(format: Format, rule: ScaleRule, dtype: torch.dtype) -> None:
    x = sample(dtype)
    assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_a_permutation_moves_bits_exactly(format: Format, rule: ScaleRule, groups: int) -> None:
    """Products with a permutation matrix are exact in any order, so the contract is bitwise."""
    x = sample(torch.float32)
    permutations = torch.stack([torch.eye(32)[torch.randperm(32)] for _ in range(groups)]).to(DEVICE)
    assert same_bits(fused(x, permutations, format, rule), plain_rotate_quantize(x, permutations, format, rule))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_with_a_rotation_only_values_at_a_boundary_may_differ(groups: int, dtype: torch.dtype) -> None:
    """Float32 sums of 32 products differ by at most 32 * 2^-24 of the sum of magnitudes, whatever their order.

    Where that cannot carry the exact transformed value over a rounding boundary, in units of a step that is at
    least 2^-3 of the block maximum, both must agree; so at most the share of values that lie that close differ.
    """
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    matrices = random_orthogonal(groups, 32, torch.Generator().manual_seed(2)).float().to(DEVICE)
    found, expected = fused(x, matrices, format, rule).float(), plain_rotate_quantize(x, matrices, format, rule)
    differing = (found != expected).sum().item()
    # |x|_1 |T|_max <= 32 * 4.5 here; 32 * 2^-24 * 144 on either side of a boundary, steps of at least 1/16.
    share = 2 * 32 * 2.0**-24 * 144 * 16
    assert differing <= max(4, share * found.numel())


def test_nan_and_inf_make_their_block_nan_and_no_other() -> None:
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = sample(torch.float32)
    x[5, 3], x[6, 40], x[7, 64] = float("nan"), float("inf"), -float("inf")
    found = fused(x, None, format, rule)
    expected = torch.zeros(found.shape, dtype=torch.bool, device=found.device)
    expected[5, :32], expected[6, 32:64], expected[7, 64:] = True, True, True
    assert torch.equal(found.isnan(), expected)


@pytest.mark.parametrize("rows", [0, 1, 127, 129])
def test_any_number_of_rows_and_any_leading_shape(rows: int) -> None:
    format, rule = FORMATS["mxfp4"], RULES["floor"]
    x = sample(torch.bfloat16, rows=200)[:rows]
    assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))
    assert fused(x[None], None, format, rule).shape == (1, rows, 96)


def test_rows_that_do_not_lie_together() -> None:
    format, rule = FORMATS["mxfp4"], RULES["rceil"]
    wide = sample(torch.float16, columns=128)
    for x in (wide[::3, 32:96], wide.t()[:96, :32]):
        assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))


def test_dispatch_takes_the_plain_path_on_a_cpu() -> None:
    x = sample(torch.float32).cpu()
    for format, rule in ((FORMATS["mxfp4"], RULES["even"]), (FORMATS["nvfp4"], RULES["absmax"])):
        found = dispatched(x, None, format, rule)
        assert found.dtype == torch.float32
        assert same_bits(found, plain_rotate_quantize(x, None, format, rule))


def test_every_covered_value_is_a_bfloat16_number() -> None:
    for parameter in COVERED:
        format, rule = parameter.values
        assert isinstance(format, Format) and isinstance(rule, ScaleRule)
        assert TensorQuantizer(format, rule).is_exact_in_bfloat16
        plain = plain_rotate_quantize(sample(torch.float32), None, format, rule)
        assert torch.equal(plain, plain.to(torch.bfloat16).float())
