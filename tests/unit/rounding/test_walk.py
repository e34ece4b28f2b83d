"""GPTQ where a block is not what kernels take: other grids, and blocks wider than a span."""

from dataclasses import replace

import pytest
import torch
from tests.unit.formats.toy_grids import CODEBOOK, TWO_SCALES
from tests.unit.rounding.test_gptq import ORDERS, inputs, mean_square, random
from tests.unit.rounding.textbook_obs import round_columns

from mxrot.errors import ConfigError
from mxrot.formats import Format, get_format
from mxrot.rounding import walk
from mxrot.rounding.gptq import GPTQ
from mxrot.rounding.rtn import RoundToNearest
from mxrot.rounding.walk import spans

FORMATS = {
    "two scales": TWO_SCALES,
    "codebook": CODEBOOK,
    "two scales a row": replace(TWO_SCALES, block=None),
    "one scale a row": replace(get_format("int4_g32"), block=None),
    "zero points a row": replace(get_format("int4_g32_asym"), block=None),
    "wide blocks": replace(get_format("mxfp4"), block=48),
    "one tensor": replace(get_format("nvfp4"), block=None),
}


def takes(method: GPTQ, format: Format) -> bool:
    try:
        method.check(format, format.rule())
    except ConfigError:
        return False
    return True


CASES = [(name, order) for name, format in FORMATS.items() for order, method in ORDERS.items() if takes(method, format)]


@pytest.mark.parametrize(("name", "order"), [case for case in CASES if case[1] != "walked"])
def test_it_equals_the_textbook_form(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value for value, with spans so short that wide blocks are several of them."""
    monkeypatch.setattr(walk, "SPAN", 20)
    monkeypatch.setattr(walk, "PIECE", 8)
    format, method = FORMATS[name], ORDERS[order]
    for seed, tokens in ((10, 40), (20, 200)):
        weight, x = random(6, 96, seed=seed), inputs(tokens, 96, seed)
        hessian = mean_square(x)
        columns = torch.arange(96)
        if order == "descending":
            columns = hessian.diagonal().argsort(descending=True)
        expected = round_columns(
            weight, hessian, 0.01, columns.tolist(), format, format.rule(), reached=order == "reached"
        )
        got = method.round(weight, format, format.rule(), hessian, "w").weight
        torch.testing.assert_close(got.dequantize(torch.float64), expected, rtol=1e-15, atol=0)
        nearest = RoundToNearest().round(weight, format, format.rule(), None, "w").weight
        assert not torch.equal(nearest.codes, got.codes)


@pytest.mark.parametrize(("name", "order"), CASES)
def test_a_multiple_of_the_identity_makes_it_equal_rtn(name: str, order: str) -> None:
    format, weight = FORMATS[name], random(5, 96, seed=3)
    nearest = RoundToNearest().round(weight, format, format.rule(), None, "w").weight
    got = ORDERS[order].round(weight, format, format.rule(), 2.5 * torch.eye(96, dtype=torch.float64), "w").weight
    if order != "walked":
        assert torch.equal(got.codes, nearest.codes)
        assert all(map(torch.equal, got.parts.tensors.values(), nearest.parts.tensors.values()))


@pytest.mark.parametrize("name", ["one scale a row", "two scales"])
def test_rtn_wins_on_weights_and_gptq_on_outputs(name: str) -> None:
    """On rows of several spans."""
    format, weight, x = FORMATS[name], random(12, 608, seed=3), inputs(900, 608)
    hessian = mean_square(x)
    lost = {
        method.name: method.round(weight, format, format.rule(), hessian, "w").weight.dequantize(torch.float64) - weight
        for method in (RoundToNearest(), GPTQ())
    }
    assert lost["rtn"].norm() < lost["gptq"].norm()
    assert (x @ lost["gptq"].T).norm() < 0.8 * (x @ lost["rtn"].T).norm()


def test_what_was_taken_away_is_the_difference_to_the_weight_as_the_walk_found_it() -> None:
    """The last column is found as all others left it, and nothing is behind it."""
    format, weight = FORMATS["two scales"], random(4, 96, seed=5)
    found = GPTQ().round(weight, format, format.rule(), mean_square(inputs(300, 96)), "w")
    values = found.weight.dequantize(torch.float64)
    torch.testing.assert_close(found.remainder[:, 0], (weight - values)[:, 0])
    assert found.remainder.shape == weight.shape and not torch.allclose(
        found.remainder[:, 1:], (weight - values)[:, 1:]
    )


@pytest.mark.parametrize("name", ["two scales", "one scale a row", "codebook"])
def test_walked_scales_need_blocks_of_one_scale(name: str) -> None:
    with pytest.raises(ConfigError, match=r'^rounding gptq: scales = "walked" needs power-of-two scales'):
        GPTQ(scales="walked").check(FORMATS[name], FORMATS[name].rule())
    wide = replace(get_format("mxfp4"), block=None)
    with pytest.raises(ConfigError, match=r'"walked" needs blocks of one scale and at most 256 elements, which mxfp4'):
        GPTQ(scales="walked").check(wide, wide.rule())


def test_spans_are_whole_blocks_or_parts_of_one() -> None:
    assert list(spans(96, 32)) == [(0, 96, 32)]
    assert list(spans(640, 128)) == [(0, 256, 128), (256, 512, 128), (512, 640, 128)]
    assert list(spans(96, 48)) == [(0, 96, 48)]
    assert list(spans(700, 700)) == [(0, 256, 32), (256, 512, 32), (512, 700, 32)]
    assert list(spans(800, 400)) == [(0, 256, 32), (256, 400, 32), (400, 656, 32), (656, 800, 32)]
