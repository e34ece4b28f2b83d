"""Grids: what the parts of a quantized tensor are, for those of the catalog and for others."""

from dataclasses import replace

import pytest
import torch
from tests.oracles.sample_blocks import bits
from tests.unit.formats.toy_grids import CODEBOOK, TWO_SCALES
from torch import Tensor

from mxrot.errors import ConfigError, NumericsError
from mxrot.formats import (
    FORMATS,
    Format,
    NamedParts,
    Parts,
    PartSpec,
    QTensor,
    TensorQuantizer,
    fake_quantize,
    get_format,
    quantize,
)

EVERY = [*FORMATS.values(), TWO_SCALES, CODEBOOK]
every = pytest.mark.parametrize("format", EVERY, ids=lambda format: format.name)
toys = pytest.mark.parametrize("format", [TWO_SCALES, CODEBOOK], ids=lambda format: format.name)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(parts: Parts) -> list[Tensor]:
    return list(parts.tensors.values())


@every
def test_parts_have_the_names_types_and_shapes_that_the_grid_says(format: Format) -> None:
    for rule in map(format.rule, format.rules):
        parts = quantize(random(6, 256), format, rule).parts
        specs = format.grid.parts(rule)
        assert [spec.name for spec in specs] == list(parts.tensors)
        for spec in specs:
            tensor = parts.tensors[spec.name]
            assert tensor.dtype == spec.dtype and spec.bits <= 8 * spec.dtype.itemsize
            assert tensor.shape == spec.shape_of(6, 256 // format.block_in(256))


@every
def test_parts_come_back_by_their_names(format: Format) -> None:
    """As a file gives them: the same values, rounded and read."""
    for rule in map(format.rule, format.rules):
        quantized = quantize(random(6, 256), format, rule)
        again = TensorQuantizer(format, rule).as_parts(tensors_of(quantized.parts))
        assert list(again.tensors) == list(quantized.parts.tensors)
        packed = QTensor.from_packed(quantized.packed(), again, format)
        assert torch.equal(bits(packed.dequantize()), bits(quantized.dequantize()))
        unpacked = QTensor.dequantize_packed(quantized.packed(), again, format)
        assert torch.equal(bits(unpacked), bits(quantized.dequantize()))


@every
def test_rows_and_blocks_are_cut_and_put_together_again(format: Format) -> None:
    for rule in map(format.rule, format.rules):
        quantized = quantize(random(6, 256), format, rule)
        upper, lower = quantized.split_rows([2, 4])
        assert torch.equal(torch.cat([upper.dequantize(), lower.dequantize()]), quantized.dequantize())
        blocks = 256 // format.block_in(256)
        alone = [quantized.parts.of_blocks(slice(index, index + 1)) for index in range(blocks)]
        together = Parts.side_by_side(alone)
        assert type(together) is type(quantized.parts)
        assert all(map(torch.equal, tensors_of(together), tensors_of(quantized.parts)))
        for index, parts in enumerate(alone):
            codes = quantized.codes.unflatten(1, (blocks, -1))[:, index]
            expected = quantized.dequantize().unflatten(1, (blocks, -1))[:, index]
            block = replace(format, block=256 // blocks)
            assert torch.equal(QTensor(codes, parts, block).dequantize(), expected)


def test_what_belongs_to_a_row_or_a_tensor_stays_when_blocks_are_taken() -> None:
    whole, row, block, level = torch.ones(()), torch.ones(3, 1), torch.ones(3, 4), torch.ones(3, 4, 2)
    parts = NamedParts({"whole": whole, "row": row, "block": block, "level": level})
    taken = parts.of_blocks(torch.tensor([3, 0, 0])).tensors
    assert [tuple(tensor.shape) for tensor in taken.values()] == [(), (3, 1), (3, 3), (3, 3, 2)]
    split = parts.split_rows([1, 2])
    assert [tuple(tensor.shape) for tensor in split[1].tensors.values()] == [(), (2, 1), (2, 4), (2, 4, 2)]


def test_the_shape_of_a_part() -> None:
    for per, shape in (("block", (5, 3, 4)), ("row", (5, 1, 4)), ("tensor", (4,))):
        spec = PartSpec("level", torch.float16, 16, per, (4,))  # type: ignore[arg-type]
        assert spec.shape_of(5, 3) == shape


@toys
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_grid_of_another_kind_takes_the_nearest_of_its_values(format: Format, dtype: torch.dtype) -> None:
    """Found by looking at all of them: what every code of a block stands for."""
    x = random(40, 96).to(dtype)
    x[3] = 0
    quantized = quantize(x, format)
    codes = torch.arange(1 << format.bits, dtype=torch.uint8)
    blocks = 96 // format.block_in(96)
    every_code = codes.expand(40, blocks, len(codes)).contiguous()
    values = format.grid.decode(every_code, quantized.parts, dtype)
    found = quantized.dequantize(dtype)
    distance = (x.unflatten(1, (blocks, -1))[..., None] - values[:, :, None]).abs().amin(dim=-1).flatten(1)
    torch.testing.assert_close((found - x).abs(), distance, rtol=0, atol=0)
    assert torch.equal(bits(fake_quantize(x, format)), bits(found))
    again = format.grid.encode(found.unflatten(1, (blocks, -1)), quantized.parts)
    assert torch.equal(format.grid.decode(again, quantized.parts, dtype).flatten(1), found)


@toys
def test_a_poisoned_block_of_another_grid_is_nan(format: Format) -> None:
    x = random(4, 64)
    clean = fake_quantize(x, format)
    for poison in (torch.nan, torch.inf, -torch.inf):
        x[2, 5] = poison
        with pytest.raises(NumericsError, match=r"^w: holds NaN or Inf"):
            quantize(x, format, name="w")
        found, block = fake_quantize(x, format), format.block_in(64)
        assert found[2, :block].isnan().all()
        assert torch.equal(found[:2], clean[:2]) and torch.equal(found[2, block:], clean[2, block:])


@toys
def test_a_part_that_overflows_is_named(format: Format) -> None:
    part = r"scale \(float8_e5m2\)" if format is TWO_SCALES else r"level \(float16\)"
    with pytest.raises(NumericsError, match=rf"^w: a block scale overflows {part}; the largest"):
        quantize(random(2, 64) * 1e7, format, name="w")


def test_bits_of_a_row() -> None:
    """Codes, and what blocks and rows have beside them."""
    assert TWO_SCALES.bits_per_element == 4 + 2 * 8 / 32
    assert CODEBOOK.bits_per_element == 2 + 4 * 16 / 16
    rowwise = replace(get_format("int4_g32"), block=None)
    assert rowwise.bits_per_element == 4 and rowwise.bits_in(96) == 4 * 96 + 16
    assert quantize(random(5, 96), CODEBOOK).packed_bytes == 5 * 96 * CODEBOOK.bits_per_element / 8
    assert quantize(random(5, 96), rowwise).packed_bytes == 5 * (96 // 2 + 2)


def test_kernels_for_one_scale_a_block_refuse_other_grids() -> None:
    with pytest.raises(AssertionError):
        _ = TWO_SCALES.element
    with pytest.raises(AssertionError):
        _ = quantize(random(2, 64), TWO_SCALES).scales


@pytest.mark.parametrize("name", ["int4_g32", "int4_g32_asym", "mxint8", "mxfp4", "nvfp4"])
def test_a_block_may_be_the_whole_row(name: str) -> None:
    format = get_format(name)
    rowwise = replace(format, block=None)
    for columns in (32, 96, 130):
        x, as_wide = random(7, columns), replace(format, block=columns)
        found, expected = quantize(x, rowwise), quantize(x, as_wide)
        assert torch.equal(found.codes, expected.codes)
        assert all(map(torch.equal, tensors_of(found.parts), tensors_of(expected.parts)))
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert torch.equal(fake_quantize(x, rowwise), fake_quantize(x, as_wide))
        assert torch.equal(QTensor.dequantize_packed(found.packed(), found.parts, rowwise), found.dequantize())
    for shape in ((0, 32), (3, 0), (2, 0, 5)):
        assert fake_quantize(torch.empty(shape), rowwise).shape == shape
    with pytest.raises(ConfigError, match=r"130 is not a multiple of the block size 32"):
        quantize(random(7, 130), replace(format, block=32))
