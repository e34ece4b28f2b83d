from __future__ import annotations

import pytest
import torch

from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.fused.dequantize import dequantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMAT = get_format("mxfp4")


def test_every_code_under_every_scale_bit_for_bit() -> None:
    scales = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(32, 8)
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE).repeat(32, 1).view(32, 8, 32)[:, :, :16].flatten(1)
    codes = torch.cat([codes, codes.flip(1)])
    scales = torch.cat([scales, scales.flip(1)])
    # Under 2^126 and 2^127 only magnitudes up to 1.5: more is no number in float32.
    overflows = ((scales == 253) | (scales == 254)).repeat_interleave(16, dim=1)
    codes = torch.where(overflows, codes & 0xBB, codes)
    expected = QTensor.dequantize_packed(codes, BlockScales(scales, FORMAT.scale), FORMAT)
    found = dequantize(codes, scales)
    is_number = expected.isfinite()
    assert torch.equal(found.isnan(), expected.isnan()) and int(expected.isnan().sum()) == 64
    assert torch.equal(found[is_number].view(torch.int16), expected[is_number].to(torch.bfloat16).view(torch.int16))
    assert torch.equal(found[is_number].float(), expected[is_number])


@pytest.mark.parametrize(("rows", "groups"), [(0, 2), (1, 1), (9, 33), (20, 70)])
def test_sizes_that_fill_no_tile(rows: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (rows, groups * 16), generator=generator).to(torch.uint8).to(DEVICE)
    scales = torch.randint(100, 150, (rows, groups), generator=generator).to(torch.uint8).to(DEVICE)
    expected = QTensor.dequantize_packed(codes, BlockScales(scales, FORMAT.scale), FORMAT)
    assert torch.equal(dequantize(codes, scales).float(), expected)
