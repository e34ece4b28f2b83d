"""AMXFP4: an element above 0 has another scale than the rest of its block (arXiv 2411.09909)."""

import math
from fractions import Fraction

import pytest
import torch
from tests.oracles.sample_blocks import bits
from torch import Tensor

from mxrot.errors import NumericsError
from mxrot.formats import QTensor, fake_quantize, get_format, quantize
from mxrot.formats.element import E2M1, E5M2

AMXFP4 = get_format("amxfp4")
SMALLEST = 2.0**-16
MAGNITUDES = [Fraction(value) for value in E2M1.values[:8]]
SCALES = [Fraction(value) for value in E5M2.values[:128] if math.isfinite(value)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nearest(number: Fraction, among: list[Fraction]) -> Fraction:
    """Of two as near the larger: half away from zero."""
    return min(among, key=lambda one: (abs(one - number), -one))


def exact_scale(end: float) -> Fraction:
    return nearest(max(Fraction(end) / 6, Fraction(SMALLEST)), SCALES)


def exact_block(block: list[float]) -> list[float]:
    """In fractions: nothing is rounded but scales and elements."""
    above, others = exact_scale(max(block)), exact_scale(-min(block))
    scales = [above if x > 0 else others for x in block]
    return [
        math.copysign(float(nearest(abs(Fraction(x)) / scale, MAGNITUDES) * scale), x)
        for x, scale in zip(block, scales, strict=True)
    ]


def exact(x: Tensor) -> Tensor:
    return torch.tensor([exact_block(block) for block in x.unflatten(-1, (-1, 32)).flatten(0, -2).tolist()]).view_as(x)


def skewed(rows: int = 24) -> Tensor:
    """Blocks around other numbers than 0, some of one sign, over forty binades."""
    x = random(rows, 64) + 3 * random(rows, 1, seed=1)
    return x * torch.logspace(-26, 14, rows, base=2.0, dtype=torch.float64)[:, None]


def test_values_are_those_of_the_definition() -> None:
    x = skewed()
    assert torch.equal(fake_quantize(x, AMXFP4), exact(x).double())
    assert torch.equal(quantize(x, AMXFP4).dequantize(torch.float64), exact(x).double())


def test_ties_go_away_from_zero_in_scales_and_in_elements() -> None:
    """Under scales 1 and 2: each midpoint of either sign; then a maximum in the middle of two scales."""
    ties, up = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    x = torch.zeros(2, 32)
    x[0, :16] = torch.tensor([6.0, *ties, -12.0, *(-2 * tie for tie in ties)])
    x[1, :2] = torch.tensor([6 * 1.125, -6 * 1.375])
    expected = torch.zeros(2, 32)
    expected[0, :16] = torch.tensor([6.0, *up, -12.0, *(-2 * value for value in up)])
    expected[1, :2] = torch.tensor([6 * 1.25, -6 * 1.5])
    assert torch.equal(fake_quantize(x, AMXFP4), expected)
    assert quantize(x, AMXFP4).parts.tensors["scale"].float().flatten().tolist() == [1.0, 1.25]
    assert quantize(x, AMXFP4).parts.tensors["negative_scale"].float().flatten().tolist() == [2.0, 1.5]


@pytest.mark.parametrize("step", [-1, 1])
def test_next_to_a_tie_the_nearer_one_is_taken(step: int) -> None:
    ties, numbers = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    x = torch.zeros(32)
    x[0] = 6
    x[1:8] = torch.tensor(ties).nextafter(torch.tensor(math.inf * step))
    assert fake_quantize(x, AMXFP4)[1:8].tolist() == (numbers[1:] if step > 0 else numbers[:-1])


@pytest.mark.parametrize("sign", [1, -1])
def test_a_sign_that_is_absent_changes_nothing(sign: int) -> None:
    x = sign * (random(6, 64).abs() + 0.1)
    found = quantize(x, AMXFP4)
    name = "negative_scale" if sign > 0 else "scale"
    absent = found.parts.tensors[name]
    assert set(absent.float().flatten().tolist()) == {SMALLEST}
    other = {name: torch.full_like(absent, 7)}
    changed = QTensor(found.codes, found.parts.with_tensors({**found.parts.tensors, **other}), AMXFP4)
    assert torch.equal(changed.dequantize(), found.dequantize())
    assert torch.equal(found.dequantize(torch.float64), exact(x).double())


def test_a_block_of_zeros() -> None:
    x = torch.zeros(2, 64)
    x[1] = -0.0
    found = quantize(x, AMXFP4)
    assert found.codes.unique(dim=1).tolist() == [[0], [8]]
    assert {value for part in found.parts.tensors.values() for value in part.float().flatten().tolist()} == {SMALLEST}
    assert torch.equal(bits(fake_quantize(x, AMXFP4)), bits(x)) and torch.equal(bits(found.dequantize()), bits(x))


def test_subnormal_scales_are_kept() -> None:
    """2^-16, 2^-15 and 3 * 2^-16 have no hidden bit; what is less than half of 2^-16 / 2 becomes 0."""
    x = torch.zeros(4, 32)
    x[:3, 0] = 6 * torch.tensor([1.0, 2.0, 3.0]) * SMALLEST
    x[3, :3] = torch.tensor([SMALLEST, SMALLEST / 4, -SMALLEST / 5])
    found = quantize(x, AMXFP4)
    assert (found.parts.tensors["scale"].float().flatten() / SMALLEST).tolist() == [1, 2, 3, 1]
    assert torch.equal(found.dequantize()[:3], x[:3])
    assert found.dequantize()[3, :3].tolist() == [SMALLEST, SMALLEST / 2, -0.0]


def test_every_code_under_every_scale() -> None:
    """16 codes under each pair of scales: decoded and encoded again they are the same."""
    scales = torch.tensor([float(scale) for scale in SCALES[1:]], dtype=torch.float64)
    count = len(scales)
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).expand(count, 1, 32)
    for shift in (0, 1, 50):
        tensors = {"scale": scales[:, None], "negative_scale": scales.roll(shift)[:, None]}
        parts = quantize(torch.zeros(count, 32), AMXFP4).parts
        parts = parts.with_tensors({name: one.to(torch.float8_e5m2) for name, one in tensors.items()})
        values = AMXFP4.grid.decode(codes, parts, torch.float32)
        assert torch.equal(AMXFP4.grid.encode(values, parts), codes)
        assert torch.equal(bits(AMXFP4.grid.round(values, parts)), bits(values))
        expected = torch.tensor(E2M1.values).repeat(2)
        side = torch.where(expected > 0, *(one[:, :, None] for one in tensors.values()))
        assert torch.equal(values.double(), expected * side)
        packed = QTensor(codes.flatten(1), parts, AMXFP4)
        again = QTensor.dequantize_packed(packed.packed(), parts, AMXFP4)
        assert torch.equal(bits(again), bits(values.flatten(1)))
        assert torch.equal(values.bfloat16().float(), values)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_poisons_its_block(wrong: float) -> None:
    x = random(2, 64).float()
    x[1, 40] = wrong
    with pytest.raises(NumericsError, match=r"^w_proj: holds NaN or Inf"):
        quantize(x, AMXFP4, name="w_proj")
    assert fake_quantize(x, AMXFP4).isnan().sum(dim=-1).tolist() == [0, 32]


def test_a_scale_beyond_e5m2_is_refused() -> None:
    """Up to the middle of 57344 and 65536 it is 57344, and what exceeds 6 of them saturates."""
    x = torch.zeros(32)
    x[0] = torch.tensor(6 * 61440.0).nextafter(torch.tensor(0.0))
    assert quantize(x, AMXFP4).dequantize()[0] == 6 * 57344
    x[0] = -6 * 61440.0
    with pytest.raises(NumericsError, match=r"^w_proj: a block scale overflows negative_scale \(float8_e5m2\)"):
        quantize(x, AMXFP4, name="w_proj")
    assert fake_quantize(x, AMXFP4).isnan()[0]


def test_quantizing_twice_is_quantizing_once() -> None:
    once = fake_quantize(skewed(), AMXFP4)
    assert torch.equal(bits(fake_quantize(once, AMXFP4)), bits(once))


def test_a_skewed_block_loses_less_than_under_one_scale() -> None:
    """Of the block, as E5M2 rounds it, so that nothing else differs."""
    x = random(64, 64).abs() - 0.1
    blocks = x.unflatten(-1, (-1, 32))
    chosen = quantize(x, AMXFP4).parts
    larger = torch.maximum(*(part.float() for part in chosen.tensors.values())).to(torch.float8_e5m2)
    one = AMXFP4.grid.round(blocks, chosen.with_tensors({name: larger for name in chosen.tensors}))
    assert (fake_quantize(x, AMXFP4) - x).norm() < (one.flatten(-2) - x).norm()
