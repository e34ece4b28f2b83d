"""Blocks that bring their four values along: which ones, how they are stored, and what blocks a row is cut into."""

import itertools

import pytest
import torch
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import Format, fake_quantize, get_format, get_rule, quantize
from mxrot.formats.catalog import FORMATS
from mxrot.formats.look_up_table import nearest_levels, stored_levels
from mxrot.formats.parts import NamedParts

LUT2 = get_format("lut2")
SPACED = get_rule("spaced")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def best_by_trying(block: list[float]) -> float:
    """The least sum of squares over all ways to cut the sorted elements into four groups or fewer."""
    x, least = sorted(block), float("inf")
    for count in range(1, 5):
        for cuts in itertools.combinations(range(1, len(x)), count - 1):
            groups = [x[a:b] for a, b in itertools.pairwise((0, *cuts, len(x)))]
            least = min(least, sum(sum((one - sum(g) / len(g)) ** 2 for one in g) for g in groups))
    return least


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9, 12])
def test_no_four_levels_are_nearer(size: int) -> None:
    x = random(6, size, seed=size)
    x[1] = x[1].round()  # equal elements
    x[2] = x[2].abs() * 1e-30
    x[3] = 7.5
    levels = nearest_levels(x)
    assert (levels.diff(dim=-1) >= 0).all()
    lost = (x[..., None] - levels[:, None]).square().amin(dim=-1).sum(dim=-1)
    expected = torch.tensor([best_by_trying(block) for block in x.tolist()], dtype=torch.float64)
    assert torch.allclose(lost, expected, rtol=1e-9, atol=1e-13 * float(x.abs().max()) ** 2)


def test_levels_of_a_gaussian() -> None:
    """Lloyd and Max: 0.4528 and 1.5104 standard deviations; here of numbers spread as evenly as its quantiles."""
    levels = nearest_levels(torch.special.ndtri((torch.arange(1024).double() + 0.5) / 1024)[None])[0]
    assert torch.allclose(levels, torch.tensor([-1.5104, -0.4528, 0.4528, 1.5104]).double(), atol=0.01)


def test_large_matrices_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(5, 3, 32)
    whole = nearest_levels(x)
    monkeypatch.setattr("mxrot.formats.look_up_table.TABLE_ELEMENTS", 2048)
    assert torch.equal(nearest_levels(x), whole)


def test_stored_levels_lie_as_near_as_a_hundred_and_twenty_seventh_says() -> None:
    levels = nearest_levels(random(20, 4, 64))
    stored = stored_levels(levels).tensors
    assert stored["levels"].abs().amax(dim=-1).eq(127).all()
    largest = levels.abs().amax(dim=-1, keepdim=True)
    error = (stored["scale"].double()[..., None] * stored["levels"] - levels).abs()
    assert (error <= largest * (0.5 / 127 + 2.0**-11)).all()


@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_spaced_levels_are_spaced_as_stored_and_reach_the_clipped_ends(clip: float) -> None:
    x = random(8, 64) + random(8, 1, seed=1)
    stored = quantize(x, LUT2, SPACED.clipped(clip)).parts.tensors
    steps = stored["levels"].short().diff(dim=-1)
    assert (steps == steps[..., :1]).all() and (steps > 0).all()
    values = stored["scale"].double()[..., None] * stored["levels"]
    ends = torch.stack([x.amin(dim=-1), x.amax(dim=-1)], dim=-1)[:, None] * clip
    assert torch.allclose(values[..., [0, 3]], ends, atol=float(ends.abs().max()) / 100)


def test_lloyd_loses_less_than_spaced() -> None:
    x = random(16, 96).exp()
    lost = [float((fake_quantize(x, LUT2, rule) - x).norm()) for rule in (get_rule("lloyd"), SPACED)]
    assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("rule", ["lloyd", "spaced"])
def test_a_block_of_zeros(rule: str) -> None:
    found = quantize(torch.zeros(2, 64), LUT2, get_rule(rule))
    assert not found.codes.any() and not found.dequantize().any()
    assert not any(part.any() for part in found.parts.tensors.values())


def test_an_element_in_the_middle_takes_the_lower_level() -> None:
    parts = NamedParts({"scale": torch.ones(1, 1).half(), "levels": torch.tensor([[[-4, -2, 0, 6]]]).to(torch.int8)})
    x = torch.tensor([[[-9.0, -3.0, -2.9, -1.0, 3.0, 3.1, 9.0, -2.0]]])
    assert LUT2.grid.encode(x, parts).tolist() == [[[0, 0, 1, 1, 2, 3, 3, 1]]]
    assert LUT2.grid.round(x, parts).tolist() == [[[-4, -4, -2, -2, 0, 6, 6, -2]]]


def test_a_scale_beyond_fp16_is_refused() -> None:
    x = torch.zeros(1, 32)
    x[0, 3] = 127 * 65504.0
    assert quantize(x, LUT2).dequantize()[0, 3] == x[0, 3]
    with pytest.raises(NumericsError, match=r"^w_proj: a block scale overflows scale \(float16\)"):
        quantize(x * 2, LUT2, name="w_proj")


@pytest.mark.parametrize(
    ("width", "block"), [(4096, 128), (14336, 128), (576, 96), (1536, 128), (64, 64), (96, 96), (160, 32), (2112, 96)]
)
def test_blocks_fit_the_row(width: int, block: int) -> None:
    assert LUT2.block_in(width) == block
    assert quantize(random(2, width).float(), LUT2).parts.tensors["levels"].shape == (2, width // block, 4)
    assert LUT2.bits_in(width) == width * (2 + 48 / block)


def test_a_row_that_no_block_fits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^w: last dimension 48 is not a multiple of the block size 32 of lut2"):
        quantize(torch.ones(1, 48), LUT2, name="w")
    with pytest.raises(ConfigError, match=r"576 is not a multiple of the block size 128 of lut2_g128"):
        quantize(torch.ones(1, 576), get_format("lut2_g128"), name="w")


def test_no_other_format_has_blocks_that_fit() -> None:
    assert [name for name, format in FORMATS.items() if format.longest_block] == ["lut2"]


def test_four_codes_a_byte_are_read_as_they_were_written() -> None:
    format: Format = LUT2
    found = quantize(random(3, 192).float(), format)
    assert found.packed().shape == (3, 48)
    again = found.dequantize_packed(found.packed(), found.parts, format)
    assert torch.equal(again, found.dequantize())
