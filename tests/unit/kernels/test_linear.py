"""Which way a linear is computed, and that all ways compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.kernels import Inputs, PackedWeight, choose_path, crossovers, dispatch
from mxrot.kernels.crossovers import Crossovers
from mxrot.kernels.cuda import middle
from mxrot.kernels.linear import PATHS, by_fp8
from mxrot.layers import InputTransform, QuantLinear, prepare, prepare_linears, prepare_site
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.site_transform import SiteTransform
from mxrot.transforms.stages import BlockDiagonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())
GPU = torch.device("cuda")
WEIGHT = PackedWeight(torch.zeros(32, 16, dtype=torch.uint8), torch.zeros(32, 1, dtype=torch.uint8))
FITS = PackedWeight(WEIGHT.codes, WEIGHT.scales, torch.zeros(32, dtype=torch.int32))


def linear(groups: int = 3, width: int = 96, height: int = 40, bias: bool = False) -> QuantLinear:
    generator = torch.Generator().manual_seed(0)
    found = QuantLinear(width, height, QUANTIZER, QUANTIZER, torch.randn(height, generator=generator) if bias else None)
    found.set_weight(quantize(torch.randn(height, width, generator=generator), FORMAT))
    if groups:
        matrices = random_orthogonal(groups, 32, generator)
        found.own_transform("test", InputTransform.of(SiteTransform((BlockDiagonal(matrices),))))
    return found.to(DEVICE)


def random(rows: int, width: int = 96, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def inputs_of(module: QuantLinear, x: Tensor) -> Inputs:
    return Inputs(x, None if module.transform is None else module.transform.matrices(), FORMAT, FORMAT.rule())


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_matrix_units_compute_the_linear(groups: int) -> None:
    """A transformed value next to a rounding boundary may differ, and nothing else."""
    module, x = linear(groups), random(5)
    prepare_site((module,))
    found = PATHS["matrix units"](inputs_of(module, x), module.site_weight().packed())
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("keeps", [False, True])
def test_fp8_computes_the_linear(keeps: bool) -> None:
    module, x = linear(1, 512, 64), random(40, 512, torch.bfloat16)
    expected = module(x)
    prepare_site((module,), keeps)
    found = by_fp8(inputs_of(module, x), module.site_weight().packed())
    assert float((found.float() - expected.float()).norm() / expected.float().norm()) < 2.0**-7


def fake_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a device of a test")
    monkeypatch.setattr(crossovers, "MEASURED", {(9, 0): Crossovers(packed=64, kept=16)})
    monkeypatch.setattr(dispatch, "crossovers_of", crossovers.crossovers_of.__wrapped__)  # nothing of it is kept
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)


@pytest.mark.parametrize("rows", [0, 1, 64])
def test_few_rows_read_the_codes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    assert choose_path(rows, FITS, GPU).path == "matrix units"


def test_many_rows_go_through_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    assert choose_path(65, FITS, GPU).path == "fp8"


def test_outputs_that_fp8_products_do_not_take_stay_on_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    odd = PackedWeight(WEIGHT.codes[:24], WEIGHT.scales[:24], torch.zeros(24, dtype=torch.int32))
    assert choose_path(64, odd, GPU).path == "matrix units"
    choice = choose_path(65, odd, GPU)
    assert choice.path is None and "multiples of 16" in choice.reason


@pytest.mark.parametrize("rows", [1, 65])
def test_weights_that_do_not_fit_stay_on_the_plain_path(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    choice = choose_path(rows, WEIGHT, GPU)
    assert choice.path is None and "does not fit into E4M3" in choice.reason


def test_weights_that_are_kept_have_a_limit_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch)
    exponents = torch.zeros(32, dtype=torch.int32)
    kept = PackedWeight(WEIGHT.codes, WEIGHT.scales, exponents, lifted=torch.zeros(32, 32))
    assert choose_path(16, kept, GPU).path == "matrix units" and choose_path(17, kept, GPU).path == "fp8"


@pytest.mark.parametrize(("is_compiled", "first", "last"), [(True, 9, 256), (False, 17, 128)])
def test_middle_rows(is_compiled: bool, first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CUDA C++ from where it is faster than the product for few rows; in Triton, which is slower, for fewer."""
    fake_gpu(monkeypatch)
    measured = Crossovers(packed=8, kept=8, few=8, middle=256, middle_kept=64)
    monkeypatch.setattr(crossovers, "MEASURED", {(9, 0): measured, (8, 9): measured})
    monkeypatch.setattr(middle, "is_there", lambda device: is_compiled)
    wide = PackedWeight(torch.zeros(32, 64), torch.zeros(32, 4), torch.zeros(32))
    kept = replace(wide, lifted=torch.zeros(32, 128))
    for weight, end in ((wide, last), (kept, min(last, 64))):
        paths = {rows: choose_path(rows, weight, GPU).path for rows in (1, 8, first - 1, first, end, end + 1)}
        assert paths[first] == paths[end] == "middle rows"
        assert paths[1] == paths[8] == "matrix units" and "middle rows" not in (paths[first - 1], paths[end + 1])
    narrow = replace(wide, codes=torch.zeros(32, 48), scales=torch.zeros(32, 3))  # K is no multiple of 128
    assert choose_path(40, narrow, GPU).path == "fp8"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert choose_path(40, wide, GPU).path == "fp8"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    assert choose_path(40, wide, GPU).path == "fp8"


@pytest.mark.parametrize("groups", [0, 1, 4])
@pytest.mark.parametrize("path", ["middle rows", "fixed tiles"])
def test_middle_rows_compute_the_linear(groups: int, path: str) -> None:
    module, x = linear(groups, 128), random(19, 128)
    prepare_site((module,))
    found = PATHS[path](inputs_of(module, x), module.site_weight().packed())
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4)


def test_fp4_matrix_units_are_taken_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_gpu(monkeypatch, (12, 0))
    swizzled = PackedWeight(WEIGHT.codes, WEIGHT.scales, swizzled=torch.zeros(512, dtype=torch.uint8))
    assert choose_path(1, swizzled, GPU).path == choose_path(4096, swizzled, GPU).path == "block scales"
    assert choose_path(1, WEIGHT, GPU).path is None


def test_a_site_is_prepared_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = linear(1), random(5)
    expected = module(x)
    monkeypatch.setattr(prepare, "takes_block_scales", lambda device: True)
    prepare_site((module,))
    packed = module.site_weight().packed()
    assert packed.swizzled is not None and packed.row_exponents is None
    torch.testing.assert_close(PATHS["block scales"](inputs_of(module, x), packed), expected, rtol=1e-4, atol=1e-4)


def test_where_nothing_was_measured_the_plain_path_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_path(1, WEIGHT, torch.device("cpu")).reason == "cpu has no FP4 or FP8 products"
    fake_gpu(monkeypatch, (8, 0))
    choice = choose_path(1, WEIGHT, GPU)
    assert choice.path is None and choice.reason.startswith("nothing was measured for compute capability 8.0; ")
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    assert choose_path(1, WEIGHT, GPU).reason == "Triton is not installed"


def test_the_layer_takes_the_path_that_was_chosen_and_adds_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = linear(bias=True), random(3)
    expected = module(x)
    chosen: list[int] = []

    def choose(rows: int, weight: PackedWeight, device: torch.device) -> dispatch.Choice:
        chosen.append(rows)
        return dispatch.Choice("matrix units", "for a test")

    prepare_site((module,))
    monkeypatch.setattr(dispatch, "choose_path", choose)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert chosen == [3]
    module(x[None, :2])
    assert chosen == [3, 2]


def test_fast_sums_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def note(inputs: Inputs, weight: PackedWeight) -> None:
        asked.append(inputs.fast)

    monkeypatch.setattr("mxrot.layers.product.quantized_linear", note)
    model = torch.nn.ModuleList([linear()])
    for fast in (False, True):
        for module in model.modules():
            module.fast = fast
        prepare_linears(model)
        model[0](random(3))
        torch.compiler.reset()
        torch.compile(model[0], fullgraph=True, backend="eager")(random(3))
    assert asked == [False, False, True, True]


def test_other_formats_stay_on_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(dispatch, "choose_path", refuse)
    four, eight = (TensorQuantizer(get_format(name), get_format(name).rule()) for name in ("mxfp4", "mxfp8_e4m3"))
    for weights, activations in ((four, eight), (eight, four), (four, None)):
        assert QuantLinear(64, 8, weights, activations)(torch.randn(2, 64)).shape == (2, 8)


def test_prepared_weights_know_their_exponents_until_the_weight_changes() -> None:
    module = linear(0)
    assert module.row_exponents is None
    before = set(module.state_dict())
    prepare_site((module,))
    assert module.row_exponents is not None and module.lifted is None
    prepare_site((module,), keeps_lifted=True)
    packed = module.half().site_weight().packed()
    assert packed.lifted is not None and packed.lifted.dtype == torch.float8_e4m3fn and packed.row_exponents is not None
    assert packed.lifted_scales is not None and packed.lifted_scales.dtype == torch.float32
    assert torch.equal(packed.lifted_scales, torch.exp2(packed.row_exponents.float())[0])
    assert torch.equal(packed.lifted.float() * packed.lifted_scales, module.dequantized_weight())
    assert set(module.state_dict()) == before
    module.set_weight(quantize(torch.randn(40, 96), FORMAT))
    assert module.row_exponents is None and module.lifted is None


def test_rows_that_differ_by_much_have_an_exponent_each() -> None:
    module = linear(0)
    wide = torch.randn(40, 96)
    wide[3] *= 2.0**-40
    module.set_weight(quantize(wide.to(DEVICE), FORMAT))
    prepare_site((module,), keeps_lifted=True)
    packed = module.site_weight().packed()
    assert packed.lifted is not None and packed.row_exponents is not None and packed.lifted_scales is not None
    assert torch.equal(packed.lifted_scales, torch.exp2(packed.row_exponents.float()))
    assert torch.equal(packed.lifted.float() * packed.lifted_scales[:, None], module.dequantized_weight())


def test_a_weight_that_does_not_fit_has_none() -> None:
    module = linear(0)
    wide = torch.randn(40, 96)
    wide[3, :32] *= 2.0**-40
    module.set_weight(quantize(wide.to(DEVICE), FORMAT))
    prepare_site((module,), keeps_lifted=True)
    assert module.row_exponents is None and module.lifted is None
