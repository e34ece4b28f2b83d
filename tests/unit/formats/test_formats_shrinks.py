"""The search of MR-GPTQ against all of its candidates at once, in float64."""

import pytest
import torch
from tests.oracles.sample_blocks import SAMPLES, sample
from torch import Tensor

from mxrot.formats import FORMATS, as_blocks, choose_parts, fake_quantize, get_format, get_rule, shrinks
from mxrot.formats.element import E2M1, INT4
from mxrot.formats.exponents import block_maxima, even_exponents, third_exponents
from mxrot.formats.shrinks import POWER, SHRINKS, shrunk_maxima

FORMAT = FORMATS["mxfp4"]
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


def errors_of_all(blocks: Tensor) -> Tensor:
    """sum |error|^2.4 of every block [M, B] under every shrink, relative to the maximum: [100, M].

    The nearest of all values, found by looking at each.
    """
    largest = blocks.abs().amax(dim=-1, keepdim=True)
    relative = blocks.abs() / torch.where(largest > 0, largest, 1.0)
    scales = (1 - torch.arange(SHRINKS, dtype=torch.float64) / SHRINKS) / 6
    distances = (relative[None, ..., None] - scales[:, None, None, None] * VALUES).abs().amin(dim=-1)
    return distances.pow(POWER).sum(dim=-1)


def blocks_of(name: str) -> Tensor:
    return as_blocks(sample(name, E2M1, 32), FORMAT, "x").flatten(0, -2).double()


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("near_largest", "every_exponent")])
def test_no_other_shrink_has_a_smaller_error(name: str) -> None:
    """Up to the rounding of float32: 2^-24 a value of errors that are at least as large as their rounding."""
    blocks = blocks_of(name)
    errors = errors_of_all(blocks)
    largest = block_maxima(blocks)
    found = shrunk_maxima(blocks, largest, E2M1)
    index = ((1 - found / torch.where(largest > 0, largest, found + 1)) * SHRINKS).round().long().clamp(0, SHRINKS - 1)
    chosen = errors.gather(0, index[None])[0]
    assert (chosen <= errors.amin(dim=0) * (1 + 1e-5) + 32 * (2.0**-23) ** POWER).all()
    assert torch.equal(found[largest == 0], largest[largest == 0])


def test_it_is_the_largest_of_equals_and_does_not_always_stay() -> None:
    """One number alone: under p = 1 it is 6 scales, without an error."""
    block = torch.zeros(1, 32)
    block[0, 3] = -2.5
    assert float(shrunk_maxima(block, block_maxima(block), E2M1)) == 2.5
    blocks = blocks_of("normal")
    largest = block_maxima(blocks)
    found = shrunk_maxima(blocks, largest, E2M1)
    assert (found <= largest).all() and (found < largest).any() and (found > largest / 2).all()


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = torch.randn(7, 3, 32, generator=torch.Generator().manual_seed(0))
    expected = shrunk_maxima(blocks, block_maxima(blocks), E2M1)
    monkeypatch.setattr(shrinks, "SEARCHED_ELEMENTS", 64)
    assert torch.equal(shrunk_maxima(blocks, block_maxima(blocks), E2M1), expected)


@pytest.mark.parametrize(("rule", "cast"), [("search", even_exponents), ("x3-search", third_exponents)])
def test_the_scale_is_the_cast_of_the_shrunk_maximum(rule: str, cast: object) -> None:
    blocks = torch.randn(5, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = choose_parts(blocks, FORMAT, get_rule(rule)).tensors
    expected = cast(shrunk_maxima(blocks, block_maxima(blocks), E2M1), E2M1) + 127  # type: ignore[operator]
    assert torch.equal(found["scale"].int(), expected.int())
    assert ("tensor_scale" in found) is (rule == "x3-search")


def test_int4_of_a_row_is_clipped_where_that_costs_least() -> None:
    """The scale is that of the shrunk maximum; one outlier among a thousand ordinary weights is given up."""
    rows = torch.randn(4, 1, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows[0, 0, 5] = 6.5
    format = get_format("int4_row")
    found = choose_parts(rows, format, get_rule("absmax-search")).tensors["scale"].double()
    expected = shrunk_maxima(rows, block_maxima(rows), INT4) / 7
    assert torch.equal(found.flatten(), expected.to(torch.float16).double().flatten())
    assert (found < choose_parts(rows, format, get_rule("absmax")).tensors["scale"].double()).all()

    def cost(rule: str) -> torch.Tensor:
        rounded = fake_quantize(rows[:, 0], format, get_rule(rule)).double()
        return (rounded - rows[:, 0]).abs().pow(POWER).sum(dim=1)

    assert (cost("absmax-search") < 0.75 * cost("absmax")).all()


def test_the_scale_of_the_paper_is_x3() -> None:
    """2^(floor(log2 amax) - 2) / 0.75, an E8M0 byte and one factor; under x3 it is 2^floor(log2 amax) / 3."""
    maxima = torch.tensor([0.3, 0.5, 1.0, 1.999, 2.0, 5.9, 1e-20, 3e20])
    blocks = torch.zeros(len(maxima), 1, 32)
    blocks[:, 0, 7] = -maxima
    found = FORMAT.grid.choose(blocks, get_rule("x3"))
    values = found.values(torch.float64)[:, 0]  # type: ignore[attr-defined]
    expected = torch.exp2(maxima.double().log2().floor() - 2) / 0.75
    torch.testing.assert_close(values, expected, rtol=2.0**-24, atol=0)


def test_nan_and_inf_are_no_maxima_of_a_search() -> None:
    block = torch.ones(3, 1, 32)
    block[0, 0, 4], block[1, 0, 4] = torch.nan, torch.inf
    for rule in ("search", "x3-search"):
        stored = choose_parts(block, FORMAT, get_rule(rule)).tensors["scale"].flatten().tolist()
        assert stored[:2] == [255, 255] and stored[2] < 255
