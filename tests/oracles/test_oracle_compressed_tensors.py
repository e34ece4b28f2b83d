"""MXFP4 against the compressor of compressed-tensors that checkpoints are written for (rule `even`).

Where it differs, and what is compared there:
- It multiplies by sign(x), which is 0 for -0.0, and so loses that sign: codes are compared up to it.
- It rounds a block maximum of 1.75 * 2^127 or more to Inf, whose scale it then cannot write: such blocks,
  which no model holds, are left out.
- Its MXFP8 rounds block maxima to the one mantissa bit of E2M1, where ours (and torchao) take the three of
  E4M3: not compared.
- It decompresses into bfloat16, which holds every product of a code and a scale but those beyond 2^128.
"""

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8, unpack_fp6_from_uint8
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from tests.oracles.sample_blocks import SAMPLES, bits, sample
from torch import Tensor

from mxrot.formats import FORMATS, BlockScales, QTensor, pack_codes, quantize, unpack_codes
from mxrot.formats.block_scales import E8M0
from mxrot.formats.element import E2M3

MXFP4 = FORMATS["mxfp4"]
ARGS = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="group",
    symmetric=True,
    dynamic=False,
    group_size=32,
    scale_dtype=torch.uint8,
    zp_dtype=torch.uint8,
)
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)
TOO_LARGE = 1.75 * 2.0**127
MATRICES = tuple(name for name in SAMPLES if name != "three_dimensions")  # it takes weights of two dimensions
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def _compress(x: Tensor) -> dict[str, Tensor]:
    blocks = x.unflatten(-1, (-1, 32))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), ARGS)
    return MXFP4PackedCompressor.compress({"weight": x, "weight_scale": scale}, SCHEME)


def _decompress(packed: Tensor, scale_bytes: Tensor) -> Tensor:
    state = {"weight_packed": packed, "weight_scale": scale_bytes}
    return MXFP4PackedCompressor.decompress(state, SCHEME)["weight"]


@pytest.mark.parametrize("name", MATRICES)
@dtypes
def test_codes_and_scale_bytes(dtype: torch.dtype, name: str) -> None:
    x = sample(name, MXFP4.element, MXFP4.block, dtype)
    x = x[(x.abs() < TOO_LARGE).all(dim=-1)]
    ours, theirs = quantize(x, MXFP4, MXFP4.rule("even")), _compress(x)
    assert theirs["weight_packed"].dtype == theirs["weight_scale"].dtype == torch.uint8
    assert torch.equal(ours.scales.stored, theirs["weight_scale"])
    without_lost_signs = torch.where(x == 0, 0, ours.codes)
    assert torch.equal(pack_codes(without_lost_signs, 4), theirs["weight_packed"])


@pytest.mark.parametrize("name", MATRICES)
@dtypes
def test_its_decompressor_reads_our_bytes(dtype: torch.dtype, name: str) -> None:
    x = sample(name, MXFP4.element, MXFP4.block, dtype)
    x = x[(x.abs() < TOO_LARGE).all(dim=-1)]
    ours = quantize(x, MXFP4, MXFP4.rule("even"))
    theirs = _decompress(ours.packed(), ours.scales.stored)
    assert torch.equal(bits(theirs.float()), bits(ours.dequantize()))


@pytest.mark.parametrize("name", MATRICES)
def test_we_read_its_bytes(name: str) -> None:
    x = sample(name, MXFP4.element, MXFP4.block)
    theirs = _compress(x[(x.abs() < TOO_LARGE).all(dim=-1)])
    ours = QTensor.from_packed(theirs["weight_packed"], BlockScales(theirs["weight_scale"], E8M0), MXFP4)
    expected = _decompress(theirs["weight_packed"], theirs["weight_scale"])
    assert torch.equal(bits(ours.dequantize(torch.bfloat16)), bits(expected))


def test_every_packed_byte_under_every_scale_byte() -> None:
    packed = torch.arange(256, dtype=torch.uint8).expand(255, 256).contiguous()
    scale_bytes = torch.arange(255, dtype=torch.uint8)[:, None].expand(255, 16).contiguous()
    ours = QTensor.from_packed(packed, BlockScales(scale_bytes, E8M0), MXFP4)
    assert torch.equal(bits(ours.dequantize(torch.bfloat16)), bits(_decompress(packed, scale_bytes)))


def test_fp6_packing() -> None:
    codes = torch.randint(0, 64, (9, 128), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[0, :64] = torch.arange(64, dtype=torch.uint8)
    packed = pack_codes(codes, 6)
    assert torch.equal(packed, pack_fp6_to_uint8(E2M3.decode(codes)))
    values = unpack_fp6_from_uint8(packed, 9, 128, torch.float32)
    assert torch.equal(bits(values), bits(E2M3.decode(unpack_codes(packed, 6))))
