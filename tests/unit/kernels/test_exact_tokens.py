"""Tokens read as they came beside packed ones, in one attention: kernels and their twin against float64."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mxrot.formats import TensorQuantizer
from mxrot.kernels import CachedTokens, CacheMatrices, ExactTokens, TokenRows, decode_attention, plain_append_tokens
from mxrot.kernels.plain import plain_decode_attention
from mxrot.kernels.plain.cached_attention import times_each
from mxrot.transforms.base import random_orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {name: TensorQuantizer.of(name) for name in ("mxfp4", "mxfp8_e4m3", "int4_row_asym", "int2_g32_asym")}

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered:RuntimeWarning")


class Case:
    """Random tokens of a few sequences, some of them packed and some kept; and float64 attention to them."""

    def __init__(
        self,
        length: int,
        first: int,
        last: int,
        *,
        width: int = 64,
        group: int = 2,
        begins: tuple[int, ...] = (0, 0),
        ring: int | None = None,
        skipped: int = 0,
        format: str = "mxfp4",
        dtype: torch.dtype = torch.float32,
        transformed: bool = False,
        heads: int = 2,
    ) -> None:
        generator = torch.Generator().manual_seed(length + 1000 * first + last)
        batch, room = len(begins), 7

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.length, self.first, self.last, self.group = length, first, last, group
        self.query = random(batch, heads * group, 1, width) * 3
        self.key, self.value = (random(batch, heads, length, width) for _ in range(2))
        matrices = CacheMatrices()
        if transformed:
            T, U = (random_orthogonal(heads, width, generator).to(DEVICE) for _ in range(2))
            matrices = CacheMatrices(T, T, U, U.mT.contiguous())
        rows = [TokenRows.empty(FORMATS[format], batch, heads, length + room, width, DEVICE) for _ in range(2)]
        for each in rows:
            for tensor in (each.codes, *each.parts.values()):
                tensor.view(torch.uint8).fill_(255)
        self.cached = CachedTokens(rows[0], rows[1], matrices)
        self.turned = plain_append_tokens(self.query, self.key, self.value, self.cached, 0)
        self.begins = torch.tensor(begins, device=DEVICE)
        self.exact = self._exact(ring or last + 5, skipped, 11)

    def _exact(self, ring: int, skipped: int, shift: int, spare: int = 3) -> ExactTokens:
        """Rows that no token has hold NaN."""
        places = torch.arange(max(0, self.length - ring), self.length, device=DEVICE)
        index = self.begins[:, None] + torch.arange(self.first, device=DEVICE)
        there = ((index >= 0) & (index < self.length))[:, None, :, None]
        recent, leading = [], []
        for x in (self.key, self.value):
            rows = x.new_full((*x.shape[:2], ring, x.shape[3]), math.nan)
            rows[:, :, (places + shift) % ring] = x[:, :, places]
            recent.append(rows)
            at = index.clamp(0, self.length - 1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            rows = x.new_full((*x.shape[:2], self.first + spare, x.shape[3]), math.nan)
            rows[:, :, : self.first] = torch.where(there, x.gather(2, at), math.nan)
            leading.append(rows)
        return ExactTokens(
            self.query,
            self.first,
            self.last,
            (recent[0], recent[1]) if self.last else None,
            shift,
            (leading[0], leading[1]) if self.first else None,
            self.begins + skipped if self.first else None,
            skipped,
        )

    def check(self, found: Tensor, visible: Tensor | None = None, softcap: float | None = None) -> None:
        """Against float64, as far away as roundings of operands and of float32 sums allow."""
        batch, heads, _, width = self.query.shape
        scaling, places = width**-0.5, torch.arange(self.length, device=DEVICE)
        after = places - self.begins[:, None]
        is_exact = ((after >= 0) & (after < self.first)) | (places >= self.length - self.last)
        seen = torch.ones(batch, self.length, dtype=torch.bool, device=DEVICE)
        seen = seen if visible is None else visible[:, : self.length] != 0
        expected, bound = torch.zeros(2, batch, heads, 1, width, dtype=torch.float64, device=DEVICE)
        on_hardware = DEVICE == "cuda" and self.query.dtype != torch.float32
        of_p = 2.0**-9 if on_hardware and self.query.dtype == torch.bfloat16 else 2.0**-17 if on_hardware else 0.0
        has_zeros = len(self.cached.keys.parts) > 1
        of_values = 2.0**-9 if on_hardware and has_zeros else 0.0
        of_keys = of_values if self.cached.keys.parts["scale"].shape[-1] > 1 else 0.0
        own = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[self.query.dtype]
        outputs = self.cached.matrices.outputs
        packed = [x.first(self.length).dequantize().double() for x in (self.cached.keys, self.cached.values)]
        values = packed[1] if outputs is None else times_each(packed[1], outputs.double()).double()
        for b in range(batch):
            for h in range(heads):
                of = h // self.group
                k_exact, k_packed = self.key[b, of].double(), packed[0][b, of]
                q, turned = self.query[b, h, 0].double(), self.turned[b, h, 0].double()
                scores = torch.where(is_exact[b], k_exact @ q, k_packed @ turned) * scaling
                size = (k_exact.abs() @ q.abs()).maximum(k_packed.abs() @ turned.abs()).max() * scaling
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                p = scores.masked_fill(~seen[b], -math.inf).softmax(dim=-1).nan_to_num()
                v = torch.where(is_exact[b, :, None], self.value[b, of].double(), values[b, of])
                expected[b, h, 0] = p @ v
                sizes = p @ v.abs()
                if outputs is not None:  # sums of other numbers, turned back
                    sizes = sizes + (p @ packed[1][b, of].abs()) @ outputs[of].double().abs()
                each = math.expm1(2 * float(size) * (of_keys + width * 2.0**-22)) + of_p + of_values
                bound[b, h, 0] = (each + self.length * 2.0**-22 + 2.0**-18) * 1.01 * sizes
        bound = bound + own * expected.abs() + 1e-30
        assert found.shape == self.query.shape and found.dtype == self.query.dtype
        over = (found.double() - expected).abs() / bound
        assert (over <= 1).all(), float(over.max())

    def fused(
        self,
        length: int | Tensor | None = None,
        visible: Tensor | None = None,
        softcap: float | None = None,
        splits: int = 2,
    ) -> Tensor:
        from mxrot.kernels.fused.cached_attention import Tile, attend_by_tiles

        scaling, length = self.query.shape[3] ** -0.5, self.length if length is None else length
        tile = Tile(32, splits)
        return attend_by_tiles(self.turned, self.cached, length, visible, scaling, softcap, tile, self.exact)

    def plain(
        self, length: int | Tensor | None = None, visible: Tensor | None = None, softcap: float | None = None
    ) -> Tensor:
        scaling, length = self.query.shape[3] ** -0.5, self.length if length is None else length
        return plain_decode_attention(self.turned, self.cached, length, visible, scaling, softcap, self.exact)


@pytest.mark.parametrize(
    ("length", "first", "last"),
    [(70, 4, 9), (70, 0, 1), (70, 5, 0), (12, 16, 128), (1, 3, 2), (150, 40, 70), (64, 32, 32), (100, 16, 84)],
)
def test_tokens_are_read_as_they_came_where_they_are_first_or_last(length: int, first: int, last: int) -> None:
    """Also where both meet or overlap, and where nothing is left to be read from codes."""
    case = Case(length, first, last)
    for found in (case.fused(), case.plain()):
        case.check(found)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("width", "group"), [(64, 1), (128, 3), (64, 9)])
def test_formats_widths_and_groups(format: str, width: int, group: int) -> None:
    case = Case(50, 6, 13, width=width, group=group, format=format)
    for found in (case.fused(), case.plain()):
        case.check(found)


@pytest.mark.parametrize("width", [64, 128, 256])
def test_what_is_read_as_it_came_is_not_transformed(width: int) -> None:
    case = Case(45, 4, 10, width=width, transformed=True)
    for found in (case.fused(), case.plain()):
        case.check(found)


def test_left_padding() -> None:
    """Sequences begin at different places, one with the newest token, and one has no token and gets zeros."""
    case = Case(80, 5, 12, begins=(0, 30, 79, 80, 70), heads=1)
    visible = torch.arange(80, device=DEVICE) >= case.begins[:, None]
    for dtype in (torch.bool, torch.uint8):
        for found in (case.fused(visible=visible.to(dtype)), case.plain(visible=visible.to(dtype))):
            case.check(found, visible)
            assert not found[3].any()


def test_a_window_has_left_first_tokens_behind() -> None:
    """Wholly, in part, and not at all."""
    case = Case(40, 6, 8, begins=(-20, -3, 0, 2), skipped=50)
    for found in (case.fused(), case.plain()):
        case.check(found)


@pytest.mark.parametrize("ring", [9, 10, 31])
def test_rings_of_any_size_and_places_on_the_device(ring: int) -> None:
    case = Case(70, 4, 9, ring=ring)
    found, newest = case.fused(), torch.tensor([69], device=DEVICE)
    assert torch.equal(case.fused(newest), found)
    for each in (found, case.plain(newest)):
        case.check(each)


@pytest.mark.parametrize("splits", [1, 3, 256])
def test_any_sharing_out(splits: int) -> None:
    """As many as are put together at most, too."""
    case = Case(90, 3, 40, group=1, heads=1, begins=(0,))
    case.check(case.fused(splits=splits))


@pytest.mark.parametrize("cap", [2.0, 50.0])
def test_soft_caps(cap: float) -> None:
    case = Case(40, 4, 8)
    for found in (case.fused(softcap=cap), case.plain(softcap=cap)):
        case.check(found, softcap=cap)


def test_what_stands_packed_for_tokens_that_are_read_as_they_came_is_not_read() -> None:
    case = Case(70, 4, 9)
    expected = case.fused(), case.plain()
    for rows in (case.cached.keys, case.cached.values):
        for tokens in (slice(0, 4), slice(61, 70)):
            rows.codes[:, :, tokens] = 0x77
            rows.parts["scale"][:, :, tokens] = 140
    assert torch.equal(case.fused(), expected[0]) and torch.equal(case.plain(), expected[1])


def fused_append(*arguments: Any) -> Tensor:
    from mxrot.kernels.fused.append_tokens import append_tokens as fused

    return fused(*arguments)


class Kept:
    """An empty cache with tokens as they came beside it."""

    def __init__(self, first: int, last: int, batch: int, width: int = 64, heads: int = 2) -> None:
        rows = [TokenRows.empty(FORMATS["mxfp4"], batch, heads, 40, width, DEVICE) for _ in range(2)]
        self.cached, self.first, self.last = CachedTokens(rows[0], rows[1]), first, last
        self.begins = torch.full((batch,), 3, device=DEVICE)  # of a text before
        self.recent, self.leading = (
            tuple(torch.full((batch, heads, count, width), math.nan, device=DEVICE) for _ in range(2))
            for count in (last + 2, first)
        )

    def exact(self, query: Tensor) -> ExactTokens:
        return ExactTokens(
            query,
            self.first,
            self.last,
            (self.recent[0], self.recent[1]) if self.last else None,
            5,
            (self.leading[0], self.leading[1]) if self.first else None,
            self.begins if self.first else None,
        )

    @property
    def tensors(self) -> list[Tensor]:
        packed = [x for rows in (self.cached.keys, self.cached.values) for x in (rows.codes, *rows.parts.values())]
        return [*packed, self.begins, *self.recent, *self.leading]


@pytest.mark.parametrize(("first", "last"), [(3, 4), (0, 2), (5, 0)])
@pytest.mark.parametrize(("batch", "most"), [(1, 64), (5, 2)])
def test_tokens_are_kept_as_they_come(
    first: int, last: int, batch: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By kernel and twin alike, bit for bit: token after token, in sequences that begin at different places; at places
    that lie on the device and others; a second text after a first one; one sequence a program or more."""
    monkeypatch.setattr(importlib.import_module("mxrot.kernels.fused.append_tokens"), "PROGRAMS", most)
    kernel, twin = Kept(first, last, batch), Kept(first, last, batch)
    generator = torch.Generator().manual_seed(0)
    for text in range(2):
        begins = (torch.arange(batch, device=DEVICE) * 5 + text) % 7
        visible = (torch.arange(12, device=DEVICE) >= begins[:, None]) & (torch.arange(12, device=DEVICE) != 9)
        keys, values = torch.randn(2, batch, 2, 12, 64, generator=generator).to(DEVICE)
        query = torch.randn(batch, 4, 1, 64, generator=generator).to(DEVICE)
        for token in range(12):
            place: int | Tensor = token if token % 2 else torch.tensor([token], device=DEVICE)
            new = keys[:, :, token : token + 1], values[:, :, token : token + 1]
            flags = visible.to(torch.uint8) if token % 3 else visible
            fused_append(query, *new, kernel.cached, place, kernel.exact(query), flags)
            plain_append_tokens(query, *new, twin.cached, place, twin.exact(query), flags)
            for found, expected in zip(kernel.tensors, twin.tensors, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert not first or torch.equal(twin.begins, begins)
        if last:
            rows = (torch.arange(12 - last, 12, device=DEVICE) + 5) % (last + 2)
            assert torch.equal(twin.recent[1][:, :, rows], values[:, :, -last:])
        for b in range(batch) if first else ():
            begin = int(begins[b])
            count = min(first, 12 - begin)
            assert torch.equal(twin.leading[0][b, :, :count], keys[b, :, begin : begin + count])


def test_without_a_mask_a_text_begins_with_its_first_token() -> None:
    kernel, twin = Kept(2, 3, 2), Kept(2, 3, 2)
    new = torch.randn(6, 2, 2, 1, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    query = torch.zeros(2, 2, 1, 64, device=DEVICE)
    for token, x in enumerate(new):
        fused_append(query, x, -x, kernel.cached, token, kernel.exact(query))
        plain_append_tokens(query, x, -x, twin.cached, token, twin.exact(query))
    for kept in (kernel, twin):
        assert not kept.begins.any()
        assert torch.equal(torch.cat(list(new[:2]), dim=2), kept.leading[0])
        assert torch.equal(-new[5][:, :, 0], kept.recent[1][:, :, (5 + 5) % 5])


ON_HARDWARE = [  # few, because each is compiled
    ("mxfp4", torch.bfloat16, 128, 4, False, (16, 128)),
    ("int4_row_asym", torch.bfloat16, 64, 8, False, (16, 128)),
    ("mxfp4", torch.float16, 64, 3, False, (16, 128)),
    ("mxfp4", torch.float32, 128, 2, True, (16, 128)),
    ("mxfp8_e4m3", torch.float32, 256, 2, True, (16, 128)),
    ("mxfp4", torch.float32, 64, 2, False, (3, 0)),
    ("mxfp4", torch.bfloat16, 64, 2, False, (0, 5)),
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("format", "dtype", "width", "group", "transformed", "exact"), ON_HARDWARE, ids=str)
def test_on_matrix_hardware(
    format: str, dtype: torch.dtype, width: int, group: int, transformed: bool, exact: tuple[int, int]
) -> None:
    for length in (20, 300, 2000):
        options = {"begins": (0, 7), "width": width, "group": group, "format": format}
        case = Case(length, *exact, **options, dtype=dtype, transformed=transformed)
        visible = torch.arange(length, device=DEVICE) >= case.begins[:, None]
        for each in (length, torch.tensor([length - 1], device=DEVICE)):
            found = decode_attention(case.turned, case.cached, each, visible, width**-0.5, None, case.exact)
            case.check(found, visible)
