"""Scales under a clip, against blocks whose extremes are cut off before the rule sees them."""

import copy

import pytest
import torch
from tests.oracles.exact_blocks import ELEMENTS, EXPONENTS, e8m0_byte
from tests.oracles.sample_blocks import bits, sample

from mxrot.errors import ConfigError
from mxrot.formats import (
    FORMATS,
    RULES,
    Format,
    ScaleRule,
    TensorQuantizer,
    Uniform,
    as_blocks,
    choose_parts,
    fake_quantize,
    quantize,
)
from mxrot.formats.element import FloatElement

CLIPS = (0.5, 0.8, 0.9, 0.95)
CASES = [(format, RULES[rule]) for format in FORMATS.values() for rule in format.rules]
OF_EXTREMES = [(format, rule) for format, rule in CASES if rule.sees_extremes_only]
clips = pytest.mark.parametrize("clip", CLIPS)


def each(cases: list[tuple[Format, ScaleRule]]) -> pytest.MarkDecorator:
    ids = [f"{format.name}-{rule.name}" for format, rule in cases]
    return pytest.mark.parametrize(("format", "rule"), cases, ids=ids)


def values(format: Format, name: str = "student_t") -> torch.Tensor:
    element = format.element if isinstance(format.grid, Uniform) else FORMATS["mxfp4"].element
    return sample(name, element, format.block or 64).double()


@clips
@each(OF_EXTREMES)
def test_the_parts_are_those_of_a_smaller_block(format: Format, rule: ScaleRule, clip: float) -> None:
    """A product with a positive number keeps the order, so that of all elements has the extremes times the clip."""
    blocks = as_blocks(values(format), format, "x")
    found, expected = (
        choose_parts(x, format, chosen) for x, chosen in ((blocks, rule.clipped(clip)), (blocks * clip, rule))
    )
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor.float(), expected.tensors[name].float())


@clips
@pytest.mark.parametrize("rule", EXPONENTS)
def test_exponents_are_those_of_the_exact_maximum(rule: str, clip: float) -> None:
    """In fractions, one block after the other; the clip is the float64 that it is."""
    from fractions import Fraction

    format = FORMATS["mxfp4"]
    blocks = as_blocks(sample("student_t", format.element, 32), format, "x").double()
    found = choose_parts(blocks, format, format.rule(rule).clipped(clip)).tensors["scale"]
    for block, byte in zip(blocks.flatten(0, -2), found.flatten(), strict=True):
        largest = max(abs(Fraction(x)) for x in block.tolist()) * Fraction(clip)
        assert int(byte) == e8m0_byte(EXPONENTS[rule]([largest], ELEMENTS["e2m1"]))


@each([case for case in CASES if isinstance(case[0].grid, Uniform) and case[0].scale.name == "fp16"])
def test_what_is_beyond_saturates_and_the_rest_gets_finer_steps(format: Format, rule: ScaleRule) -> None:
    x = values(format, "normal").float()
    plain, clipped = (fake_quantize(x, format, chosen) for chosen in (rule, rule.clipped(0.8)))
    blocks, found = (y.unflatten(-1, (-1, format.block_in(y.shape[-1]))) for y in (x, clipped))
    high = blocks.amax(dim=-1, keepdim=True).clamp(min=0)
    low = blocks.amin(dim=-1, keepdim=True).clamp(max=0)
    if format.element.is_signed:
        high = torch.maximum(high, -low)
        low = -high
    step = 0.8 * (high - low) / (format.element.max * (1 + format.element.is_signed))
    if format.element.name == "int8":
        step = step / 64  # its steps are 1/64
    slack = step * 0.51  # half a step of rounding, or by which a zero point moves the range; an FP16 scale beside it
    assert (found <= 0.8 * high + slack).all() and (found >= 0.8 * low - slack).all()
    inside = (blocks <= 0.8 * high - slack) & (blocks >= 0.8 * low + slack)
    assert ((found - blocks).abs() <= slack)[inside].all()
    assert inside.float().mean() > (0.8 if format.bits > 2 else 0.6)  # of three steps one is slack
    assert not torch.equal(plain, clipped)


@each(CASES)
def test_one_is_no_clip(format: Format, rule: ScaleRule) -> None:
    assert rule.clipped(1.0) is rule
    assert not rule.is_clipped and rule.clipped(0.9).is_clipped


@each(CASES)
def test_a_clipped_quantizer_is_named_and_copied(format: Format, rule: ScaleRule) -> None:
    quantizer = TensorQuantizer(format, rule.clipped(0.9))
    assert quantizer.spelled == f"{format.name} {rule.name} clip 0.9"
    x = values(format)
    for other in (TensorQuantizer.named(quantizer.spelled), copy.deepcopy(quantizer)):
        assert other.rule.clip == 0.9 and other.rule.name == rule.name
        assert torch.equal(bits(other(x)), bits(quantizer(x)))
    assert quantizer.rule.for_rows().clip == 0.9


@each([case for case in CASES if isinstance(case[0].grid, Uniform) and isinstance(case[0].element, FloatElement)])
def test_kernels_that_read_exponent_bits_are_not_for_clipped_rules(format: Format, rule: ScaleRule) -> None:
    """`dispatch` asks for `raises_from`."""
    from mxrot.kernels import plain_rotate_quantize, rotate_quantize

    clipped = rule.clipped(0.7)
    assert clipped.raises_from is None
    x = values(format).float()
    assert torch.equal(
        bits(rotate_quantize(x, None, format, clipped)), bits(plain_rotate_quantize(x, None, format, clipped))
    )


@each([case for case in CASES if isinstance(case[0].grid, Uniform)])
def test_codes_are_what_fake_quantizing_gives(format: Format, rule: ScaleRule) -> None:
    x, clipped = values(format).float().clamp(-1e3, 1e3), rule.clipped(0.8)
    assert torch.equal(bits(quantize(x, format, clipped).dequantize()), bits(fake_quantize(x, format, clipped)))


@pytest.mark.parametrize("clip", [0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_a_clip_that_is_none(clip: float) -> None:
    with pytest.raises(ConfigError, match=r"^clip .* is not above 0 and at most 1$"):
        RULES["even"].clipped(clip)
