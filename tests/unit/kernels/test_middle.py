"""Middle rows of E5M2 times packed MXFP4 weights: against the plain twin, float64, every code, scale and input."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import (
    PackedRows,
    across_blocks,
    lift_exponents,
    out_of_blocks,
    plain_middle_product,
    plain_rotate_quantize_e5m2,
    plain_rotate_quantize_packed,
)
from mxrot.transforms.base import random_orthogonal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@dataclasses.dataclass(frozen=True)
class Weights:
    codes: Tensor
    scales: Tensor
    exponents: Tensor

    @classmethod
    def of(cls, packed: PackedRows) -> Weights:
        exponents, outside = lift_exponents(packed.codes, packed.scales)
        assert not int(outside)
        return cls(packed.codes.to(DEVICE), packed.scales.to(DEVICE), exponents.to(DEVICE))

    def values(self) -> Tensor:
        scales = BlockScales(self.scales, FORMAT.scale)
        return QTensor.from_packed(self.codes, scales, FORMAT).dequantize(torch.float64)


def weights(rows: int, columns: int, seed: int) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    return Weights.of(plain_rotate_quantize_packed(w, None, FORMAT, FORMAT.rule()))


def inputs(rows: int, columns: int, seed: int) -> Tensor:
    """E5M2, in the order of columns."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp(2 * torch.randn(rows, columns, generator=generator))
    return plain_rotate_quantize_e5m2(x, None, FORMAT, FORMAT.rule()).to(DEVICE)


def ordered(x: Tensor) -> Tensor:
    return across_blocks(x.view(torch.uint8)).view(x.dtype)


def product(x: Tensor, w: Weights, dtype: torch.dtype = torch.float32, tile: tuple[int, ...] = ()) -> Tensor:
    from mxrot.kernels.fused.middle import Tile, middle_product

    chosen = Tile(*tile) if tile else None
    return middle_product(ordered(x), w.codes, w.scales, w.exponents, dtype, chosen)


def assert_is_product(found: Tensor, x: Tensor, w: Weights, step: int = 128) -> None:
    """Products are exact in float32; a sum of K of them, in any order, is off by K 2^-24 of their magnitudes at most,
    twice that where sums are cut off. Hopper's matrix hardware adds 32 FP8 products to a sum at a time, each of these
    33 cut off to 13 bits of the largest, until a step is done."""
    a, b = x.double(), w.values()
    each = a.shape[-1] * 2.0**-23 + (0 if DEVICE == "cpu" else step / 32 * 33 * 2.0**-13)
    exact, bound = a @ b.mT, each * (a.abs() @ b.abs().mT)
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= bound).all()


def test_the_order_of_inputs() -> None:
    x = torch.arange(512).view(2, 256)
    found = across_blocks(x)
    assert found[0, :20].tolist() == [0, 1, 2, 3, 32, 33, 34, 35, 64, 65, 66, 67, 96, 97, 98, 99, 4, 5, 6, 7]
    assert found[0, 124:129].tolist() == [124, 125, 126, 127, 128]
    assert torch.equal(out_of_blocks(found), x) and torch.equal(across_blocks(x[1]), found[1])


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("sharing", ["none", "site", "block"])
def test_the_quantizer_writes_that_order(rows: int, sharing: str) -> None:
    from mxrot.kernels.fused.rotate_quantize import rotate_quantize_e5m2

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 384, generator=generator).to(DEVICE)
    count = {"none": 0, "site": 1, "block": 12}[sharing]
    matrices = random_orthogonal(count, 32, generator).to(DEVICE) if count else None
    plain = rotate_quantize_e5m2(x, matrices, FORMAT, FORMAT.rule())
    found = rotate_quantize_e5m2(x, matrices, FORMAT, FORMAT.rule(), are_across_blocks=True)
    assert torch.equal(found.view(torch.uint8), across_blocks(plain.view(torch.uint8)))


@pytest.mark.parametrize("count", [1, 17, 33, 300])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (37, 384), (101, 1152)])
def test_it_is_the_product(count: int, rows: int, columns: int) -> None:
    x, w = inputs(count, columns, 0), weights(rows, columns, 1)
    assert_is_product(product(x, w), x, w)
    assert_is_product(plain_middle_product(ordered(x), w.codes, w.scales, w.exponents, torch.float32), x, w)


TILES = [
    (16, 64, 128, 1),
    (64, 128, 128, 1),
    (32, 128, 128, 3, 8),
    (128, 64, 256, 2, 4, 3),
    (32, 64, 128, 16),
    (256, 128, 256, 4, 8, 2),
    (64, 64, 512, 1, 4, 2, True),
]


@pytest.mark.parametrize("tile", TILES)
def test_every_kind_of_tile(tile: tuple[int, ...]) -> None:
    x, w = inputs(71, 1024, 0), weights(139, 1024, 1)
    found, again = (product(x, w, tile=tile) for _ in range(2))
    assert_is_product(found, x, w, step=1024 if tile[-1] is True else tile[2])
    assert torch.equal(again, found)


def test_the_width_of_a_model() -> None:
    x, w = inputs(40, 4096, 0), weights(70, 4096, 1)
    assert_is_product(product(x, w), x, w)


@pytest.mark.parametrize("tile", [(16, 64, 128, 1), (16, 128, 256, 2, 8, 3)])
def test_sums_that_float32_holds_are_the_twins_bit_for_bit(tile: tuple[int, ...]) -> None:
    """Inputs of 0 and 1 and codes under one scale: sums are multiples of 1/2 below 2^13."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (75, 256), generator=generator, dtype=torch.uint8)
    w = Weights.of(PackedRows(codes, torch.full((75, 16), 120, dtype=torch.uint8)))
    x = torch.randint(2, (19, 512), generator=generator).to(torch.float8_e5m2).to(DEVICE)
    twin = plain_middle_product(ordered(x), w.codes, w.scales, w.exponents, torch.float32)
    assert torch.equal(product(x, w, tile=tile), twin)


def test_every_code_at_every_place() -> None:
    """Exhaustive: each code, at each place of 128, against 1."""
    ones = torch.eye(128).to(torch.float8_e5m2).to(DEVICE)
    codes = torch.arange(16, dtype=torch.uint8).repeat(8)
    turned = torch.stack([codes.roll(turn) for turn in range(16)])
    w = Weights.of(PackedRows(turned[:, ::2] | turned[:, 1::2] << 4, torch.full((16, 4), 127, dtype=torch.uint8)))
    expected = torch.tensor(FORMAT.element.values)[turned.long()]
    assert torch.equal(product(ones, w).cpu(), expected.T)


def test_every_input() -> None:
    """Exhaustive: each finite E5M2 number against 1."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    numbers = numbers[numbers.float().isfinite()].view(torch.uint8)[:, None].repeat(1, 128)
    codes = torch.zeros(128, 64, dtype=torch.uint8)
    place = torch.arange(128)
    codes[place, place // 2] = torch.where(place % 2 == 0, 0x02, 0x20).to(torch.uint8)
    w = Weights.of(PackedRows(codes, torch.full((128, 4), 127, dtype=torch.uint8)))
    x = numbers.view(torch.float8_e5m2).to(DEVICE)
    assert torch.equal(product(x, w), x.float())


@pytest.mark.parametrize("below", range(15))
@pytest.mark.parametrize("split", [1, 2])
def test_every_scale(below: int, split: int) -> None:
    """All from 2^-112 to 2^127 that a row can have, in a block `below` its largest one. Blocks of zeros beside may
    have any."""
    bytes_ = torch.arange(15, 254)
    codes = torch.zeros(len(bytes_), 128, dtype=torch.uint8)
    codes[:, 0], codes[:, 16 * 5] = 0x72, 0x91
    scales = torch.stack([bytes_.flip(0)] * 8, dim=1)
    scales[:, 0], scales[:, 5] = bytes_, bytes_ - below
    w = Weights.of(PackedRows(codes, scales.to(torch.uint8)))
    x = torch.zeros(4, 256)
    x[0, 0], x[1, 1], x[2, 160], x[3, 161] = 1, 1, 1, 1
    expected = torch.exp2(bytes_ - 127.0) * torch.tensor([1.0, 6.0, 0.5 * 2.0**-below, -0.5 * 2.0**-below])[:, None]
    found = product(x.to(torch.float8_e5m2).to(DEVICE), w, tile=(16, 64, 128, split))
    assert torch.equal(found.cpu(), expected)


def test_inputs_that_are_nan_or_infinite() -> None:
    x, w = inputs(3, 256, 0), weights(5, 256, 1)
    values = x.float()
    values[1, 40], values[2, 3] = float("nan"), float("inf")
    found = product(values.to(torch.float8_e5m2), w, tile=(16, 64, 128, 2))
    assert found[0].isfinite().all() and found[1].isnan().all() and not found[2].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("split", [1, 2])
def test_types_leading_shapes_and_no_rows(dtype: torch.dtype, split: int) -> None:
    x, w = inputs(6, 256, 0), weights(5, 256, 1)
    tile = (16, 64, 128, split)
    found = product(x.view(2, 3, -1), w, dtype, tile)
    assert found.shape == (2, 3, 5) and found.dtype == dtype
    # Triton's interpreter cuts float32 off instead of rounding it.
    torch.testing.assert_close(found.view(6, 5).float(), product(x, w, tile=tile), rtol=2.0**-7, atol=0)
    assert product(x[:0], w).shape == (0, 5)


def test_a_step_that_does_not_divide() -> None:
    x, w = inputs(2, 384, 0), weights(3, 384, 1)
    with pytest.raises(ValueError, match="256 columns does not divide 384"):
        product(x, w, tile=(16, 64, 256, 1))


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (4096, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("count", [17, 64, 128, 1000])
def test_candidates_are_what_the_kernel_takes(count: int, rows: int, columns: int, processors: int) -> None:
    from mxrot.kernels.fused.middle import candidates, default_tile

    found = candidates(count, rows, columns // 32, processors)
    assert found[0] == default_tile(count, rows, columns // 32, processors) and len(set(found)) == len(found) > 3
    for tile in found:
        assert tile.rows % (16 * tile.warps) == 0 and tile.inputs in (16, 32, 64, 128, 256)
        assert columns % tile.step == 0 and 1 <= tile.split <= max(1, columns // tile.step)


def permuted(a: int, b: int, selectors: int) -> int:
    """PRMT: of the eight bytes of `b` and `a` those selected, or eight times their sign."""
    found = 0
    for place in range(4):
        selector = selectors >> 4 * place & 15
        byte = (a | b << 32) >> 8 * (selector & 7) & 255
        found |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * place
    return found


def third_or_both(a: int, b: int, c: int, table: int) -> int:
    """LOP3 with the table of (a & b) | c, and no other."""
    assert table == 0xEA
    return a & b | c


INSTRUCTIONS: dict[str, Callable[..., int]] = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "prmt.b32": permuted,
    "lop3.b32": third_or_both,
}


def run_assembly(text: str, operands: dict[str, int]) -> int:
    """What `$0` is after these instructions of PTX, on 32 bits."""
    registers = dict(operands)
    for line in text.strip("{} \n").split(";"):
        name, _, rest = line.strip().partition(" ")
        if name and name != ".reg":
            to, *names = (part.strip() for part in rest.split(","))
            values = (registers[each] if each in registers else int(each, 0) for each in names)
            registers[to] = INSTRUCTIONS[name](*values)
    return registers["$0"]


@pytest.mark.parametrize("exponent", [-13, -8, 0, 6, 13])
def test_the_assembly_that_the_interpreter_leaves_out(exponent: int) -> None:
    """Exhaustive: each code at each place, beside every code, under tables of `_table`'s arithmetic."""
    from mxrot.kernels.fused import middle

    low = ((exponent + 15) * 0x04040400 + 0x02000000 - 0x0400) & 0xFFFFFFFF
    high = (exponent + 15) * 0x04040404 + 0x0A080604
    values = torch.tensor(FORMAT.element.values, dtype=torch.float64) * 2.0**exponent
    expected = values.to(torch.float8_e5m2).view(torch.uint8).tolist()
    assert (values.to(torch.float8_e5m2).double() == values).all()
    for place in range(4):
        for one in range(16):
            for other in range(16):
                codes = [other] * 4
                codes[place] = one
                word = sum(code << 4 * n for n, code in enumerate(codes)) | 0xA5C30000
                found = run_assembly(middle._LOOK_UP.value, {"$1": word, "$5": low, "$9": high})
                assert [found >> 8 * n & 255 for n in range(4)] == [expected[code] for code in codes]


COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from mxrot.kernels.fused.middle import _middle as kernel
names = kernel.arg_names
types = ["*fp8e5", "*i32", "*i32", "*i32", "*bf16", "i32", "i32", "i32", "i32"]
constants = dict(ASSEMBLY=True, FAST=False, WHOLE=True, INPUTS=64, ROWS=64, CHUNKS=1, STAGES=4, WARPS=4)
signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
aligned = {(n,): [["tt.divisibility", 16]] for n in range(5)}
values = {(names.index(name),): value for name, value in constants.items()}
source = triton.compiler.ASTSource(kernel, signature, values, aligned)
options = {"num_warps": 4, "num_stages": 4}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
text = compiled.asm["ttgir"]
layouts = dict(re.findall(r"^(#\\w+) = (.*)$", text, re.M))
dot, = re.findall(r"warp_group_dot .* : (tensor<\\S+, .*?>>) \\*", text)
assert "f8E5M2" in dot and "dot_op<{opIdx = 0" in dot, dot  # in registers
numbers, = re.findall(r"elementwise_inline_asm .* -> tensor<256x8x4xf8E5M2, (#\\w+)>", text)
assert "register = [[0, 0, 1], [0, 0, 2]," in layouts[numbers], layouts[numbers]  # four of a word side by side
ptx = compiled.asm["ptx"]
products = re.findall(r"wgmma\\.mma_async\\S*m64n64k32\\.f32\\.e5m2\\.e5m2", ptx)
assert len(products) == 4, products
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_is_compiled_for_hopper_with_weights_in_registers() -> None:
    """By the compiler alone, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
