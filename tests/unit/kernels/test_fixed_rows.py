"""Where it is asked for, a row has the same bits at any batch and place: in Triton's interpreter and in plain torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from tests.unit.kernels.test_linear import FITS, GPU, fake_gpu, inputs_of, linear
from torch import Tensor

from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.kernels import Inputs, dispatch, fixed_rows
from mxrot.kernels.choices import kernel_choices
from mxrot.kernels.fixed_rows import has_invariant_rows, in_fixed_rows, invariant_rows, set_invariant_rows
from mxrot.kernels.linear import by_block_scales, by_fixed_tiles
from mxrot.kernels.plain import plain_rotate_quantize_packed, swizzle_scales
from mxrot.layers import InputTransform, QuantLinear, prepare_site
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.site_transform import SiteTransform
from mxrot.transforms.stages import BlockDiagonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")
BATCHES = (1, 7, 33, 128)

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@pytest.fixture
def invariant() -> Iterator[None]:
    with invariant_rows():
        yield


def rows_of(width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # So uneven that float32 sums of few-bit products are rounded, and an order of sums can be seen.
    sizes = torch.exp2(torch.randint(-12, 10, (128, width // 32), generator=generator).float())
    x = torch.randn(128, width, generator=generator) * sizes.repeat_interleave(32, dim=1)
    return x.to(DEVICE, dtype)


def assert_rows_stand_alone(compute: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Each row of 128 is the same in batches of every size, at their beginning and their end."""
    whole = compute(x)
    assert len(whole) == 128 and whole.float().isfinite().all() and whole.float().abs().sum() > 0
    for count in BATCHES:
        for start in {(128 - count) // 3, 128 - count}:
            found = compute(x[start : start + count])
            assert torch.equal(found, whole[start : start + count]), (count, start)


@pytest.mark.parametrize(("groups", "width"), [(0, 608), (1, 608), (7, 224)])
def test_the_product_by_fixed_tiles(groups: int, width: int) -> None:
    """Quantizer and packed product of 19 and 7 blocks, which no step divides."""
    module = linear(groups, width, 16)
    prepare_site((module,))
    weight = module.site_weight().packed()

    def compute(x: Tensor) -> Tensor:
        return by_fixed_tiles(inputs_of(module, x), weight)

    x = rows_of(width)
    assert_rows_stand_alone(compute, x)
    # As far off as sums of 608 float32 numbers in another order, and values at a rounding boundary of MXFP4.
    torch.testing.assert_close(compute(x), module(x), rtol=1e-4, atol=1e-3 * float(module(x).abs().max()))


def test_tiles_that_depend_on_the_rows_give_other_bits() -> None:
    """Or the test above could not fail."""
    module = linear(1, 608, 16)
    prepare_site((module,))
    weight, x = module.site_weight().packed(), rows_of(608)
    few, many = (dispatch.PATHS["matrix units"](inputs_of(module, x[:count]), weight) for count in (1, 128))
    assert not torch.equal(few, many[:1])


def test_fixed_tiles_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """More outputs than a launch has places for."""
    from mxrot.kernels.fused import skinny

    module, x = linear(0), rows_of(96)
    prepare_site((module,))
    weight = module.site_weight().packed()
    whole = by_fixed_tiles(inputs_of(module, x), weight)
    monkeypatch.setattr(skinny, "MOST_OUTPUTS", 50 * len(weight.codes))
    assert torch.equal(by_fixed_tiles(inputs_of(module, x), weight), whole)


@pytest.mark.usefixtures("invariant")
def test_block_scales_stand_alone() -> None:
    w = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    packed = plain_rotate_quantize_packed(w, None, FORMAT, FORMAT.rule())
    weight = dispatch.PackedWeight(packed.codes.to(DEVICE), packed.scales.to(DEVICE))
    weight = dispatch.replace(weight, swizzled=swizzle_scales(weight.scales))
    matrices = random_orthogonal(3, 32, torch.Generator().manual_seed(2)).to(DEVICE, torch.bfloat16)
    assert_rows_stand_alone(
        lambda x: by_block_scales(Inputs(x, matrices, FORMAT, FORMAT.rule()), weight), rows_of(96, torch.bfloat16)
    )


def plain_linear(weights: str, activations: str | None, block: int) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    quantizers = [None if name is None else get_format(name) for name in (weights, activations)]
    first, second = (None if one is None else TensorQuantizer(one, one.rule()) for one in quantizers)
    assert first is not None
    second = second and TensorQuantizer(second.format, second.rule.for_rows())  # as a recipe's inputs
    found = QuantLinear(192, 40, first, second)
    found.set_weight(quantize(torch.randn(40, 192, generator=generator), first.format, first.rule))
    if block:
        matrices = random_orthogonal(192 // block, block, generator)
        found.own_transform("test", InputTransform.of(SiteTransform((BlockDiagonal(matrices),))))
    return found.to(DEVICE)


@pytest.mark.usefixtures("invariant")
@pytest.mark.parametrize(
    ("weights", "activations", "block", "dtype"),
    [
        ("mxfp4", "mxfp4", 0, torch.float32),
        ("mxfp4", "mxfp4", 16, torch.float32),
        ("mxfp4", "mxfp4", 32, torch.bfloat16),
        ("mxfp4", None, 32, torch.float32),
        ("mxfp8_e4m3", "mxfp8_e4m3", 32, torch.float32),
        ("nvfp4", "nvfp4", 16, torch.float32),
        ("int8_row", "int8_row", 32, torch.float32),
    ],
)
def test_plain_linears(weights: str, activations: str | None, block: int, dtype: torch.dtype) -> None:
    module = plain_linear(weights, activations, block)
    prepare_site((module,))
    assert_rows_stand_alone(module, rows_of(192, dtype))


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_a_plain_linear_is_the_same_up_to_the_order_of_sums(groups: int) -> None:
    module, x = linear(groups), rows_of(96)
    before = module(x)
    with invariant_rows():
        found = module(x.view(2, 64, 96))
        assert module(x[:0]).shape == (0, 40)
    assert found.shape == (2, 64, 40)
    torch.testing.assert_close(found.view(128, 40), before, rtol=1e-4, atol=1e-3)


def test_every_number_of_rows_takes_one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    with invariant_rows():
        ways = {dispatch.choose_path(rows, FITS, GPU).path for rows in range(1, 300)}
        assert ways == {"fixed tiles"}
        assert dispatch.choose_path(1, dispatch.PackedWeight(FITS.codes, FITS.scales), GPU).path is None
    assert dispatch.choose_path(300, FITS, GPU).path == "fp8"


def test_a_run_record_says_so() -> None:
    before = kernel_choices("cpu")
    with invariant_rows():
        assert kernel_choices("cpu") == before | {"invariant_rows": True}
    assert "invariant_rows" not in before


def test_it_is_off_unless_asked_for() -> None:
    seen: list[tuple[int, ...]] = []

    def compute(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return x + 1

    x = torch.randn(3, 5, 32)
    assert not has_invariant_rows() and torch.equal(in_fixed_rows(compute, x), x + 1)
    with invariant_rows():
        assert has_invariant_rows()
        with invariant_rows(False):
            assert not has_invariant_rows()
        assert torch.equal(in_fixed_rows(compute, x), x + 1)
    assert seen == [(3, 5, 32)] + [(fixed_rows.ROWS["cpu"], 32)] * 15
    set_invariant_rows(False)


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_the_variable_asks(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fixed_rows.VARIABLE, value)
    code = "import sys; from mxrot.kernels.fixed_rows import has_invariant_rows; sys.exit(3 * has_invariant_rows())"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 3 * (value == "1")
