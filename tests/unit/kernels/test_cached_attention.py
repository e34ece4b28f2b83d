"""Tokens packed and read in registers: against the plain twins, float64, and every code and scale."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from tests.unit.kernels.exact_attention import exact_attention, rounded_attention
from torch import Tensor
from torch.nn.functional import pad

from mxrot.formats import TensorQuantizer, fake_quantize
from mxrot.kernels.cached_attention import append_tokens, decode_attention, decodes_packed
from mxrot.kernels.plain.cached_attention import (
    CachedTokens,
    CacheMatrices,
    TokenRows,
    plain_append_tokens,
    plain_decode_attention,
    times_each,
)
from mxrot.transforms.base import random_orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = ["mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "int4_row_asym", "int4_g32_asym", "int2_g32_asym", "int2_row_asym"]
QUANTIZERS = [TensorQuantizer.of(name) for name in FORMATS]
OTHER_RULES = [
    *(TensorQuantizer.of("mxfp4", rule) for rule in ("floor", "rceil")),
    TensorQuantizer.of("mxfp4", "even", 0.9),
    TensorQuantizer.of("mxfp8_e4m3", "floor", 0.75),
    TensorQuantizer.of("int4_row_asym", None, 0.95),
    TensorQuantizer.of("int2_g32_asym", None, 0.8),
]

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


def spelled(quantizer: object) -> str:
    return quantizer.spelled if isinstance(quantizer, TensorQuantizer) else str(quantizer)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))
    return x.to(DEVICE)


def empty(
    keys: TensorQuantizer,
    values: TensorQuantizer,
    shape: tuple[int, int, int, int],
    matrices: CacheMatrices = CacheMatrices(),  # noqa: B008
) -> CachedTokens:
    """Room for [B, heads, tokens, D], in which anything lies: scales that are NaN, too."""
    batch, heads, tokens, width = shape
    rows = [TokenRows.empty(one, batch, heads, tokens, width, DEVICE) for one in (keys, values)]
    for each in rows:
        for tensor in (each.codes, *each.parts.values()):
            tensor.view(torch.uint8).fill_(255)
    return CachedTokens(rows[0], rows[1], matrices)


def filled(
    keys: TensorQuantizer, values: TensorQuantizer, shape: tuple[int, int, int, int], room: int = 0
) -> CachedTokens:
    batch, heads, tokens, width = shape
    cached = empty(keys, values, (batch, heads, tokens + room, width))
    key, value = random(*shape, seed=1), random(*shape, seed=2)
    plain_append_tokens(key, key, value, cached, 0)
    return cached


def fused_append(query: Tensor, key: Tensor, value: Tensor, cached: CachedTokens, position: int | Tensor) -> Tensor:
    from mxrot.kernels.fused.append_tokens import append_tokens as fused

    return fused(query, key, value, cached, position)


def fused_attention(
    query: Tensor,
    cached: CachedTokens,
    length: int | Tensor,
    visible: Tensor | None = None,
    softcap: float | None = None,
    tokens: int = 16,
    splits: int = 2,
) -> Tensor:
    from mxrot.kernels.fused.cached_attention import LEAST_TOKENS, Tile, attend_by_tiles

    tokens = tokens if query.dtype == torch.float32 else max(tokens, LEAST_TOKENS)
    scaling = query.shape[-1] ** -0.5
    return attend_by_tiles(query, cached, length, visible, scaling, softcap, Tile(tokens, splits))


def same_bits(a: CachedTokens, b: CachedTokens) -> bool:
    pairs = [(a.keys, b.keys), (a.values, b.values)]
    tensors = [((x.codes, *x.parts.values()), (y.codes, *y.parts.values())) for x, y in pairs]
    return all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for one, other in tensors
        for x, y in zip(one, other, strict=True)
    )


def assert_is_attention(
    found: Tensor,
    query: Tensor,
    cached: CachedTokens,
    length: int,
    visible: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    expected, bound = exact_attention(query, cached, length, visible, softcap, on_matrix_hardware=DEVICE == "cuda")
    assert found.shape == query.shape and found.dtype == query.dtype
    assert ((found.double() - expected).abs() <= bound).all(), float((found.double() - expected).abs().max())


@pytest.mark.parametrize("position", [3, torch.tensor([3])], ids=["int", "on the device"])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, *OTHER_RULES], ids=spelled)
def test_a_token_has_the_bits_of_the_format(quantizer: TensorQuantizer, width: int, position: int | Tensor) -> None:
    """Zeros, ties, subnormal numbers, the largest ones, and rows of one sign among them."""
    key, value, query = random(4, 2, 1, width), random(4, 2, 1, width, seed=1), random(4, 6, 1, width, seed=2)
    key[0, 0], key[0, 1, 0, :8] = 0, -0.0
    key[1] = torch.arange(width, device=DEVICE) * 0.25 - 3.5
    key[2, 0] *= 2.0**-130
    key[2, 1], value[2, 0] = 2.0**15, value[2, 0].abs()
    value[3, 1] = -value[3, 1].abs()
    expected, found = (empty(quantizer, QUANTIZERS[0], (4, 2, 5, width)) for _ in range(2))
    swapped, own = (empty(QUANTIZERS[0], quantizer, (4, 2, 5, width)) for _ in range(2))
    place = position if isinstance(position, int) else position.to(DEVICE)
    assert fused_append(query, key, value, found, place) is query
    assert plain_append_tokens(query, key, value, expected, place) is query
    assert same_bits(found, expected)
    fused_append(query, value, key, own, place)
    plain_append_tokens(query, value, key, swapped, place)
    assert same_bits(own, swapped)
    row = TokenRows(quantizer, *(_of_token(found.keys, 3))).dequantize()
    assert torch.equal(row, fake_quantize(key, quantizer.format, quantizer.rule))


def _of_token(rows: TokenRows, token: int) -> tuple[Tensor, dict[str, Tensor]]:
    parts = {name: part[:, :, token : token + 1] for name, part in rows.parts.items()}
    return rows.codes[:, :, token : token + 1], parts


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=spelled)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_read_as_none(quantizer: TensorQuantizer, bad: float) -> None:
    key, value = random(1, 1, 1, 64), random(1, 1, 1, 64, seed=1)
    key[..., 40] = bad
    cached = empty(quantizer, quantizer, (1, 1, 2, 64))
    fused_append(key, key, value, cached, 1)
    block = slice(32, 64) if len(cached.keys.parts["scale"][0, 0, 0]) > 1 else slice(None)
    assert cached.keys.dequantize()[0, 0, 1, block].isnan().all()
    assert cached.values.dequantize()[0, 0, 1].isfinite().all()


def signed_permutations(count: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    found = torch.stack([torch.eye(width)[torch.randperm(width, generator=generator)] for _ in range(count)])
    return (found * (torch.randint(0, 2, (count, 1, width), generator=generator) * 2 - 1)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "group", "batch", "most"), [(1, 3, 1, 256), (2, 4, 3, 5), (2, 1, 5, 2)])
def test_matrices_of_a_head(
    count: int, group: int, batch: int, most: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products with permutations are the same numbers in any order, so all bits are; for one row a program or more."""
    monkeypatch.setattr(importlib.import_module("mxrot.kernels.fused.append_tokens"), "PROGRAMS", most)
    width = 64
    permutations = signed_permutations(count, width)
    matrices = CacheMatrices(permutations, permutations.roll(1, dims=2), permutations.double().mT.contiguous())
    expected, found = (empty(QUANTIZERS[0], QUANTIZERS[3], (batch, 2, 3, width), matrices) for _ in range(2))
    # As a model gives them: the heads of a token side by side.
    query = random(batch, 1, 2 * group, width).to(dtype).transpose(1, 2)
    key, value = (random(batch, 1, 2, width, seed=seed).to(dtype).transpose(1, 2) for seed in (1, 2))
    turned = fused_append(query, key, value, found, 2)
    assert turned.dtype == dtype and turned.is_contiguous()
    assert torch.equal(turned, plain_append_tokens(query, key, value, expected, 2)) and same_bits(found, expected)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_float64_matrices_leave_no_choice(width: int) -> None:
    T = random_orthogonal(2, width, torch.Generator().manual_seed(0)).to(DEVICE)
    matrices = CacheMatrices(T, T.float(), T)
    expected, found = (empty(QUANTIZERS[0], QUANTIZERS[1], (2, 2, 1, width), matrices) for _ in range(2))
    query, key, value = random(2, 4, 1, width), random(2, 2, 1, width, seed=1), random(2, 2, 1, width, seed=2)
    turned = fused_append(query, key, value, found, 0)
    torch.testing.assert_close(turned, plain_append_tokens(query, key, value, expected, 0), rtol=1e-5, atol=1e-5)
    assert same_bits(found, expected)
    # And transforms cancel in what they are for.
    torch.testing.assert_close(
        (turned.double() * times_each(key, T).double().repeat_interleave(2, 1)).sum(-1),
        (query.double() * key.double().repeat_interleave(2, 1)).sum(-1),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize(("width", "group", "length"), [(64, 1, 15), (128, 3, 37), (64, 4, 1), (128, 8, 16)])
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=spelled)
def test_it_is_attention(quantizer: TensorQuantizer, width: int, group: int, length: int) -> None:
    cached = filled(quantizer, quantizer, (2, 2, length, width), room=5)
    query = random(2, 2 * group, 1, width)
    assert_is_attention(fused_attention(query, cached, length), query, cached, length)
    assert_is_attention(plain_decode_attention(query, cached, length, None, width**-0.5), query, cached, length)


@pytest.mark.parametrize(("keys", "values"), [(0, 3), (3, 1), (1, 5), (6, 0)])
def test_keys_of_another_format_than_values(keys: int, values: int) -> None:
    cached = filled(QUANTIZERS[keys], QUANTIZERS[values], (1, 2, 21, 128))
    query = random(1, 4, 1, 128)
    assert_is_attention(fused_attention(query, cached, 21), query, cached, 21)


@pytest.mark.parametrize(("tokens", "splits"), [(16, 1), (16, 7), (32, 3), (64, 5)])
def test_any_sharing_out(tokens: int, splits: int) -> None:
    """More programs than there are tokens for, too; and the newest at a place on the device, in a larger room."""
    cached = filled(QUANTIZERS[0], QUANTIZERS[0], (1, 2, 70, 64), room=30)
    query = random(1, 6, 1, 64)
    found = fused_attention(query, cached, 70, None, None, tokens, splits)
    assert_is_attention(found, query, cached, 70)
    newest = torch.tensor([69], device=DEVICE)
    assert torch.equal(fused_attention(query, cached, newest, None, None, tokens, splits), found)
    assert_is_attention(plain_decode_attention(query, cached, newest, None, 64**-0.5), query, cached, 70)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool], ids=str)
def test_left_padding(dtype: torch.dtype) -> None:
    """Sequences of 70, 20, 1 and no tokens: the last one gets zeros."""
    length = 70
    cached = filled(QUANTIZERS[0], QUANTIZERS[3], (4, 1, length, 64))
    query = random(4, 2, 1, 64)
    visible = (torch.arange(length) >= torch.tensor([0, 50, 69, 70])[:, None]).to(dtype).to(DEVICE)
    for found in (
        fused_attention(query, cached, length, visible),
        plain_decode_attention(query, cached, length, visible, 64**-0.5),
    ):
        assert_is_attention(found, query, cached, length, visible)
        assert not found[3].any()


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_soft_caps(cap: float) -> None:
    cached = filled(QUANTIZERS[1], QUANTIZERS[1], (1, 1, 20, 64))
    query = random(1, 2, 1, 64) * 5
    assert_is_attention(fused_attention(query, cached, 20, None, cap), query, cached, 20, None, cap)
    plain = plain_decode_attention(query, cached, 20, None, 64**-0.5, cap)
    assert_is_attention(plain, query, cached, 20, None, cap)


@pytest.mark.parametrize(("width", "count"), [(64, 2), (128, 1), (256, 2)])
def test_values_are_transformed_back(width: int, count: int) -> None:
    U = random_orthogonal(count, width, torch.Generator().manual_seed(0)).to(DEVICE)
    matrices = CacheMatrices(values=U, outputs=U.mT.float())
    cached = empty(QUANTIZERS[1], QUANTIZERS[1], (2, 2, 1, width), matrices)
    query, key, value = (random(2, heads, 1, width, seed=heads) for heads in (4, 2, 2))
    fused_append(query, key, value, cached, 0)
    expected = times_each(cached.values.dequantize(), U.mT).repeat_interleave(2, 1)
    # One token is all that is seen, so this is its value: what is left of it in 8 bits.
    for found in (fused_attention(query, cached, 1), plain_decode_attention(query, cached, 1, None, width**-0.5)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - value.repeat_interleave(2, 1)).norm() < 0.04 * value.norm() * 2**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_code_and_scale(dtype: torch.dtype) -> None:
    """Exhaustive: each byte of MXFP4 and E4M3, under scales from 2^-60 to 2^60, as the one value that is seen."""
    for quantizer in QUANTIZERS[:2]:
        codes = torch.arange(256, dtype=torch.uint8).view(2, 1, 1, -1)
        codes = codes.masked_fill(codes & 127 == 127, 0) if quantizer.format.bits == 8 else codes
        groups = 128 * 8 // quantizer.format.bits // 32
        scales = torch.tensor([67, 127, 187, 100, 128, 150, 90, 140], dtype=torch.uint8)[:groups].repeat(2, 1, 1, 1)
        rows = TokenRows(quantizer, codes.to(DEVICE), {"scale": scales.to(DEVICE)})
        query = torch.zeros(2, 1, 1, 32 * groups, device=DEVICE, dtype=dtype)
        found = fused_attention(query, CachedTokens(rows, rows), 1, splits=1)
        assert torch.equal(found.float(), rows.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS[3:], ids=spelled)
def test_every_integer(quantizer: TensorQuantizer, dtype: torch.dtype) -> None:
    """Exhaustive: each code at each place, under zero points from the first to the last, as the one value seen."""
    bits = quantizer.format.bits
    codes = torch.arange(256, dtype=torch.uint8).view(8, 1, 1, -1)[..., : 64 * bits // 8].to(DEVICE)
    groups = 64 // quantizer.format.block_in(64)
    zeros = (torch.arange(8) * ((1 << bits) - 1) // 7).to(torch.uint8).view(8, 1, 1, 1).repeat(1, 1, 1, groups)
    scales = torch.full((8, 1, 1, groups), 0.375, dtype=torch.float16)
    rows = TokenRows(quantizer, codes, {"scale": scales.to(DEVICE), "zero_point": zeros.to(DEVICE)})
    query = torch.zeros(8, 1, 1, 64, device=DEVICE, dtype=dtype)
    found = fused_attention(query, CachedTokens(rows, rows), 1, splits=1)
    assert torch.equal(found.float(), rows.dequantize())


def run_assembly(text: str, units: Tensor, operand: Tensor) -> Tensor:
    """What a few instructions of PTX make of pairs of 16 bits: bfloat16 [n, 2] of int [n] and bfloat16 [n, 2]."""
    registers = {"$1": units.to(torch.int64), "$2": operand.contiguous().view(torch.int32).to(torch.int64).flatten()}
    full = (1 << 32) - 1

    def value(word: str) -> Tensor | int:
        return registers[word] if word in registers else int(word, 0)

    for line in text.strip("{} ").split(";"):
        name, _, rest = line.strip().partition(" ")
        to, *words = [word.strip() for word in rest.split(",")]
        if name == "shl.b32":
            registers[to] = value(words[0]) << value(words[1]) & full
        elif name == "shr.u32":
            registers[to] = (value(words[0]) & full) >> value(words[1])
        elif name == "and.b32":
            registers[to] = value(words[0]) & value(words[1])
        elif name == "mov.b32":
            registers[to] = torch.full_like(registers["$1"], value(words[0]))
        elif name == "lop3.b32":
            assert words[3] == "0xEA"
            registers[to] = value(words[0]) & value(words[1]) | value(words[2])
        elif name == "fma.rn.bf16x2":
            halves = [value(word).to(torch.int32).view(torch.bfloat16).view(-1, 2).double() for word in words]
            return (halves[0] * halves[1] + halves[2]).to(torch.bfloat16)
        else:
            assert name in (".reg", "")
    raise AssertionError(text)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=spelled)
def test_the_assembly_that_the_interpreter_does_not_run(quantizer: TensorQuantizer) -> None:
    """Every code at every place of both of two units, all other bits set or not."""
    from mxrot.kernels.fused.packed_rows import RowLayout, _assembly

    layout, element = RowLayout.of(quantizer, 128), quantizer.format.element
    assert layout is not None
    codes = torch.tensor([code for code, value in enumerate(element.values) if math.isfinite(value)])
    values = torch.tensor([element.values[code] for code in codes], dtype=torch.float64)
    for place in range(16 // layout.bits):
        assembly, moved = _assembly(place, layout.bits, layout.fraction), layout.bits * place
        others = 0xFFFF & ~(((1 << layout.bits) - 1) << moved)
        for background in (0, others):
            low, high = codes << moved | background, codes.flip(0) << moved | background
            pairs = torch.stack([values, values.flip(0)], dim=1)
            if layout.is_integer:
                operand, expected = torch.full((len(codes), 2), -130.0), pairs - 2
            else:
                operand = torch.full((len(codes), 2), 2.0**100)
                expected = pairs * 2.0 ** (100 - 126 - layout.min_exponent)
            found = run_assembly(assembly, low | high << 16, operand.to(torch.bfloat16))
            assert torch.equal(found.double(), expected), (place, background)


def test_scales_of_keys() -> None:
    """A score that is exact: one column of the query against each code, where another token has the score 0."""
    for quantizer in (QUANTIZERS[0], QUANTIZERS[1]):
        cached = filled(quantizer, quantizer, (1, 1, 2, 64))
        cached.keys.parts["scale"][:, :, 0] = 127
        cached.keys.codes[:, :, 1] = 0
        query = torch.zeros(1, 1, 1, 64, device=DEVICE)
        for column in (0, 3, 31, 32, 62):
            query.zero_()[..., column] = 1.5
            assert_is_attention(fused_attention(query, cached, 2), query, cached, 2)


def test_no_sequences() -> None:
    cached = empty(QUANTIZERS[0], QUANTIZERS[0], (0, 2, 3, 64))
    assert fused_attention(random(0, 4, 1, 64), cached, 3).shape == (0, 4, 1, 64)


@pytest.mark.parametrize("pairs", [1, 8, 64, 256, 4096])
@pytest.mark.parametrize("tokens", [1, 63, 1024, 16384, 131072])
@pytest.mark.parametrize("processors", [1, 108, 132])
def test_tiles_are_what_the_kernels_take(pairs: int, tokens: int, processors: int) -> None:
    from mxrot.kernels.fused.cached_attention import LEAST_TOKENS, MOST_SPLITS, choose_tile

    for is_wide in (False, True):
        tile = choose_tile(pairs, tokens, processors, is_wide)
        assert tile.tokens == LEAST_TOKENS and 1 <= tile.splits <= MOST_SPLITS
        # No program is left without a token, unless rounding up left it so.
        assert (tile.splits - 1) * tile.tokens < tokens


def test_sums_over_few_tokens_are_refused_on_matrix_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton gives wrong ones."""
    module = importlib.import_module("mxrot.kernels.fused.cached_attention")
    cached = filled(QUANTIZERS[0], QUANTIZERS[0], (1, 1, 16, 64))
    monkeypatch.setattr(module, "_operands", lambda query: (1, module.tl.bfloat16))
    with pytest.raises(AssertionError):
        module.attend_by_tiles(random(1, 1, 1, 64), cached, 16, None, 0.125, None, module.Tile(16, 1))


def test_what_the_kernels_read() -> None:
    from mxrot.kernels.fused.packed_rows import RowLayout

    assert all(RowLayout.of(quantizer, 128) is not None for quantizer in (*QUANTIZERS, *OTHER_RULES))
    others = ["mxfp6_e2m3", "mxint8", "nvfp4", "amxfp4", "int4_g32", "int8_row"]
    assert not any(RowLayout.of(TensorQuantizer.of(name), 128) for name in others)
    assert RowLayout.of(TensorQuantizer.of("mxfp4", "x3"), 128) is None
    assert RowLayout.of(TensorQuantizer.of("int4_g128_asym"), 64) is None


def test_without_a_gpu_plain_code_runs() -> None:
    cached, same = (filled(QUANTIZERS[0], QUANTIZERS[2], (1, 2, 7, 64), room=1) for _ in range(2))
    query, key, value = random(1, 4, 1, 64), random(1, 2, 1, 64, seed=4), random(1, 2, 1, 64, seed=5)
    assert decodes_packed(query, cached) == (DEVICE == "cuda")
    turned = append_tokens(query, key, value, cached, 7)
    plain_append_tokens(query, key, value, same, 7)
    assert torch.equal(turned, query) and same_bits(cached, same)
    found = decode_attention(query, cached, 8, None, 0.125)
    assert_is_attention(found, query, cached, 8)


ON_HARDWARE = [  # few, because each is compiled
    *((QUANTIZERS[index], torch.bfloat16, 128, 4, 1000, False) for index in (0, 1, 3, 5)),
    *((QUANTIZERS[index], torch.float16, 64, 3, 77, True) for index in (0, 4)),
    (QUANTIZERS[0], torch.float32, 64, 4, 130, True),
    (QUANTIZERS[0], torch.bfloat16, 256, 32, 300, True),
]


Arguments = tuple[Tensor, CachedTokens, int, Tensor | None]


def case_on_hardware(
    quantizer: TensorQuantizer, dtype: torch.dtype, width: int, group: int, length: int, is_masked: bool
) -> Arguments:
    """Queries, what they attend to, how many tokens, and which are seen: those at the edges matter most to some."""
    cached = filled(quantizer, quantizer, (2, 2, length, width), room=9)
    query = random(2, 2 * group, 1, width).to(dtype)
    alike = query.float()[:, ::group]
    alike = alike * (10 * width**0.5 / alike.norm(dim=-1, keepdim=True))
    for token in (0, length // 2 - 1, length // 2, length - 1):
        plain_append_tokens(alike, alike, random(2, 2, 1, width, seed=token), cached, token)
    visible = torch.arange(length, device=DEVICE) >= torch.tensor([[0], [length // 2]], device=DEVICE)
    return query, cached, length, visible if is_masked else None


def faults(
    query: Tensor, cached: CachedTokens, length: int, visible: Tensor | None
) -> dict[str, tuple[Arguments, dict[str, float]]]:
    """What a kernel may get wrong: what `rounded_attention` gives for these instead."""
    seen = torch.ones(len(query), length, dtype=torch.bool, device=DEVICE) if visible is None else visible
    place = torch.arange(length, device=DEVICE)
    longer = None if visible is None else pad(visible, (0, 1), value=True)
    scale, parts = cached.values.parts["scale"], dict(cached.values.parts)
    parts["scale"] = scale * 2 if scale.is_floating_point() else scale + 1
    doubled = CachedTokens(cached.keys, TokenRows(cached.values.quantizer, cached.values.codes, parts))
    found: dict[str, tuple[Arguments, dict[str, float]]] = {
        "the last token is left out": ((query, cached, length, seen & (place < length - 1)), {}),
        "one more token": ((query, cached, length + 1, longer), {}),
        "a tile is left out": ((query, cached, length, seen & (place // 32 != length // 64)), {}),
        "scores are doubled": ((query, cached, length, visible), {"scaling": 2 * query.shape[-1] ** -0.5}),
        "values are doubled": ((query, doubled, length, visible), {}),
        "the head before": ((query.roll(1, dims=1), cached, length, visible), {}),
    }
    if visible is not None:
        found["the mask begins late"] = (query, cached, length, visible & visible.roll(1, dims=1)), {}
        found["the mask begins early"] = (query, cached, length, visible | visible.roll(-1, dims=1)), {}
    if query.dtype == torch.float16:
        found["numbers of one part"] = (query, cached, length, visible), {"parts": 1}
    return found


@pytest.mark.parametrize(
    ("quantizer", "dtype", "width", "group", "length", "is_masked"),
    [case for case in ON_HARDWARE if case[1] != torch.float32],
    ids=spelled,
)
def test_the_bound_holds_how_the_kernel_rounds_and_no_fault(
    quantizer: TensorQuantizer, dtype: torch.dtype, width: int, group: int, length: int, is_masked: bool
) -> None:
    """On matrix hardware, as it is documented: Triton's interpreter rounds nothing."""
    arguments = case_on_hardware(quantizer, dtype, width, group, length, is_masked)
    expected, bound = exact_attention(*arguments, on_matrix_hardware=True)
    assert ((rounded_attention(*arguments).double() - expected).abs() <= bound).all()
    for name, (others, options) in faults(*arguments).items():
        found = rounded_attention(*others, **options).double()
        assert not ((found - expected).abs() <= bound).all(), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("quantizer", "dtype", "width", "group", "length", "is_masked"), ON_HARDWARE, ids=spelled)
def test_on_matrix_hardware(
    quantizer: TensorQuantizer, dtype: torch.dtype, width: int, group: int, length: int, is_masked: bool
) -> None:
    query, cached, _, visible = case_on_hardware(quantizer, dtype, width, group, length, is_masked)
    assert decodes_packed(query, cached)
    found = decode_attention(query, cached, length, visible, width**-0.5)
    assert_is_attention(found, query, cached, length, visible)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_recorded_step_goes_on() -> None:
    """A CUDA graph whose position moves on the device writes and reads what single calls do."""
    width, quantizer = 128, QUANTIZERS[0]
    T = random_orthogonal(8, width, torch.Generator().manual_seed(0)).to(DEVICE)
    recorded, single = (empty(quantizer, quantizer, (2, 8, 300, width), CacheMatrices(T, T.float())) for _ in range(2))
    query, key, value = (torch.empty(2, heads, 1, width, device=DEVICE, dtype=torch.bfloat16) for heads in (32, 8, 8))
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step() -> Tensor:
        turned = append_tokens(query, key, value, recorded, position)
        return decode_attention(turned, recorded, position, None, width**-0.5)

    for x in (query, key, value):
        x.normal_()
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for token in range(300):
        for x in (query, key, value):
            x.normal_()
        position.fill_(token)
        graph.replay()
        turned = append_tokens(query, key, value, single, token)
    assert same_bits(recorded, single)
    assert_is_attention(out, turned, single, 300)
