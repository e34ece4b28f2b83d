"""A block in its tunable form is the quantized block, and comes back as one."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor, nn

from mxrot.formats import FORMATS, Element, Uniform
from mxrot.layers import QuantLinear
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.models.families.llama import LLAMA_SITES
from mxrot.quantizing.run import quantize
from mxrot.sections import Tuning
from mxrot.surgery import stored_tensors
from mxrot.tuning.tunable import TunableBlock, neighbour_distances, parameter_groups, settle

MARGIN = 0.01
RECIPES = {
    "block": recipe("mxrot"),
    "site": recipe("mxrot", transform__sharing="site"),
    "none": recipe("rtn"),
    "mxfp6": recipe("mxrot", weights__format="mxfp6_e2m3", activations__format="mxfp6_e2m3"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def quantized_block(source: Path, name: str) -> nn.Module:
    chosen = RECIPES[name]
    windows = None if chosen.is_data_free else random_windows(6, 24)
    result = quantize(source, chosen, windows=windows)
    assert result.model is not None
    return result.model.get_submodule(LLAMA.blocks + ".0")


def linear_of(module: nn.Module, name: str) -> QuantLinear:
    linear = module.get_submodule(name)
    assert isinstance(linear, QuantLinear)
    return linear


@pytest.mark.parametrize("name", RECIPES)
def test_it_computes_the_same_and_comes_back_as_it_was(source: Path, name: str) -> None:
    block = quantized_block(source, name)
    before = {key: value.clone() for key, value in stored_tensors(block, torch.float16).items()}
    inputs = {
        linear: torch.randn(3, 5, linear_of(block, linear).in_features, generator=torch.Generator().manual_seed(1))
        for site in LLAMA_SITES
        for linear in site.linears
    }
    expected = {linear: linear_of(block, linear)(x) for linear, x in inputs.items()}
    values = {linear: values_of(linear_of(block, linear)) for linear in inputs}
    tunable = TunableBlock.of(block, LLAMA_SITES, MARGIN)
    for linear, x in inputs.items():
        found = block.get_submodule(linear)(x)
        assert torch.equal(found, expected[linear]), linear
    settle([tunable])
    tunable.finish()
    after = stored_tensors(block, torch.float16)
    assert before.keys() == after.keys()
    # Codes may turn from -0 to 0.
    assert all(torch.equal(before[key], after[key]) for key in before if not key.endswith("weight_packed"))
    assert all(torch.equal(values_of(linear_of(block, linear)), values[linear]) for linear in values)


def values_of(linear: QuantLinear) -> Tensor:
    return linear.dequantized_weight()


def test_an_offset_beyond_a_half_is_one_code_and_never_two(source: Path) -> None:
    for offset, steps in ((0.49, 0), (0.51, 1), (-0.51, -1), (5.0, 1), (-5.0, -1)):
        block = quantized_block(source, "site")
        name = "mlp.down_proj"
        before = linear_of(block, name).qtensor()
        up, down = neighbour_distances(before.format.element, before.codes)
        scale = before.scales.values().repeat_interleave(32, dim=-1)
        tunable = TunableBlock.of(block, LLAMA_SITES, MARGIN)
        tunable.linears[name].offset.data.fill_(offset)
        settle([tunable])
        tunable.finish()
        expected = before.dequantize() + scale * (steps > 0) * up - scale * (steps < 0) * down
        assert torch.equal(values_of(linear_of(block, name)), expected)
        assert (expected != before.dequantize()).any() == (steps != 0)


@pytest.mark.parametrize("name", ["block", "site", "mxfp6"])
def test_weights_follow_a_transform_that_moves(source: Path, name: str) -> None:
    """x T R (W R^-T)^T = x T W^T: with weights that follow, a small R changes the output less than without."""
    block = quantized_block(source, name)
    linear = "mlp.gate_proj"
    x = torch.randn(64, linear_of(block, linear).in_features, generator=torch.Generator().manual_seed(2))
    expected = linear_of(block, linear)(x)
    errors = []
    for follows in (True, False):
        moved = deepcopy(block)
        tunable = TunableBlock.of(moved, LLAMA_SITES, MARGIN)
        site = tunable.inputs["gate_up"]
        generator = torch.Generator().manual_seed(3)
        site.correction.data += 0.15 * torch.randn(site.correction.shape, generator=generator) / 32**0.5
        if not follows:
            site.follow = lambda: None  # type: ignore[method-assign]
        tunable.finish()
        stored = linear_of(moved, linear).transform
        assert stored is not None and stored.weight.dtype == torch.bfloat16
        errors.append(float((linear_of(moved, linear)(x) - expected).norm() / expected.norm()))
    assert errors[0] < errors[1]


def test_gradients_reach_every_offset_and_correction(source: Path) -> None:
    block = quantized_block(source, "block")
    tunable = TunableBlock.of(block, LLAMA_SITES, MARGIN)
    total = torch.zeros(())
    for site in LLAMA_SITES:
        for linear in site.linears:
            module = tunable.linears[linear]
            module.offset.data.fill_(0.3)  # without anything to round, an exponent would have no gradient
            x = torch.randn(4, module.offset.shape[1], generator=torch.Generator().manual_seed(4))
            total = total + module(x).square().sum()
    total.backward()
    for parameter in (*tunable.offsets(), *tunable.corrections(), *tunable.exponents()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and (parameter.grad != 0).any()


def test_what_has_no_rate_is_left_as_it_is(source: Path) -> None:
    for transform, exponent in ((0.0, 0.0), (1e-3, 0.0), (0.0, 1e-3), (1e-3, 2e-3)):
        tunable = TunableBlock.of(quantized_block(source, "block"), LLAMA_SITES, MARGIN)
        rates = Tuning(offset_rate=0.01, transform_rate=transform, exponent_rate=exponent)
        groups = parameter_groups([tunable], rates)
        assert [group.rate for group in groups] == [0.01, *(rate for rate in (transform, exponent) if rate)]
        assert [len(group.parameters) for group in groups] == [7] + [4] * (transform > 0) + [7] * (exponent > 0)


def test_an_exponent_that_has_moved_is_in_the_result(source: Path) -> None:
    """Up by one where it is beyond a half; the weights are rounded on the coarser grid."""
    block = quantized_block(source, "block")
    name = "mlp.down_proj"
    before = deepcopy(linear_of(block, name)).qtensor()
    tunable = TunableBlock.of(block, LLAMA_SITES, MARGIN)
    exponent = tunable.linears[name].exponent
    exponent.data[::2] = 0.7
    exponent.data[1::2] = 0.3
    tunable.finish()
    after = linear_of(block, name).qtensor()
    moved = after.scales.stored.int() - before.scales.stored.int()
    assert (moved[::2] == 1).all() and (moved[1::2] == 0).all()
    assert torch.equal(after.dequantize()[1::2], before.dequantize()[1::2])
    coarse = after.scales.values().repeat_interleave(32, dim=-1)[::2]
    assert (after.dequantize()[::2] - before.dequantize()[::2]).abs().max() <= coarse.max() / 2


def test_the_input_of_a_site_is_quantized_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxrot.tuning import straight_through

    calls = []
    plain = straight_through.rotate_quantize
    monkeypatch.setattr(straight_through, "rotate_quantize", lambda *a: (calls.append(1), plain(*a))[1])
    tunable = TunableBlock.of(quantized_block(source, "block"), LLAMA_SITES, MARGIN)
    x = torch.randn(4, 64)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        tunable.linears[name](x)
    assert len(calls) == 1
    tunable.linears["self_attn.q_proj"](x + 1)
    settle([tunable])
    tunable.linears["self_attn.q_proj"](x)
    assert len(calls) == 3


ELEMENTS = {format.element.name: format.element for format in FORMATS.values() if isinstance(format.grid, Uniform)}


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)
def test_distances_to_neighbours(element: Element) -> None:
    """Exhaustive: from each finite value the next one, and none beyond the ends."""
    codes = torch.arange(len(element.values), dtype=torch.uint8)
    up, down = neighbour_distances(element, codes)
    finite = sorted({value for value in element.values if abs(value) <= element.max})
    for value, above, below in zip(element.values, up.tolist(), down.tolist(), strict=True):
        if not abs(value) <= element.max:
            continue
        index = finite.index(value)
        assert value + above == finite[min(index + 1, len(finite) - 1)]
        assert value - below == finite[max(index - 1, 0)]


@pytest.mark.parametrize("margin", [0.01, 0.1, 0.5])
def test_weights_start_at_what_rounding_took_away_but_for_a_margin(source: Path, margin: float) -> None:
    block = quantized_block(source, "block")
    name = "mlp.up_proj"
    linear = linear_of(block, name)
    before = linear.qtensor()
    lost = 0.2 * torch.randn(linear.weight_packed.shape[0], 64, generator=torch.Generator().manual_seed(5))
    up, down = (
        d * before.scales.values().repeat_interleave(32, -1)
        for d in neighbour_distances(before.format.element, before.codes)
    )
    linear.remainder = (lost * torch.where(lost > 0, up, down)).to(torch.bfloat16)
    offset = TunableBlock.of(block, LLAMA_SITES, margin).linears[name].offset.detach()
    assert offset.abs().max() <= 0.5 - margin
    has_neighbour = torch.where(lost > 0, up, down) > 0
    expected = torch.where(has_neighbour, lost, 0.0).clamp(margin - 0.5, 0.5 - margin)
    torch.testing.assert_close(offset, expected, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("reach", [1.0, 3.0, float("inf")])
def test_a_weight_moves_as_far_as_its_reach(source: Path, reach: float) -> None:
    """Where no transform moves: to what lies nearest to code + offset * distance, on the grid of its block."""
    block = quantized_block(source, "block")
    name = "mlp.up_proj"
    before = linear_of(block, name).qtensor()
    linear = TunableBlock.of(block, LLAMA_SITES, MARGIN, reach).linears[name]
    with torch.no_grad():
        linear.offset.copy_(5.2 * torch.randn(linear.offset.shape, generator=torch.Generator().manual_seed(3)))
        wanted = linear.offset.clamp(-reach, reach)
        linear.clamp()
    assert torch.equal(linear.offset, wanted)
    after = linear.finished().qtensor()
    element, scales = before.format.element, before.scales.values().repeat_interleave(32, -1)
    up, down = neighbour_distances(element, before.codes)
    led = before.dequantize() / scales + wanted * torch.where(wanted > 0, up, down)
    grid = torch.tensor(sorted({value for value in element.values if abs(value) <= element.max}))
    nearest = (led[..., None] - grid).abs().amin(dim=-1)
    found = (after.dequantize() / scales - led).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-5, atol=1e-5)
    farthest = (after.dequantize() - before.dequantize()).abs() / scales
    assert (farthest > 2).any() == (reach > 1)
