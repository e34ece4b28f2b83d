"""What every format owes under each of its scale rules."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tests.oracles.sample_blocks import SAMPLES, bits, sample
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import (
    FORMATS,
    RULES,
    BlockScales,
    Element,
    Format,
    Parts,
    QTensor,
    ScaleRule,
    Uniform,
    as_blocks,
    choose_parts,
    encode_blocks,
    fake_quantize,
    pack_codes,
    quantize,
    round_blocks,
    unpack_codes,
)
from mxrot.formats.block_scales import E8M0
from mxrot.formats.element import E2M1, FloatElement
from mxrot.formats.shrinks import SHRINKS

ROW_BLOCK = 64
"""Blocks by which a format of whole rows is tested: what it owes a row, one of such blocks owes each of them."""
EVERY = [
    replace(format, block=format.longest_block or format.block or ROW_BLOCK, longest_block=None)
    if format.longest_block or not format.block
    else format
    for format in FORMATS.values()
]
ALL = [(format, RULES[rule]) for format in EVERY for rule in format.rules]
UNIFORM = [case for case in ALL if isinstance(case[0].grid, Uniform)]
POWER_OF_TWO = [(format, rule) for format, rule in UNIFORM if rule.is_power_of_two]


def each(cases: list[tuple[Format, ScaleRule]]) -> pytest.MarkDecorator:
    ids = [f"{format.name}-{rule.name}" for format, rule in cases]
    return pytest.mark.parametrize(("format", "rule"), cases, ids=ids)


formats = pytest.mark.parametrize("format", EVERY, ids=FORMATS)


def element_of(format: Format) -> Element:
    """That samples are made for: of the format, or of another one where its grid has none."""
    return format.element if isinstance(format.grid, Uniform) else E2M1


def same(one: Parts, other: Parts) -> bool:
    return one.tensors.keys() == other.tensors.keys() and all(
        torch.equal(tensor.float(), other.tensors[name].float()) for name, tensor in one.tensors.items()
    )


def _has_finite_scales(x: Tensor, format: Format, rule: ScaleRule) -> bool:
    """False where an FP16 scale overflows, which `quantize` refuses."""
    return format.grid.not_finite(choose_parts(as_blocks(x, format, "x"), format, rule)) is None


@pytest.mark.parametrize("name", SAMPLES)
@each(ALL)
def test_fake_quantize_is_quantize_then_dequantize(format: Format, rule: ScaleRule, name: str) -> None:
    x = sample(name, element_of(format), format.block)
    if _has_finite_scales(x, format, rule):
        expected = quantize(x, format, rule).dequantize()
        assert torch.equal(bits(fake_quantize(x, format, rule)), bits(expected))
    else:
        with pytest.raises(NumericsError, match=r"^w_proj: a block scale overflows"):
            quantize(x, format, rule, "w_proj")


@each(ALL)
def test_in_float64_too(format: Format, rule: ScaleRule) -> None:
    x = sample("student_t", element_of(format), format.block).double() / 3
    expected = quantize(x, format, rule).dequantize(torch.float64)
    assert expected.dtype == torch.float64
    assert torch.equal(bits(fake_quantize(x, format, rule)), bits(expected))


@each([case for case in UNIFORM if case[0].scale == E8M0])
def test_rounding_under_scales_of_another_tensor(format: Format, rule: ScaleRule) -> None:
    """A block may outgrow its scale, as when earlier columns are corrected: it saturates, also at byte 0."""
    x = sample("every_exponent", element_of(format), format.block)
    blocks = as_blocks(x, format, "x")
    scales = rule.choose(blocks.flip(0), format.element, format.scale)
    expected = encode_blocks(blocks, scales, format).dequantize()
    assert torch.equal(bits(round_blocks(blocks, scales, format).flatten(-2)), bits(expected))
    assert not expected.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["normal", "student_t", "subnormal", "negative_zeros", "one_outlier"])
@each(ALL)
def test_a_narrow_input_is_its_float32_upcast(format: Format, rule: ScaleRule, name: str, dtype: torch.dtype) -> None:
    x = sample(name, element_of(format), format.block, dtype)
    narrow, wide = quantize(x, format, rule), quantize(x.float(), format, rule)
    assert torch.equal(narrow.codes, wide.codes)
    assert same(narrow.parts, wide.parts)
    assert torch.equal(bits(fake_quantize(x, format, rule)), bits(wide.dequantize()))


@pytest.mark.parametrize("name", SAMPLES)
@each(POWER_OF_TWO)
def test_a_float32_number_given_as_float64_has_the_same_code(format: Format, rule: ScaleRule, name: str) -> None:
    x = sample(name, element_of(format), format.block)
    narrow, wide = quantize(x, format, rule), quantize(x.double(), format, rule)
    assert torch.equal(narrow.scales.stored, wide.scales.stored)
    assert torch.equal(narrow.codes, wide.codes)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@each(ALL)
def test_the_default_dtype_of_torch_changes_nothing(format: Format, rule: ScaleRule, default: torch.dtype) -> None:
    """Model loaders set it while they build layers."""
    x = sample("normal", element_of(format), format.block)
    expected = quantize(x, format, rule).dequantize()
    try:
        torch.set_default_dtype(default)
        got, faked = quantize(x, format, rule).dequantize(), fake_quantize(x, format, rule)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == faked.dtype == torch.float32
    assert torch.equal(bits(got), bits(expected)) and torch.equal(bits(faked), bits(expected))


# floor, even: rounding keeps the exponent of the block maximum, so the scale comes out again.
# rceil: the maximum may round down to max / 2; then the scale halves and every code doubles, which is exact.
# 7.25: as floor, but for maxima from 7.25 up, which become 4 under twice the scale; and 4 keeps it.
# mse: the old scale has error 0 and is among the three; a smaller one wins only with error 0 too.
# absmax with FP16 scales: 7 s / 7 is s, exactly, as long as s is a normal FP16 number.
# Left out: x3, whose largest value 6 * 2^e / 3 is the next power of two; log256, whose levels move with the
# smallest and largest maxima; nvfp4, whose tensor scale is rounded in float32 and rounded again from its own
# product; minmax, whose end codes 0 and 15 need not both be reached; the searches, which prefer other scales for
# values that lie on the grid of one that they would not store.
IDEMPOTENT = [*POWER_OF_TWO, *((format, rule) for format, rule in UNIFORM if format.scale.name == "fp16")]
IDEMPOTENT = [case for case in IDEMPOTENT if case[1].name not in ("minmax", "search", "x3-search")]


@pytest.mark.parametrize(
    "name", ["normal", "student_t", "log_normal", "ties", "zeros", "negative_zeros", "every_exponent"]
)
@each(IDEMPOTENT)
def test_quantizing_twice_changes_nothing(format: Format, rule: ScaleRule, name: str) -> None:
    x = sample(name, element_of(format), format.block)
    blocks = as_blocks(x, format, "x")
    scales = rule.choose(blocks, format.element, format.scale).values()
    if format.scale != E8M0:
        normal = (scales >= torch.finfo(torch.float16).smallest_normal) & scales.isfinite()
        x = blocks[normal]
        assert x.numel()
    once = fake_quantize(x, format, rule)
    # `even` lets 4 * 2^126 stand for amax >= 1.75 * 2^127: no float32 number any more.
    once = once[~once.isinf().any(dim=-1)]
    assert torch.equal(bits(fake_quantize(once, format, rule)), bits(once))


@pytest.mark.parametrize("shift", [-97, -13, -1, 1, 13, 97])
@each([case for case in UNIFORM if case[0].scale == E8M0 and case[1].name != "log256"])
def test_a_power_of_two_moves_the_scales_only(format: Format, rule: ScaleRule, shift: int) -> None:
    """log256 is left out: its logarithms are rounded."""
    x = sample("student_t", element_of(format), format.block)
    base, moved = quantize(x, format, rule), quantize(torch.ldexp(x, torch.tensor(shift)), format, rule)
    assert torch.equal(moved.codes, base.codes)
    assert torch.equal(moved.scales.stored.int(), base.scales.stored.int() + shift)


@pytest.mark.parametrize("shift", [-3, -1, 1, 3])
@each([case for case in UNIFORM if case[0].scale != E8M0])
def test_a_power_of_two_moves_rounded_scales_only(format: Format, rule: ScaleRule, shift: int) -> None:
    """FP16 scales stay normal numbers here; the scale of an NVFP4 tensor takes the whole factor."""
    x = sample("normal", element_of(format), format.block)
    base, moved = quantize(x, format, rule), quantize(torch.ldexp(x, torch.tensor(shift)), format, rule)
    assert torch.equal(moved.codes, base.codes)
    assert torch.equal(moved.scales.values(), torch.ldexp(base.scales.values(), torch.tensor(shift)))
    if format.name == "nvfp4":
        assert torch.equal(moved.scales.stored.float(), base.scales.stored.float())


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("near_largest", "every_exponent")])
@each([case for case in UNIFORM if case[1].name != "minmax"])
def test_negation(format: Format, rule: ScaleRule, name: str) -> None:
    """minmax is left out: its zero point rounds ties to even, and 15 - even is odd."""
    x = sample(name, element_of(format), format.block)
    if not _has_finite_scales(x, format, rule):
        x = x.clamp(-1e4, 1e4)
    there, back = quantize(x, format, rule), quantize(-x, format, rule)
    assert torch.equal(back.scales.values(), there.scales.values())
    if isinstance(format.element, FloatElement) and format.scale == E8M0:
        sign = 1 << (format.element.bits - 1)
        assert torch.equal(back.codes, there.codes ^ sign)
    assert torch.equal(back.dequantize(), -there.dequantize())


@pytest.mark.parametrize("name", ["normal", "student_t", "zeros", "negative_zeros"])
@each(ALL)
def test_each_element_takes_the_nearest_value_that_its_block_may_have(
    format: Format, rule: ScaleRule, name: str
) -> None:
    """Found by looking at what every code of the block stands for. In float64; 2^-50 for what is rounded there."""
    x = sample(name, element_of(format), format.block).double()
    quantized = quantize(x, format, rule)
    blocks = as_blocks(x, format, "x")
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    if isinstance(format.grid, Uniform):  # the most negative integer, Inf and NaN are read and never written
        codes = codes[torch.tensor([abs(value) <= format.element.max for value in format.element.values])]
    values = format.grid.decode(codes.expand(*blocks.shape[:-1], -1), quantized.parts, torch.float64)
    found = quantized.dequantize(torch.float64).unflatten(-1, blocks.shape[-2:])
    nearest = (blocks[..., None] - values[..., None, :]).abs().amin(dim=-1)
    slack = 2.0**-50 * (blocks.abs() + values.abs().amax(dim=-1, keepdim=True))
    assert ((found - blocks).abs() <= nearest + slack).all()


def _neighbours(y: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """The representable values on both sides of float64 `y`; the last one twice beyond the ends."""
    reach = format.element.max
    values = torch.tensor(sorted({v for v in format.element.values if abs(v) <= reach}), dtype=torch.float64)
    above = torch.searchsorted(values, y).clamp(max=len(values) - 1)
    below = torch.where(values[above] > y, above - 1, above).clamp(min=0)
    return values[below], values[above]


def _largest_scaled_magnitude(format: Format, rule: ScaleRule) -> float:
    """Bound of |x| / scale, from how the rule picks the scale."""
    element = format.element
    binade = 2.0**element.max_exponent
    return {
        "floor": 2 * binade,
        "even": (2 - 2.0 ** -(element.mantissa_bits + 1)) * binade,
        "rceil": element.max,
        "x3": 6.0,
        "search": 7.0 * SHRINKS,
        "x3-search": 6.0 * SHRINKS,
        "mse": 4 * binade,
        "7.25": 7.25,
    }[rule.name]


@pytest.mark.parametrize("name", ["normal", "student_t", "log_normal", "ties", "near_largest", "every_exponent"])
@each([case for case in UNIFORM if case[0].scale == E8M0 and case[1].name != "log256"])
def test_the_error_is_at_most_half_the_gap(format: Format, rule: ScaleRule, name: str) -> None:
    """In units of the scale: half the distance of the two values around x, and nothing but saturation beyond.

    A third is no float32 number: under x3 the quotient x / scale is rounded, by 2^-24 of itself at most.
    """
    x = sample(name, element_of(format), format.block)
    quantized = quantize(x, format, rule)
    scales = quantized.scales.values(torch.float64).repeat_interleave(format.block, dim=-1)
    y = x.double() / scales
    q = quantized.dequantize(torch.float64) / scales
    rounding = 0.0 if rule.is_power_of_two else 2.0**-24
    low, high = _neighbours(y, format)
    is_inside = y.abs() <= format.element.max
    slack = rounding * y.abs()
    assert ((q - y).abs() <= (high - low) / 2 + slack)[is_inside].all()
    assert (q.abs() == format.element.max)[~is_inside].all()
    has_room = scales < 2.0**127  # mxint8 needs 2^128 for the largest float32 numbers
    assert (y.abs() <= _largest_scaled_magnitude(format, rule) * (1 + rounding))[has_room].all()


@pytest.mark.parametrize("name", ["normal", "student_t", "one_outlier"])
@each([case for case in UNIFORM if case[0].scale != E8M0 or case[1].name == "log256"])
def test_the_error_of_rounded_scales_is_at_most_half_the_gap(format: Format, rule: ScaleRule, name: str) -> None:
    """The same, after the float32 roundings of x / scale and of the sum with the zero point: 2^-24 each."""
    x = sample(name, element_of(format), format.block)
    quantized = quantize(x, format, rule)
    scales = quantized.scales.values().double().repeat_interleave(format.block, dim=-1)
    is_scaled = scales > 0
    y = x.double() / scales
    if quantized.scales.zero_points is not None:
        y = y + quantized.scales.zero_points.double().repeat_interleave(format.block, dim=-1)
    q = format.element.decode(quantized.codes, torch.float64)
    low, high = _neighbours(y, format)
    slack = 2.0**-24 * (y.abs() + format.element.max * (quantized.scales.zero_points is not None))
    is_above = is_scaled & (y > format.element.max)
    is_below = is_scaled & (y < (0.0 if quantized.scales.zero_points is not None else -format.element.max))
    is_inside = is_scaled & ~is_above & ~is_below
    assert is_inside.any()
    assert ((q - y).abs() <= (high - low) / 2 + slack)[is_inside].all()
    assert (q[is_above] == format.element.max).all()
    assert (q[is_below] == (0.0 if quantized.scales.zero_points is not None else -format.element.max)).all()
    assert (quantized.dequantize()[~is_scaled] == 0).all()


@each([case for case in POWER_OF_TWO if case[1].name not in ("mse", "search")])
def test_float64_is_rounded_once(format: Format, rule: ScaleRule) -> None:
    """Just above a midpoint of two values, by less than float32 can see, is nearer to the upper one.

    mse and search are left out: for these blocks they prefer a scale that has other midpoints.
    """
    element = format.element
    magnitudes = sorted({abs(v) for v in element.values if abs(v) <= element.max})
    # Midpoints whose lower neighbour has the even code, so that a float32 tie would go down.
    pairs = list(zip(magnitudes[0:-1:2], magnitudes[1::2], strict=False))[: format.block - 1]
    x = torch.zeros(format.block, dtype=torch.float64)
    x[0] = element.max
    midpoints = torch.tensor([(low + high) / 2 for low, high in pairs], dtype=torch.float64)
    x[1 : len(pairs) + 1] = midpoints * (1 + 2.0**-40)
    upper = torch.tensor([high for _, high in pairs], dtype=torch.float64)
    lower = torch.tensor([low for low, _ in pairs], dtype=torch.float64)
    assert torch.equal(fake_quantize(x, format, rule)[1 : len(pairs) + 1], upper)
    assert torch.equal(quantize(x, format, rule).dequantize(torch.float64)[1 : len(pairs) + 1], upper)
    assert torch.equal(fake_quantize(x.float(), format, rule)[1 : len(pairs) + 1].double(), lower)


def test_float64_maxima_are_not_rounded_before_the_scale_is_chosen() -> None:
    format = FORMATS["mxfp4"]
    for rule, threshold in (("floor", 8.0), ("even", 7.0)):
        below = torch.full((1, 32), threshold * (1 - 2.0**-40), dtype=torch.float64)
        assert quantize(below, format, RULES[rule]).scales.stored.item() == 127
        assert quantize(below.float(), format, RULES[rule]).scales.stored.item() == 128
    above = torch.full((1, 32), 6.0 * (1 + 2.0**-40), dtype=torch.float64)
    assert quantize(above, format, RULES["rceil"]).scales.stored.item() == 128
    assert quantize(above.float(), format, RULES["rceil"]).scales.stored.item() == 127


@formats
def test_packing_round_trips_every_code(format: Format) -> None:
    width = format.bits
    codes = torch.arange(1 << width, dtype=torch.uint8)
    every_pair = torch.cartesian_prod(codes, codes).reshape(-1, 2 * 4)
    packed = pack_codes(every_pair, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (every_pair.shape[0], 8 * width // 8)
    assert torch.equal(unpack_codes(packed, width), every_pair)


@pytest.mark.parametrize(
    "format", [f for f in EVERY if isinstance(f.grid, Uniform) and f.scale == E8M0], ids=lambda f: f.name
)
def test_every_code_under_every_scale_round_trips(format: Format) -> None:
    """In float64, which holds every product; but for Inf, NaN and the most negative integer."""
    codes = torch.arange(256) % (1 << format.element.bits)
    is_number = torch.tensor(format.element.values).abs()[codes] <= format.element.max
    codes = torch.where(is_number, codes, 0).to(torch.uint8).expand(255, 256).contiguous()
    stored = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 8).contiguous()
    scales = BlockScales(stored, E8M0)
    values = QTensor(codes, scales, format).dequantize(torch.float64)
    assert torch.equal(encode_blocks(values.unflatten(-1, (8, 32)), scales, format).codes, codes)


@each(ALL)
def test_a_packed_tensor_round_trips(format: Format, rule: ScaleRule) -> None:
    quantized = quantize(sample("three_dimensions", element_of(format), format.block), format, rule)
    again = QTensor.from_packed(quantized.packed(), quantized.parts, format)
    assert torch.equal(again.codes, quantized.codes)
    assert again.shape == quantized.shape


@each([case for case in ALL if case[1].name != "log256"])
def test_bits_per_element_is_what_the_tensors_take(format: Format, rule: ScaleRule) -> None:
    """log256 is left out: its scales are kept as float32 and are never stored."""
    quantized = quantize(sample("normal", element_of(format), format.block), format, rule)
    taken = quantized.packed().numel()
    for part in format.grid.parts(rule):
        tensor = quantized.parts.tensors[part.name]
        if part.per != "tensor":
            # A type may have more bits than an entry needs: a zero point is packed as a code is.
            is_whole = part.bits == 8 * tensor.element_size()
            taken += tensor.numel() * tensor.element_size() if is_whole else pack_codes(tensor, part.bits).numel()
    assert taken == quantized.packed_bytes
    assert taken * 8 == format.bits_per_element * quantized.codes.numel()


@each(ALL)
def test_zero_blocks_are_code_zero(format: Format, rule: ScaleRule) -> None:
    x = sample("normal", element_of(format), format.block)
    x[1::2] = 0.0
    quantized = quantize(x, format, rule)
    assert (quantized.codes[1::2] == 0).all()
    assert (bits(fake_quantize(x, format, rule)[1::2]) == 0).all()
    if isinstance(format.grid, Uniform) and quantized.scales.type == E8M0:
        assert (quantized.scales.stored[1::2] == 0).all()


@each(ALL)
def test_a_tensor_of_zeros(format: Format, rule: ScaleRule) -> None:
    x = torch.zeros(3, 2 * format.block)
    assert (quantize(x, format, rule).codes == 0).all()
    assert (bits(fake_quantize(x, format, rule)) == 0).all()


@each([case for case in UNIFORM if case[0].scale == E8M0])
def test_the_sign_of_zero(format: Format, rule: ScaleRule) -> None:
    """Kept by floating-point elements; two's complement has one zero."""
    x = sample("negative_zeros", element_of(format), format.block)
    quantized = quantize(x, format, rule)
    expected = 1 << (format.element.bits - 1) if isinstance(format.element, FloatElement) else 0
    assert (quantized.codes[:, ::2] == expected).all()


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@each(ALL)
def test_nan_and_inf(format: Format, rule: ScaleRule, poison: float) -> None:
    """An error in `quantize`; in `fake_quantize` a NaN block, or a NaN tensor where all of it sets the scale."""
    x = sample("normal", element_of(format), format.block)
    clean = fake_quantize(x, format, rule)
    x[2, format.block + 3] = poison
    with pytest.raises(NumericsError, match=r"^layers\.3\.mlp\.down_proj: holds NaN or Inf"):
        quantize(x, format, rule, "layers.3.mlp.down_proj")
    got = fake_quantize(x, format, rule)
    is_poisoned = torch.zeros_like(x, dtype=torch.bool)
    if format.grid.looks_at_whole_tensor(rule):
        is_poisoned[:] = True
    else:
        is_poisoned[2, format.block : 2 * format.block] = True
    assert got[is_poisoned].isnan().all()
    assert torch.equal(bits(got)[~is_poisoned], bits(clean)[~is_poisoned])


@formats
def test_a_row_that_does_not_fill_its_blocks_is_refused(format: Format) -> None:
    columns = 2 * format.block + 1
    message = f"{columns} is not a multiple of the block size {format.block} of {format.name}"
    with pytest.raises(ConfigError, match=rf"^q_proj: .*{message}"):
        quantize(torch.ones(2, columns), format, name="q_proj")
    with pytest.raises(ConfigError, match=message):
        fake_quantize(torch.ones(2, columns), format)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0, 1), (3, 0)], ids=str)
@each(ALL)
def test_an_empty_batch(format: Format, rule: ScaleRule, shape: tuple[int, ...]) -> None:
    x = torch.empty(*shape[:-1], shape[-1] * format.block)
    quantized = quantize(x, format, rule)
    if isinstance(format.grid, Uniform):
        assert quantized.scales.values().shape == shape
    assert QTensor.from_packed(quantized.packed(), quantized.parts, format).dequantize().shape == x.shape
    assert fake_quantize(x, format, rule).shape == x.shape


@each(ALL)
def test_the_input_is_left_as_it_was(format: Format, rule: ScaleRule) -> None:
    x = sample("normal", element_of(format), format.block)
    before = x.clone()
    quantize(x, format, rule)
    fake_quantize(x, format, rule)
    assert torch.equal(bits(x), bits(before))


@each(ALL)
def test_a_view_with_gaps_quantizes_like_its_copy(format: Format, rule: ScaleRule) -> None:
    x = sample("normal", element_of(format), format.block)
    view = torch.stack([x, -x])[:, ::2].transpose(0, 1)
    expected = quantize(view.contiguous(), format, rule)
    got = quantize(view, format, rule)
    assert torch.equal(got.codes, expected.codes)
    assert torch.equal(bits(fake_quantize(view, format, rule)), bits(expected.dequantize()))


@formats
def test_a_rule_of_another_format_is_refused(format: Format) -> None:
    """Its scales would be read as something else."""
    for name in RULES.keys() - set(format.rules):
        for function in (quantize, fake_quantize):
            with pytest.raises(ConfigError, match=rf"format {format.name} has no scale rule '{name}'; it has "):
                function(torch.ones(1, format.block), format, RULES[name])


@each(ALL)
def test_a_copy_means_the_same(format: Format, rule: ScaleRule) -> None:
    """A copied model holds copies of its formats, rules and scales."""
    x = sample("normal", element_of(format), format.block)
    quantized = quantize(x, format, rule)
    expected = quantized.dequantize()
    assert torch.equal(copy.deepcopy(quantized).dequantize(), expected)
    assert torch.equal(fake_quantize(x, copy.deepcopy(format), copy.deepcopy(rule)), expected)
    again = quantize(x, copy.deepcopy(format), copy.deepcopy(rule))
    assert torch.equal(again.codes, quantized.codes)


def test_the_scale_byte_255_reads_as_nan() -> None:
    scales = BlockScales(torch.tensor([[255, 254]], dtype=torch.uint8), E8M0)
    got = QTensor(torch.ones(1, 64, dtype=torch.uint8), scales, FORMATS["mxfp4"]).dequantize()
    assert got[0, :32].isnan().all() and (got[0, 32:] == 0.5 * 2.0**127).all()
