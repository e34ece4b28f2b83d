"""Linears of a site that are computed together, and a model of them under torch.compile."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.formats import TensorQuantizer, get_format, quantize
from mxrot.kernels import dispatch
from mxrot.layers import InputTransform, QuantLinear, SiteProducts, prepare_linears, prepare_site, sites_of
from mxrot.quantizing import run as pipeline
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.site_transform import SiteTransform
from mxrot.transforms.stages import BlockDiagonal

FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())
ROWS = (40, 24, 8)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def site(bias: bool = False) -> list[QuantLinear]:
    transform = InputTransform.of(
        SiteTransform((BlockDiagonal(random_orthogonal(3, 32, torch.Generator().manual_seed(0))),))
    )
    linears = []
    for seed, rows in enumerate(ROWS):
        own = random(rows, seed=seed + 7) if bias and seed != 1 else None
        linear = QuantLinear(96, rows, QUANTIZER, QUANTIZER, own)
        linear.set_weight(quantize(random(rows, 96, seed=seed), FORMAT))
        linear.own_transform("test", transform) if seed == 0 else linear.share_transform(transform)
        linears.append(linear)
    products = SiteProducts(linears)
    for linear in linears:
        linear.site = products
    return linears


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the weight of every product, whatever computes it."""
    seen: list[int] = []
    own = dispatch.quantized_linear

    def count(inputs: dispatch.Inputs, weight: dispatch.PackedWeight) -> Tensor | None:
        seen.append(len(weight.codes))
        return own(inputs, weight)

    monkeypatch.setattr("mxrot.layers.product.quantized_linear", count)
    return seen


@pytest.mark.parametrize("bias", [False, True])
def test_a_prepared_site_is_one_product_with_the_same_results(calls: list[int], bias: bool) -> None:
    linears, x = site(bias), random(5, 96, seed=3)
    expected = [linear(x) for linear in linears]
    assert calls == [40, 24, 8]
    prepare_site(linears)
    calls.clear()
    found = [linear(x) for linear in linears]
    assert calls == [72]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_another_input_or_order_is_computed_alone(calls: list[int]) -> None:
    linears, x, y = site(), random(5, 96, seed=3), random(2, 96, seed=4)
    expected = [linear(y) for linear in linears]
    prepare_site(linears)
    calls.clear()
    linears[0](x)
    torch.testing.assert_close(linears[1](y), expected[1])
    torch.testing.assert_close(linears[2](y), expected[2])
    assert calls == [72, 24, 8]
    linears[0](y)
    torch.testing.assert_close(linears[2](y), expected[2])  # not its turn
    torch.testing.assert_close(linears[1](y), expected[1])
    torch.testing.assert_close(linears[2](y), expected[2])
    assert calls == [72, 24, 8, 72, 8]


def test_nothing_is_kept_once_all_parts_are_taken() -> None:
    linears, x = site(), random(5, 96, seed=3)
    prepare_site(linears)
    for linear in linears:
        linear(x)
    kept = weakref.ref(x)
    del x
    assert kept() is None


def test_the_weights_lie_in_one_tensor_and_are_no_part_of_a_checkpoint() -> None:
    linears = site()
    before = [set(linear.state_dict()) for linear in linears]
    values = [linear.dequantized_weight() for linear in linears]
    prepare_site(linears)
    whole = linears[0].whole_codes
    assert whole is not None and whole.shape == (72, 48)
    for linear, value in zip(linears, values, strict=True):
        assert linear.weight_packed.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
        assert torch.equal(linear.dequantized_weight(), value)
    assert [set(linear.state_dict()) for linear in linears] == before


def test_a_weight_that_changes_ends_the_preparation() -> None:
    x = random(5, 96, seed=3)
    for change in ("set", "load"):
        linears = site()
        prepare_site(linears, keeps_lifted=True)
        other = quantize(random(24, 96, seed=9), FORMAT)
        if change == "set":
            linears[1].set_weight(other)
        else:
            fresh = QuantLinear(96, 24, QUANTIZER, QUANTIZER)
            fresh.set_weight(other)
            linears[1].load_state_dict(fresh.state_dict())
        assert all(linear.whole_codes is None and linear.lifted is None for linear in linears)
        linears[0](x)
        exact = linears[1].quantized_input(x) @ other.dequantize().mT
        torch.testing.assert_close(linears[1](x), exact, rtol=1e-5, atol=1e-5)


def test_a_transform_that_changes_is_not_kept_prepared() -> None:
    x, linears, others = random(5, 96, seed=3), site(), site()
    prepare_site(linears)
    transform, other = linears[0].transform, others[0].transform
    assert transform is not None and transform.prepared is not None and other is not None
    other.weight.data = BlockDiagonal(random_orthogonal(3, 32, torch.Generator().manual_seed(5))).to_stored()
    transform.load_state_dict(other.state_dict())
    assert transform.prepared is None
    compiled = torch.compile(linears[0], fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), linears[0](x)) and not torch.equal(linears[0](x), site()[0](x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_matrices_are_prepared_row_by_row() -> None:
    linears = [linear.to("cuda") for linear in site()]
    transform = linears[0].transform
    assert transform is not None
    before = transform.matrices()
    prepare_site(linears)
    assert not before.is_contiguous() and transform.matrices().is_contiguous()
    assert transform.prepared is not None and transform.prepared.is_contiguous()
    assert torch.equal(transform.matrices(), before)


def test_a_prepared_site_may_be_copied_and_cast() -> None:
    linears, x = site(), random(5, 96, seed=3)
    prepare_site(linears, keeps_lifted=True)
    expected = [linear(x) for linear in linears]
    copied = copy.deepcopy(torch.nn.ModuleList(linears)).half()
    first = copied[0]
    assert isinstance(first, QuantLinear) and first.site is not linears[0].site
    assert first.site is not None and first.site.linears[0] is first
    for linear, value in zip(copied, expected, strict=True):
        torch.testing.assert_close(linear(x), value)
    prepared, before = (linear.site_weight().packed() for linear in (first, linears[0]))
    assert prepared.lifted_scales is not None and before.lifted_scales is not None
    assert torch.equal(prepared.lifted_scales, before.lifted_scales)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    found = pipeline.quantize(folder, recipe("mxrot", calibration__generated=0.0), windows=random_windows(8, 32)).model
    assert found is not None
    return found


def test_sites_of_a_model(model: PreTrainedModel) -> None:
    assert [len(linears) for linears in sites_of(model)] == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("prepared", [False, True])
def test_a_compiled_model_is_one_graph_and_computes_the_same(model: PreTrainedModel, prepared: bool) -> None:
    """Nothing in it waits for the device or breaks the graph: fullgraph raises if it would."""
    model, ids = copy.deepcopy(model), random_windows(2, 16)
    if prepared:
        prepare_linears(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(ids, use_cache=False).logits
    assert torch.equal(found, expected)


def test_generation_with_a_static_cache_is_the_same(model: PreTrainedModel) -> None:
    ids = random_windows(2, 6)
    plain, static = (
        model.generate(ids, max_new_tokens=6, do_sample=False, disable_compile=True, **options)
        for options in ({}, {"cache_implementation": "static"})
    )
    assert torch.equal(plain, static)
