"""The fused activation quantizer against its plain twin."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mxrot.formats import FORMATS, RULES, BlockScales, Format, QTensor, ScaleRule, TensorQuantizer, Uniform
from mxrot.formats.element import FloatElement
from mxrot.kernels import chunked, plain_rotate_quantize
from mxrot.kernels.dispatch import rotate_quantize as dispatched
from mxrot.kernels.plain import (
    in_pairs,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
    swizzle_scales,
    swizzled_bytes,
)
from mxrot.transforms.base import random_orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COVERED = [
    pytest.param(format, format.rule(name), id=f"{format.name}-{name}")
    for format in FORMATS.values()
    if isinstance(format.grid, Uniform)
    for name in format.rules
    if isinstance(format.element, FloatElement) and RULES[name].raises_from is not None and format.block == 32
]
TYPES = [torch.float16, torch.bfloat16, torch.float32]

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def fused(x: Tensor, matrices: Tensor | None, format: Format, rule: ScaleRule) -> Tensor:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize

    return rotate_quantize(x, matrices, format, rule)


def sample(dtype: torch.dtype, rows: int = 150, columns: int = 96, seed: int = 0) -> Tensor:
    """Heavy-tailed rows, with zeros, -0, ties, a huge and a tiny row."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(rows, columns, generator=generator) * 2
    x = torch.randn(rows, columns, generator=generator) * spread.exp()
    x[0], x[1] = 0.0, -0.0
    x[2, :32] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 4)
    x[3] *= 2.0**-14
    x[4] = 2.0**15 * torch.rand(columns, generator=generator)
    return x.to(dtype).to(DEVICE)


def same_bits(found: Tensor, expected: Tensor) -> bool:
    """NaN equals NaN, and nothing but NaN; -0 differs from 0."""
    equal = found.float().view(torch.int32) == expected.float().view(torch.int32)
    return bool((equal | (found.isnan() & expected.isnan())).all())


def test_the_kernel_covers_something() -> None:
    assert len(COVERED) >= 9


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_without_a_transform_every_bit_is_the_twins(format: Format, rule: ScaleRule, dtype: torch.dtype) -> None:
    x = sample(dtype)
    assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_a_permutation_moves_bits_exactly(format: Format, rule: ScaleRule, groups: int) -> None:
    """Products with a permutation matrix are exact in any order, so the contract is bitwise."""
    x = sample(torch.float32)
    permutations = torch.stack([torch.eye(32)[torch.randperm(32)] for _ in range(groups)]).to(DEVICE)
    assert same_bits(fused(x, permutations, format, rule), plain_rotate_quantize(x, permutations, format, rule))


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_with_a_rotation_only_values_at_a_boundary_may_differ(groups: int, dtype: torch.dtype) -> None:
    """Float32 sums of 32 products differ by at most 32 * 2^-24 of the sum of magnitudes, whatever their order.

    Where that cannot carry the exact transformed value over a rounding boundary, in units of a step that is at
    least 2^-3 of the block maximum, both must agree; so at most the share of values that lie that close differ.
    """
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    matrices = random_orthogonal(groups, 32, torch.Generator().manual_seed(2)).float().to(DEVICE)
    found, expected = fused(x, matrices, format, rule).float(), plain_rotate_quantize(x, matrices, format, rule)
    differing = (found != expected).sum().item()
    # |x|_1 |T|_max <= 32 * 4.5 here; 32 * 2^-24 * 144 on either side of a boundary, steps of at least 1/16.
    share = 2 * 32 * 2.0**-24 * 144 * 16
    assert differing <= max(4, share * found.numel())


def test_nan_and_inf_make_their_block_nan_and_no_other() -> None:
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = sample(torch.float32)
    x[5, 3], x[6, 40], x[7, 64] = float("nan"), float("inf"), -float("inf")
    found = fused(x, None, format, rule)
    expected = torch.zeros(found.shape, dtype=torch.bool, device=found.device)
    expected[5, :32], expected[6, 32:64], expected[7, 64:] = True, True, True
    assert torch.equal(found.isnan(), expected)


@pytest.mark.parametrize("rows", [0, 1, 127, 129])
def test_any_number_of_rows_and_any_leading_shape(rows: int) -> None:
    format, rule = FORMATS["mxfp4"], RULES["floor"]
    x = sample(torch.bfloat16, rows=200)[:rows]
    assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))
    assert fused(x[None], None, format, rule).shape == (1, rows, 96)


def test_rows_that_do_not_lie_together() -> None:
    format, rule = FORMATS["mxfp4"], RULES["rceil"]
    wide = sample(torch.float16, columns=128)
    for x in (wide[::3, 32:96], wide.t()[:96, :32]):
        assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))


def test_dispatch_takes_the_plain_path_on_a_cpu() -> None:
    x = sample(torch.float32).cpu()
    for format, rule in ((FORMATS["mxfp4"], RULES["even"]), (FORMATS["nvfp4"], RULES["absmax"])):
        found = dispatched(x, None, format, rule)
        assert found.dtype == torch.float32
        assert same_bits(found, plain_rotate_quantize(x, None, format, rule))


def test_every_covered_value_is_a_bfloat16_number() -> None:
    for parameter in COVERED:
        format, rule = parameter.values
        assert isinstance(format, Format) and isinstance(rule, ScaleRule)
        assert TensorQuantizer(format, rule).is_exact_in_bfloat16
        plain = plain_rotate_quantize(sample(torch.float32), None, format, rule)
        assert torch.equal(plain, plain.to(torch.bfloat16).float())


FP4_RULES = [RULES[name] for name in FORMATS["mxfp4"].rules if RULES[name].raises_from is not None]
each_rule = pytest.mark.parametrize("rule", FP4_RULES, ids=lambda rule: rule.name)


def extreme(dtype: torch.dtype, rows: int = 150, columns: int = 96) -> Tensor:
    """`sample`, with blocks below and above all exponents of E5M2, and NaN and Inf."""
    x = sample(torch.float32, rows, columns)
    x[5] *= 2.0**-30
    x[6, :32] *= 2.0**-22
    x[7, 32:64] = x[7, 32:64].sign() * 3e4
    if dtype != torch.float16:
        x[8] *= 2.0**20
    x[9, 3], x[10, 40] = float("nan"), float("inf")
    return x.to(dtype).to(DEVICE)


def permutations(groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.eye(32)[torch.randperm(32, generator=generator)] for _ in range(groups)]).to(DEVICE)


@pytest.mark.parametrize("shift", [-3, 0, 4])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@each_rule
def test_fp8_has_the_twins_bits(rule: ScaleRule, dtype: torch.dtype, shift: int) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    x, format = extreme(dtype), FORMATS["mxfp4"]
    for matrices in (None, permutations(1), permutations(3)):
        if matrices is not None:  # with a NaN or Inf anywhere in a block, all of its transform is NaN
            x = sample(dtype)
        expected = plain_rotate_quantize_e5m2(x, matrices, format, rule, shift)
        found = rotate_quantize_e5m2(x, matrices, format, rule, shift)
        assert found.dtype == torch.float8_e5m2 and same_bits(found, expected)


@pytest.mark.parametrize("rows", [12, 150])
@pytest.mark.parametrize("groups", [1, 3])
def test_fp8_in_pairs_are_the_same_bytes_in_another_order(rows: int, groups: int) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    x, arguments = sample(torch.bfloat16, rows), (permutations(groups), FORMATS["mxfp4"], RULES["even"])
    found = rotate_quantize_e5m2(x, *arguments, are_in_pairs=True).view(torch.uint8)
    assert torch.equal(found, in_pairs(rotate_quantize_e5m2(x, *arguments).view(torch.uint8)))


def test_fp8_is_exact_within_its_window_and_bounded_outside() -> None:
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x *= 2.0 ** torch.arange(-24, 40).clamp(max=18)[:, None]
    found = plain_rotate_quantize_e5m2(x, None, format, rule).float()
    exact = plain_rotate_quantize(x, None, format, rule)
    inside = (x.abs().amax(dim=1) >= 2.0**-13) & (x.abs().amax(dim=1) < 2.0**15)
    assert inside.sum() > 20 and torch.equal(found[inside], exact[inside])
    small = x.abs().amax(dim=1) < 2.0**-13
    assert small.sum() > 5 and (found[small] - x[small]).abs().max() <= 2.0**-17 + 2.0**-14 * 0.25
    assert found.abs().max() == 6 * 2.0**13


@pytest.mark.parametrize("swizzled", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@each_rule
def test_codes_and_scales_have_the_twins_bits(rule: ScaleRule, dtype: torch.dtype, swizzled: bool) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_packed

    format = FORMATS["mxfp4"]
    for x, matrices in ((extreme(dtype), None), (sample(dtype), permutations(1)), (sample(dtype), permutations(3))):
        expected = plain_rotate_quantize_packed(x, matrices, format, rule, swizzled)
        found = rotate_quantize_packed(x, matrices, format, rule, swizzled)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@each_rule
def test_codes_and_scales_stand_for_the_quantized_values(rule: ScaleRule) -> None:
    format = FORMATS["mxfp4"]
    x = extreme(torch.float32)[None]
    packed = plain_rotate_quantize_packed(x, None, format, rule)
    assert packed.codes.shape == (1, 150, 48) and packed.scales.shape == (1, 150, 3)
    values = QTensor.from_packed(packed.codes, BlockScales(packed.scales, format.scale), format).dequantize()
    assert same_bits(values, plain_rotate_quantize(x, None, format, rule))


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (128, 4), (129, 5), (300, 12)])
def test_the_swizzled_order(rows: int, groups: int) -> None:
    """Byte by byte from the formula of the layout."""
    scales = torch.randint(1, 255, (rows, groups), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = swizzle_scales(scales)
    assert len(found) == swizzled_bytes(rows, groups)
    tiles = -(-groups // 4)
    for r in range(rows):
        for g in range(groups):
            at = ((r // 128) * tiles + g // 4) * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + g % 4
            assert found[at] == scales[r, g]
    assert int(found.sum(dtype=torch.int64)) == int(scales.sum(dtype=torch.int64))  # and zeros


@pytest.mark.parametrize("rows", [0, 1, 127, 129])
def test_every_output_takes_any_number_of_rows(rows: int) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2, rotate_quantize_packed

    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = sample(torch.bfloat16, rows=200, columns=160)[:rows, 32:]
    assert same_bits(rotate_quantize_e5m2(x, None, format, rule), plain_rotate_quantize_e5m2(x, None, format, rule))
    for swizzled in (False, True):
        found = rotate_quantize_packed(x, None, format, rule, swizzled)
        expected = plain_rotate_quantize_packed(x, None, format, rule, swizzled)
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


def at_the_ends(columns: int = 96) -> Tensor:
    """Rows of all binades of float32 at either end, subnormal ones too, and one of its largest numbers."""
    exponents = torch.cat([torch.arange(-149, -100), torch.arange(100, 127)])
    spread = torch.randn(len(exponents), columns, generator=torch.Generator().manual_seed(5)).clamp(-1.9, 1.9)
    x = torch.ldexp(spread.double(), exponents[:, None]).float()
    x[-1, 5] = -torch.finfo(torch.float32).max
    return x.to(DEVICE)


@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_both_ends_of_the_exponents_have_the_twins_bits(format: Format, rule: ScaleRule) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_packed

    x = at_the_ends()
    found, expected = fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule).to(torch.bfloat16)
    # Triton's interpreter converts to subnormal bfloat16 numbers wrongly.
    counts = torch.ones_like(found, dtype=torch.bool) if DEVICE == "cuda" else expected.abs() >= 2.0**-126
    assert same_bits(found[counts], expected[counts])
    if format.name == "mxfp4":
        expected, found = (
            plain_rotate_quantize_packed(x, None, format, rule),
            rotate_quantize_packed(x, None, format, rule),
        )
        assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("amax", [4.0, 6.0, 6.999, 7.25, 7.999])
@each_rule
def test_codes_next_to_every_boundary_have_the_twins_bits(rule: ScaleRule, amax: float) -> None:
    """Each point between two codes, and its float32 neighbours, of either sign, in a block of any scale."""
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2, rotate_quantize_packed

    format = FORMATS["mxfp4"]
    ties = torch.tensor([0.0, 0.25, 0.75, 1.0, 1.25, 1.75, 2.0, 2.5, 3.5, 4.0, 5.0, 6.0, 7.0])
    infinity = torch.tensor(torch.inf)
    near = torch.cat([ties, ties.nextafter(infinity), ties.nextafter(-infinity)])
    values = torch.cat([near, -near, torch.tensor([-0.0, 0.0])])
    values = values[values.abs() <= amax]
    x = torch.full((3, -(-len(values) // 31), 32), amax)
    x[:, :, 1:] = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    x = (x * torch.tensor([1.0, 2.0**-9, 2.0**11])[:, None, None]).flatten(0, 1).to(DEVICE)
    expected, found = plain_rotate_quantize_packed(x, None, format, rule), rotate_quantize_packed(x, None, format, rule)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)
    assert same_bits(fused(x, None, format, rule), plain_rotate_quantize(x, None, format, rule))
    assert same_bits(rotate_quantize_e5m2(x, None, format, rule), plain_rotate_quantize_e5m2(x, None, format, rule))


@pytest.mark.parametrize("programs", [2, 10**9], ids=["several steps", "one step"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("rows", "stages"), [(8, 1), (16, 3), (32, 1)])
def test_programs_of_any_tile_leave_nothing_out(
    rows: int, stages: int, groups: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1 to 5 columns of blocks, whole tiles and not."""
    module = importlib.import_module("mxrot.kernels.fused.rotate_quantize")  # the package has a function of this name
    tile = module.Tile(rows, groups, stages, programs)

    def chosen(blocks: int, is_flat: bool, is_packed: bool) -> object:
        return replace(tile, groups=1) if is_flat else tile

    monkeypatch.setattr(module, "choose_tile", chosen)
    format, rule = FORMATS["mxfp4"], RULES["even"]
    wide = sample(torch.bfloat16, rows=32, columns=160)
    wide[9, 3], wide[10, 40] = float("nan"), float("inf")
    one, four, five = (permutations(count).to(torch.bfloat16) for count in (1, 4, 5))
    cases = [(wide, None), (wide[:31, 32:], None), (wide[11:], five), (wide[11:, :128], four), (wide[11:27, 64:], one)]
    for x, matrices in cases:
        expected = plain_rotate_quantize_e5m2(x, matrices, format, rule)
        assert same_bits(module.rotate_quantize_e5m2(x, matrices, format, rule), expected)
        for swizzled in (False, True):
            packed = plain_rotate_quantize_packed(x, matrices, format, rule, swizzled)
            found = module.rotate_quantize_packed(x, matrices, format, rule, swizzled)
            assert torch.equal(found.codes, packed.codes) and torch.equal(found.scales, packed.scales)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("is_flat", [False, True])
def test_tiles_that_are_chosen(is_flat: bool, is_packed: bool) -> None:
    """One column of blocks has no neighbours; and a grid has at most 65535 rows of programs."""
    from mxrot.kernels.fused.rotate_quantize import _Blocks, choose_tile

    for blocks in (1, 128, 4097, 2**17, 2**20, 2**32):
        tile = choose_tile(blocks, is_flat, is_packed)
        assert tile.rows in (8, 16, 32) and tile.groups in ((1,) if is_flat else (1, 2, 4))
        x = torch.empty(blocks, 32, device="meta")
        grid = _Blocks(x, is_flat, tile).grid
        assert grid[-1] * _Blocks(x, is_flat, tile).steps * tile.rows >= blocks
        assert is_flat or grid[1] <= 65535


@pytest.mark.parametrize("elements", [1, 300, 2**19])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("format", "rule"), COVERED)
def test_chunks_have_the_twins_bits(
    format: Format, rule: ScaleRule, dtype: torch.dtype, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", elements)
    cases = [(extreme(dtype), None), (sample(dtype), permutations(1)), (sample(dtype), permutations(3))]
    tiny = 2.0**-126 * torch.randn(4, 96, generator=torch.Generator().manual_seed(3))
    huge = 2.0**125 * torch.randn(4, 96, generator=torch.Generator().manual_seed(3)).clamp(-3, 3)
    cases += [(x.to(DEVICE), None) for x in (tiny, huge)]
    for x, matrices in cases:
        found = chunked.rotate_quantize_in_chunks(x, matrices, format, rule)
        assert same_bits(found, plain_rotate_quantize(x, matrices, format, rule))
    x = sample(dtype)[None, :0]
    assert chunked.rotate_quantize_in_chunks(x, None, format, rule).shape == x.shape


@pytest.mark.parametrize("groups", [1, 3])
def test_chunks_with_a_rotation_are_the_twins_but_for_ties(groups: int) -> None:
    """The products are the same library's, but need not be summed in the same order for another number of rows."""
    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = torch.randn(400, 96, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    matrices = random_orthogonal(groups, 32, torch.Generator().manual_seed(2)).to(torch.bfloat16).to(DEVICE)
    found = chunked.rotate_quantize_in_chunks(x, matrices, format, rule)
    assert (found != plain_rotate_quantize(x, matrices, format, rule)).double().mean() < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("groups", [1, 5])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_bfloat16_matrices_on_matrix_hardware(dtype: torch.dtype, groups: int) -> None:
    """Products are exact there too, so values differ no more often than with float32 arithmetic."""
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2, rotate_quantize_packed

    format, rule = FORMATS["mxfp4"], RULES["even"]
    x = torch.randn(4000, 160, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    matrices = random_orthogonal(groups, 32, torch.Generator().manual_seed(2)).to(torch.bfloat16).to(DEVICE)
    expected = plain_rotate_quantize(x.double().float(), matrices.float(), format, rule)
    found = fused(x, matrices, format, rule).float()
    assert (found != expected).double().mean() < 1e-4
    moved = permutations(groups).to(torch.bfloat16)
    assert same_bits(fused(x, moved, format, rule), plain_rotate_quantize(x, moved, format, rule))
    fp8 = plain_rotate_quantize_e5m2(x, moved, format, rule)
    assert same_bits(rotate_quantize_e5m2(x, moved, format, rule), fp8)
    for swizzled in (False, True):
        packed = rotate_quantize_packed(x, moved, format, rule, swizzled)
        plain = plain_rotate_quantize_packed(x, moved, format, rule, swizzled)
        assert torch.equal(packed.codes, plain.codes) and torch.equal(packed.scales, plain.scales)
