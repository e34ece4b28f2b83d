"""x3, log256, NVFP4 and the integer formats against formulas written out in NumPy.

NumPy's float32 arithmetic is IEEE, as torch's is: sums, products and quotients agree bit for bit.
"""

from fractions import Fraction

import numpy as np
import pytest
import torch
from tests.oracles.exact_blocks import ELEMENTS, nearest_code
from tests.oracles.sample_blocks import bits, sample

from mxrot.formats import FORMATS, get_rule, quantize

E2M1 = FORMATS["mxfp4"].element
ORDINARY = ("normal", "student_t", "log_normal", "zeros", "subnormal", "one_outlier", "three_dimensions", "no_rows")


def _e2m1_codes(y: np.ndarray) -> np.ndarray:
    """Codes of float32 `y`, exactly rounded."""
    exact = ELEMENTS["e2m1"]
    codes = [nearest_code(Fraction(v), exact) | int(np.signbit(v)) << 3 for v in y.flatten().tolist()]
    return np.array(codes, dtype=np.uint8).reshape(y.shape)


@pytest.mark.parametrize("name", ["normal", "log_normal", "zeros", "every_exponent", "subnormal", "near_largest"])
def test_x3(name: str) -> None:
    format = FORMATS["mxfp4"]
    x = sample(name, E2M1, 32)[::4]
    ours = quantize(x, format, format.rule("x3"))

    blocks = x.numpy().reshape(-1, 32)
    _, exponents = np.frexp(np.abs(blocks).max(axis=-1).astype(np.float64))  # amax = m 2^e with m in [1/2, 1)
    has_maximum = np.abs(blocks).max(axis=-1) > 0
    exponents = np.where(has_maximum, exponents - 1, -127).clip(-127, 127)
    scale = np.exp2(exponents.astype(np.float64)).astype(np.float32) * np.float32(1 / 3)
    codes = _e2m1_codes(blocks / scale[:, None])

    assert ours.scales.stored.numpy().flatten().tolist() == (exponents + 127).tolist()
    assert ours.codes.numpy().flatten().tolist() == codes.flatten().tolist()
    with np.errstate(over="ignore"):
        values = np.array(E2M1.values, dtype=np.float32)[codes] * scale[:, None]
    assert torch.equal(bits(ours.dequantize().reshape(-1, 32)), bits(torch.from_numpy(values)))


def test_x3_uses_the_upper_half_of_the_range() -> None:
    """amax / scale lies in [3, 6), up to the rounding of a third."""
    format = FORMATS["mxfp4"]
    x = sample("student_t", E2M1, 32)
    scales = quantize(x, format, format.rule("x3")).scales.values()
    ratio = x.unflatten(-1, (-1, 32)).abs().amax(-1) / scales
    assert (ratio >= 3 * (1 - 2**-23)).all() and (ratio <= 6).all()


@pytest.mark.parametrize("name", ORDINARY)
def test_nvfp4(name: str) -> None:
    x = sample(name, E2M1, 16)
    ours = quantize(x, FORMATS["nvfp4"])
    blocks = x.numpy().reshape(-1, 16)
    maxima = np.abs(blocks).max(axis=-1)
    tensor_scale = maxima.max(initial=0) / np.float32(448 * 6)
    relative = (maxima / np.float32(6) / tensor_scale).clip(max=448) if len(blocks) else maxima
    stored = torch.from_numpy(relative).to(torch.float8_e4m3fn)
    scale = stored.float().numpy() * tensor_scale
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.where(scale[:, None] > 0, blocks / scale[:, None], np.float32(0))

    assert ours.scales.tensor_scale.item() == tensor_scale
    assert torch.equal(ours.scales.stored.float().flatten(), stored.float())
    assert ours.codes.numpy().flatten().tolist() == _e2m1_codes(y).flatten().tolist()


def test_nvfp4_of_zeros() -> None:
    ours = quantize(torch.zeros(2, 32), FORMATS["nvfp4"])
    assert ours.scales.tensor_scale == 0
    assert (ours.scales.stored.float() == 0).all()


def test_nvfp4_of_the_smallest_numbers() -> None:
    """The tensor scale rounds down to the smallest float32, so the block scale would be 500: it stays at 448."""
    smallest = 2.0**-149
    x = torch.full((1, 16), 3000 * smallest)
    ours = quantize(x, FORMATS["nvfp4"])
    assert ours.scales.tensor_scale == smallest
    assert (ours.scales.stored.float() == 448).all()
    assert (ours.dequantize() == 6 * 448 * smallest).all()


def test_nvfp4_block_too_small_for_its_tensor_becomes_zero() -> None:
    """Below 2^-10 of the largest scale step E4M3 has only 0."""
    x = torch.ones(2, 16)
    x[1] *= 2.0**-10 / 448 * 0.999
    ours = quantize(x, FORMATS["nvfp4"])
    assert (ours.codes[1] == 0).all() and (ours.codes[0] == 7).all()


@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("format_name", ["int4_g32", "int4_g128"])
def test_int4(format_name: str, name: str) -> None:
    format = FORMATS[format_name]
    x = sample(name, format.element, format.block).clamp(-1e5, 1e5)
    ours = quantize(x, format)
    blocks = x.numpy().reshape(-1, format.block)
    scale = (np.abs(blocks).max(axis=-1) / np.float32(7)).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        y = blocks / scale.astype(np.float32)[:, None]
    integers = np.where(scale[:, None] == 0, 0, y).round().clip(-7, 7)

    assert torch.equal(ours.scales.stored.flatten(), torch.from_numpy(scale))
    values = integers * scale.astype(np.float32)[:, None]
    assert torch.equal(ours.dequantize().reshape(-1, format.block), torch.from_numpy(values))
    assert ours.codes.numpy().flatten().tolist() == (integers.astype(int) & 15).flatten().tolist()


@pytest.mark.parametrize("offset", [-3.0, 0.0, 0.5, 100.0])
@pytest.mark.parametrize("name", ORDINARY)
@pytest.mark.parametrize("format_name", ["int4_g32_asym", "int4_g128_asym"])
def test_asymmetric_int4(format_name: str, name: str, offset: float) -> None:
    format = FORMATS[format_name]
    x = sample(name, format.element, format.block).clamp(-1e5, 1e5) + offset
    ours = quantize(x, format)
    blocks = x.numpy().reshape(-1, format.block)
    low, high = blocks.min(axis=-1).clip(max=0), blocks.max(axis=-1).clip(min=0)
    scale = ((high - low) / np.float32(15)).astype(np.float16)
    divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
    zero_points = (-low / divisor).round().clip(0, 15)
    scaled = np.where(scale[:, None] == 0, np.float32(0), blocks / divisor[:, None])
    codes = (scaled + zero_points[:, None]).round().clip(0, 15)

    assert torch.equal(ours.scales.stored.flatten(), torch.from_numpy(scale))
    assert ours.scales.zero_points.numpy().flatten().tolist() == zero_points.tolist()
    assert ours.codes.numpy().flatten().tolist() == codes.flatten().tolist()
    values = (codes - zero_points[:, None]) * scale.astype(np.float32)[:, None]
    assert torch.equal(ours.dequantize().reshape(-1, format.block), torch.from_numpy(values))


def test_asymmetric_int4_by_hand() -> None:
    """From -1 to 2: the step is 1/5 and code 5 stands for 0."""
    x = torch.zeros(1, 32)
    x[0, :5] = torch.tensor([-1.0, 2.0, 0.2, -0.2, 0.31])
    ours = quantize(x, FORMATS["int4_g32_asym"])
    assert ours.scales.zero_points.item() == 5
    assert ours.codes[0, :6].tolist() == [0, 15, 6, 4, 7, 5]


def test_log256_levels_by_hand() -> None:
    """Scales 2^-20 to 2^31 span 51 octaves, so a level is 1/5 of an octave and every power of two is on one."""
    format, rule = FORMATS["mxfp4"], get_rule("log256")
    powers = torch.arange(-20, 32, dtype=torch.float64).exp2().float()
    x = torch.zeros(52, 32)
    x[:, 3] = 6 * powers
    on_levels = quantize(x, format, rule).scales
    assert on_levels.type.name == "log256"
    assert torch.equal(on_levels.values().flatten(), powers)

    x[1:-1, 3] *= 1.14  # just short of the next level, 2^(1/5) = 1.1487: floored
    assert torch.equal(quantize(x, format, rule).scales.values().flatten(), powers)
    x[1:-1, 3] *= 1.16 / 1.14  # just beyond it
    ratio = quantize(x, format, rule).scales.values().flatten() / powers
    torch.testing.assert_close(ratio[1:-1], torch.full((50,), 2**0.2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["normal", "student_t", "log_normal", "zeros", "every_exponent", "near_largest"])
@pytest.mark.parametrize("format_name", ["mxfp4", "mxfp8_e4m3"])
def test_log256(format_name: str, name: str) -> None:
    """Against float64 logarithms, because NumPy's float32 log2 and exp2 need not be torch's to the last bit.

    Logarithms are below 256, where a float32 unit in the last place is 2^-16. One unit each for the logarithm
    and the smallest one shifts a position on the 256 levels by 255 * 2^-15 / span; their part in the span does
    so once more; the product and the quotient round it by 255 * 2^-23. Within that of an integer the position
    may be floored either way. The argument of exp2 is then off by a few units: 2^-13 is eight.
    """
    format = FORMATS[format_name]
    x = sample(name, format.element, format.block)
    ours = quantize(x, format, get_rule("log256")).scales.values().double().numpy().flatten()
    maxima = x.abs().unflatten(-1, (-1, 32)).amax(-1).double().numpy().flatten()
    logs = np.log2((maxima / format.element.max).clip(min=2.0**-126))
    low, span = logs.min(), np.ptp(logs)
    positions = 255 * (logs - low) / span
    slack = 255 * 2.0**-14 / span + 2.0**-14
    levels = np.stack([np.floor(positions - slack), np.floor(positions + slack)]).clip(0, 255)
    assert (np.abs(np.log2(ours) - (low + levels * span / 255)).min(axis=0) <= 2.0**-13).all()
    assert (levels[0] == levels[1]).mean() > 0.9


def test_log256_of_equal_maxima() -> None:
    x = torch.full((4, 32), 3.0)
    scales = quantize(x, FORMATS["mxfp4"], get_rule("log256")).scales.values()
    assert torch.equal(scales, torch.full((4, 1), 0.5))
