"""Inputs in 16 bits times weights in codes: the kernel and the plain twin against float64, every code and scale."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from mxrot.formats import BlockScales, QTensor, get_format, quantize
from mxrot.kernels.coded_weights import MOST_ROWS, PATH, READ_PACKED, choose_coded, coded_product
from mxrot.kernels.fixed_rows import invariant_rows
from mxrot.kernels.fused import coded_weights as module
from mxrot.kernels.fused.coded_weights import coded_product as fused
from mxrot.kernels.fused.coded_weights import codes_of
from mxrot.kernels.plain import coded_weights
from mxrot.kernels.plain.coded_weights import CodedWeight, plain_coded_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter is NumPy, which reports what IEEE arithmetic does silently.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


def drawn(rows: int, columns: int, name: str, seed: int = 0) -> CodedWeight:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator) * torch.exp(torch.randn(rows, 1, generator=generator))
    found = quantize(w, get_format(name))
    return CodedWeight(found.packed().to(DEVICE), found.scales.stored.to(DEVICE), found.format)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def exact(x: Tensor, weight: CodedWeight) -> tuple[Tensor, Tensor]:
    """The product in float64, and the sum of the magnitudes of its terms."""
    values = QTensor.from_packed(weight.codes, BlockScales(weight.scales, weight.format.scale), weight.format)
    wide = values.dequantize(torch.float64)
    return x.double() @ wide.mT, x.double().abs() @ wide.abs().mT


def assert_is_close(found: Tensor, x: Tensor, weight: CodedWeight) -> None:
    """Products are exact: K roundings of float32 at most, each relative to the sum of the magnitudes so far."""
    expected, magnitudes = exact(x, weight)
    assert found.shape == expected.shape and found.isfinite().all()
    assert ((found.double() - expected).abs() <= x.shape[-1] * 2.0**-24 * magnitudes).all()


@pytest.mark.parametrize("name", READ_PACKED)
@pytest.mark.parametrize(("rows", "columns", "count"), [(1, 32, 1), (3, 160, 70), (17, 128, 64), (40, 96, 65)])
def test_kernel_gives_the_exact_product_up_to_the_order_of_sums(name: str, rows: int, columns: int, count: int) -> None:
    weight, x = drawn(count, columns, name), inputs(rows, columns)
    assert_is_close(fused(x, weight, torch.float32), x, weight)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "mxfp6_e2m3", "mxint8"])
def test_plain_twin_gives_the_exact_product_however_many_rows_it_writes_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = drawn(70, 96, name), inputs(2, 5, 96)
    assert_is_close(plain_coded_product(x, weight), x, weight)
    monkeypatch.setattr(coded_weights, "WRITTEN_OUT", 96 * 8)
    assert_is_close(plain_coded_product(x, weight), x, weight)
    assert_is_close(coded_product(x, weight, torch.float32), x, weight)


@pytest.mark.parametrize("name", READ_PACKED)
def test_every_code_under_every_scale_that_keeps_its_bits(name: str) -> None:
    format = get_format(name)
    numbers = torch.arange(2**format.bits, dtype=torch.uint8)
    values = format.element.decode(numbers, torch.float32)
    numbers = numbers[values.isfinite()]
    codes = numbers.repeat(-(-32 // len(numbers)) + 1)[: 32 * (len(numbers) // 32 + 1)].view(-1, 32)
    scales = torch.arange(67, 188, dtype=torch.uint8)  # 2^-60 to 2^60
    each = codes.repeat(len(scales), 1)
    found = QTensor(each, BlockScales(scales.repeat_interleave(len(codes))[:, None], format.scale), format)
    weight = CodedWeight(found.packed().to(DEVICE), found.scales.stored.to(DEVICE), format)
    one = torch.eye(32, dtype=torch.bfloat16, device=DEVICE)
    assert torch.equal(fused(one, weight, torch.float32).cpu().mT, found.dequantize())


@pytest.mark.parametrize(("name", "stored"), [("mxfp8_e4m3", 188), ("mxfp4", 254), ("mxfp4", 255), ("mxint8", 255)])
def test_rows_with_a_scale_that_the_kernel_cannot_apply_are_nan_and_no_others(name: str, stored: int) -> None:
    weight = drawn(5, 256, name)
    weight.scales[3, 6] = stored
    found = fused(inputs(2, 256), weight, torch.float32)
    assert found[:, 3].isnan().all() and found[:, [0, 1, 2, 4]].isfinite().all()


def test_a_fixed_tile_gives_a_row_the_bits_that_it_has_alone() -> None:
    weight, x = drawn(65, 160, "mxfp8_e4m3"), inputs(18, 160)
    together = fused(x, weight, torch.bfloat16, is_fixed=True)
    alone = torch.cat([fused(row[None], weight, torch.bfloat16, is_fixed=True) for row in x])
    assert torch.equal(together, alone)


def test_formats_that_the_kernel_reads_are_those_it_is_chosen_for() -> None:
    names = ("mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")
    assert tuple(name for name in names if codes_of(get_format(name)) is not None) == READ_PACKED


def test_choice_says_why_weights_are_written_out() -> None:
    weight, gpu = drawn(4, 32, "mxfp8_e4m3"), torch.device("cuda")
    assert choose_coded(1, weight, torch.bfloat16, gpu).path == PATH
    assert choose_coded(MOST_ROWS, weight, torch.bfloat16, gpu).path == PATH
    assert f"more than {MOST_ROWS}" in choose_coded(MOST_ROWS + 1, weight, torch.bfloat16, gpu).reason
    with invariant_rows():
        assert choose_coded(MOST_ROWS + 1, weight, torch.bfloat16, gpu).path == PATH
    assert "not in float16" in choose_coded(1, weight, torch.float16, gpu).reason
    assert "not mxfp6_e2m3" in choose_coded(1, drawn(4, 32, "mxfp6_e2m3"), torch.bfloat16, gpu).reason
    assert "not on cpu" in choose_coded(1, weight, torch.bfloat16, torch.device("cpu")).reason


def test_no_rows_and_no_weights() -> None:
    weight = drawn(4, 32, "mxfp4")
    assert fused(inputs(0, 32), weight, torch.bfloat16).shape == (0, 4)
    assert coded_product(inputs(2, 0, 32), weight, torch.bfloat16).shape == (2, 0, 4)


def _bfloat16(bits: int) -> Fraction:
    return Fraction(float(torch.tensor(bits & 0xFFFF, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)))


def _both(compute: Any, *operands: int) -> int:
    """For each half of 32 bits; what is computed must be a bfloat16 number."""
    found = 0
    for shift in (0, 16):
        value = float(compute(*(_bfloat16(operand >> shift) for operand in operands)))
        half = torch.tensor(value, dtype=torch.bfloat16)
        assert float(half) == value
        found |= (int(half.view(torch.int16)) & 0xFFFF) << shift
    return found


INSTRUCTIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "shr.u32": lambda a, by: a >> by,
    "lop3.b32": lambda a, b, c, table: (a & b) | c if table == 0xEA else None,
    "fma.rn.bf16x2": lambda a, b, c: _both(lambda x, y, z: x * y + z, a, b, c),
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


@pytest.mark.parametrize("exponent", [-40, 0, 3])
def test_the_assembly_of_integers_that_the_interpreter_leaves_out(exponent: int) -> None:
    """Each code at each place, beside others in the unit and in the other unit."""
    factor = int(torch.tensor(2.0**exponent, dtype=torch.bfloat16).view(torch.int16)) & 0xFFFF
    for place, text in enumerate((module._LOWER.value, module._UPPER.value)):
        for code in range(256):
            other = (37 * code + 11) % 256
            bytes_of = [other, other, other, other]
            bytes_of[place], bytes_of[2 + place] = code, 255 - code
            word = sum(byte << 8 * n for n, byte in enumerate(bytes_of))
            found = run_assembly(text, {"$1": word, "$2": factor | factor << 16})
            expected = [(value - 256 if value > 127 else value) * 2.0**exponent for value in (code, 255 - code)]
            assert [float(_bfloat16(found)), float(_bfloat16(found >> 16))] == expected


COMPILED = """
import re, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from mxrot.formats import get_format
from mxrot.kernels.fused import coded_weights as module
kernel = module._coded_product
names = kernel.arg_names
types = ["*bf16", "*i16", "*u8", "*bf16", "i32", "i32", "i32"]
for name, counts in {"mxint8": (1, 128), "mxfp8_e4m3": (1,), "mxfp4": (1,)}.items():
    for rows in counts:
        tile, read = module.tile_for(rows), module.codes_of(get_format(name))
        constants = dict(zip(("BITS", "FRACTION", "MIN_EXPONENT"), read))
        constants |= dict(WEIGHTS=tile.weights, INPUTS=tile.inputs, COLUMNS=module.COLUMNS, DTYPE=tl.bfloat16)
        constants |= dict(STAGES=tile.stages)
        signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
        aligned = {(n,): [["tt.divisibility", 16]] for n in (0, 1, 2, 3, 5, 6)}
        values = {(names.index(key),): value for key, value in constants.items()}
        source = triton.compiler.ASTSource(kernel, signature, values, aligned)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        dot, = re.findall(r"warp_group_dot .* : (tensor<\\S+, .*?>>) \\*", compiled.asm["ttgir"])
        assert "bf16" in dot and "dot_op<{opIdx = 0" in dot, dot  # codes become numbers in registers
        assert compiled.metadata.shared <= 227 * 1024 and "cp.async" in compiled.asm["ptx"]
print("compiled")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_it_is_compiled_for_hopper_with_weights_in_registers() -> None:
    """By the compiler alone, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "compiled", done.stderr
