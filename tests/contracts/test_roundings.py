"""What every rounding method owes, under each combination of its options, in every format it takes."""

from dataclasses import fields, replace
from itertools import product
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import FORMATS, Format, QTensor, ScaleRule, encode_blocks
from mxrot.rounding import METHODS, RoundingMethod, get_rounding

NAMES = ("mxfp4", "mxfp6_e2m3", "mxfp8_e4m3", "mxint8", "nvfp4", "int4_g32", "int4_g32_asym")
COLUMNS = 96


ASKED = ("target", "tokens", "inputs", "folds")
"""Choices of what a method asks for, which `round` itself does not look at (tests/unit/test_hessian.py)."""


def variants(kind: type[RoundingMethod]) -> list[RoundingMethod]:
    """The method under every combination of its named choices that it accepts."""
    hints = get_type_hints(kind)
    named = [item.name for item in fields(kind) if get_origin(hints[item.name]) is Literal and item.name not in ASKED]
    choices = {name: get_args(hints[name]) for name in named}
    found = []
    for values in product(*choices.values()):
        options: dict[str, Any] = dict(zip(choices, values, strict=True))
        try:
            found.append(kind(**options))
        except ConfigError:
            continue
    return found


def takes(method: RoundingMethod, format: Format, rule: ScaleRule) -> bool:
    try:
        method.check(format, rule)
    except ConfigError:
        return False
    return True


CASES = [
    pytest.param(method, FORMATS[name], FORMATS[name].rule(rule), id=f"{method}-{name}-{rule}")
    for kind in METHODS.values()
    for method in variants(kind)
    for name in NAMES
    for rule in FORMATS[name].rules
    if takes(method, FORMATS[name], FORMATS[name].rule(rule))
]
each = pytest.mark.parametrize(("method", "format", "rule"), CASES)

# Their scale is below amax / max on purpose: the largest values saturate, and the next scale is another one.
SATURATING_RULES = ("log256", "x3", "search", "x3-search")
each_not_saturating = pytest.mark.parametrize(
    ("method", "format", "rule"), [case for case in CASES if case.values[2].name not in SATURATING_RULES]
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights() -> Tensor:
    """Ordinary rows, a zero row and a zero block, one huge outlier, tiny numbers, a row of one size, powers of two."""
    weight = random(9, COLUMNS, seed=0)
    weight[1] = 0
    weight[2, 32:64] = 0
    weight[3, 40] = 3e4
    weight[4] *= 1e-9
    weight[5] = weight[5].sign()
    weight[6] = weight[6].sign() * 2.0 ** torch.arange(COLUMNS).remainder(5)
    weight[7, ::3] = 0
    return weight


def hessian() -> Tensor:
    x = random(150, COLUMNS, seed=1) @ (random(COLUMNS, COLUMNS, seed=2) + 3)
    return x.T @ x / len(x)


def rounded(method: RoundingMethod, format: Format, rule: ScaleRule, H: Tensor, weight: Tensor) -> QTensor:
    return method.round(weight, format, rule, H if method.requirements.hessian else None, "w").weight


def codes_of_values(q: QTensor) -> Tensor:
    """The codes that the values of q have under the scales of q."""
    blocks = q.dequantize(torch.float64).unflatten(-1, (-1, q.format.block))
    return encode_blocks(blocks, q.scales, q.format).codes


@each
def test_codes_and_scales_are_of_the_format(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    got = rounded(method, format, rule, hessian(), weights())
    assert got.format is format and got.codes.dtype == torch.uint8 and got.codes.shape == (9, COLUMNS)
    scale_type = rule.stored_type(format.scale)
    assert got.scales.type is scale_type and got.scales.stored.dtype == scale_type.dtype
    assert got.scales.stored.shape == (9, COLUMNS // format.block)
    scales = got.scales.values(torch.float64)
    assert scales.isfinite().all() and (scales >= 0).all()


@each
def test_values_lie_on_the_grid(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    """No code is NaN, Inf or the unused most negative integer: encoding a value gives its code back."""
    got = rounded(method, format, rule, hessian(), weights())
    assert int(got.codes.max()) < 1 << format.element.bits
    elements = format.element.decode(got.codes)
    assert elements.isfinite().all() and elements.abs().max() <= format.element.max
    assert torch.equal(format.element.encode(elements), got.codes)
    is_alive = got.scales.values().repeat_interleave(format.block, dim=-1) > 0
    assert torch.equal(codes_of_values(got)[is_alive], got.codes[is_alive])


def stored_tensors(q: QTensor) -> list[Tensor]:
    """Everything that a checkpoint keeps of q."""
    tensors = (q.codes, q.scales.stored, q.scales.tensor_scale, q.scales.zero_points)
    return [tensor for tensor in tensors if tensor is not None]


@each
def test_a_multiple_of_the_identity_as_H_makes_it_equal_rtn(
    method: RoundingMethod, format: Format, rule: ScaleRule
) -> None:
    """Bit for bit, codes and scales: an error that H spreads nowhere is that of rounding to nearest.

    With walked scales: to nearest under the neighbour of the rule's exponent with the least squared error.
    """
    weight, identity = weights(), torch.eye(COLUMNS, dtype=torch.float64)
    nearest = get_rounding("rtn")().round(weight, format, rule, None, "w").weight
    if getattr(method, "scales", "") == "walked":
        nearest = best_neighbour(weight, nearest)
    expected = stored_tensors(nearest)
    for multiple in (1.0, 3.7, 1e-20, 1e12, 0.0):
        got = stored_tensors(rounded(method, format, rule, multiple * identity, weight))
        assert len(got) == len(expected)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def best_neighbour(weight: Tensor, nearest: QTensor) -> QTensor:
    """Of each block's exponent, one less and one more, in this order, the first with the least squared error."""
    format, bytes_ = nearest.format, nearest.scales.stored.int()
    blocks = weight.unflatten(-1, (-1, format.block))
    tried = []
    for offset in (0, -1, 1):
        scales = replace(nearest.scales, stored=(bytes_ + offset).clamp(0, 254).to(torch.uint8))
        tried.append(encode_blocks(blocks, scales, format))
    lost = [(q.dequantize(torch.float64) - weight).unflatten(-1, (-1, format.block)) for q in tried]
    errors = torch.stack([difference.square().sum(dim=-1) for difference in lost])
    best = torch.zeros_like(errors[0], dtype=torch.int64)
    for index in (1, 2):
        best = torch.where(errors[index] < errors.gather(0, best[None])[0], index, best)
    stored = torch.stack([q.scales.stored for q in tried]).gather(0, best[None])[0]
    return encode_blocks(blocks, replace(nearest.scales, stored=stored), format)


@each_not_saturating
def test_what_is_rounded_stays(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    """Q(Q(x)) = Q(x) for every power-of-two rule: a value has no error, so nothing moves.

    Other scales follow the largest value of a block, which error compensation may have left below the largest
    code; there it holds for rounding to nearest, where a scale was not too small to be exact.
    """
    weight = weights() if rule.is_power_of_two else random(5, COLUMNS, seed=3)
    H = hessian() if rule.is_power_of_two else torch.eye(COLUMNS, dtype=torch.float64)
    once = rounded(method, format, rule, H, weight).dequantize(torch.float64)
    twice = rounded(method, format, rule, H, once).dequantize(torch.float64)
    torch.testing.assert_close(twice, once, rtol=0 if rule.is_power_of_two else 1e-15, atol=0)


@each
def test_the_same_input_gives_the_same_bits(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    first = stored_tensors(rounded(method, format, rule, hessian(), weights()))
    torch.manual_seed(7)
    second = stored_tensors(rounded(method, format, rule, hessian(), weights()))
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@each
def test_a_weight_that_is_not_finite_names_the_layer(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    H = hessian() if method.requirements.hessian else None
    for bad in (torch.nan, torch.inf, -torch.inf):
        weight = weights()
        weight[7, 50] = bad
        with pytest.raises(NumericsError, match=r"^model\.layers\.1\.mlp\.up_proj: holds NaN or Inf"):
            method.round(weight, format, rule, H, "model.layers.1.mlp.up_proj")


@each
def test_a_scale_that_overflows_names_the_layer(method: RoundingMethod, format: Format, rule: ScaleRule) -> None:
    """Saturating is E8M0's way; an FP16 scale of infinity would turn the block into NaN."""
    weight = weights() * 1e9
    H = hessian() if method.requirements.hessian else None
    if format.scale.dtype == torch.float16:
        with pytest.raises(NumericsError, match=r"^q_proj: a block scale overflows fp16"):
            method.round(weight, format, rule, H, "q_proj")
    else:
        assert method.round(weight, format, rule, H, "q_proj").weight.dequantize(torch.float64).isfinite().all()


@pytest.mark.parametrize("name", METHODS)
def test_it_is_registered_under_its_name(name: str) -> None:
    assert get_rounding(name).name == name
    assert variants(METHODS[name])


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^unknown rounding 'gtpq'; did you mean 'gptq'\? known: gptq, rtn"):
        get_rounding("gtpq")
