"""MX blocks and NVFP4 scales against torchao.

Where it differs, and what is compared there:
- Scale byte 0 stands for 2^-127, a subnormal float32 that its compiled GPU path cannot produce; so torchao
  divides such blocks by 2^-126 (floor, even) or by 1 (rceil). Bytes are compared always, codes where the byte
  is not 0 or the block is all zero.
- Off the newest GPUs its rceil takes a float32 logarithm, which cannot tell a quotient just above a power of
  two from the power itself. Blocks whose quotient amax / max lies in that window are left out.
- Its NVFP4 multiplies by a rounded reciprocal of the scale where ours divides, so only scales are compared;
  and it raises small block scales to 2^-6, the smallest normal E4M3 number, where ours go down to 0.
"""

import pytest
import torch
from tests.oracles.sample_blocks import SAMPLES, sample
from torch import Tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

from mxrot.formats import FORMATS, quantize

ELEMENT_DTYPES = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6_e2m3": DTYPE_FP6_E2M3,
    "mxfp6_e3m2": DTYPE_FP6_E3M2,
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}
MODES = {
    "floor": ScaleCalculationMode.FLOOR,
    "even": ScaleCalculationMode.EVEN,
    "rceil": ScaleCalculationMode.RCEIL,
}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
samples = pytest.mark.parametrize("name", SAMPLES)


def _their_bytes_and_codes(x: Tensor, format_name: str, rule: str) -> tuple[Tensor, Tensor]:
    theirs = MXTensor.to_mx(x, ELEMENT_DTYPES[format_name], 32, MODES[rule])
    codes = theirs.qdata.view(torch.uint8)
    if format_name == "mxfp4":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return theirs.scale.view(torch.uint8), codes


def _is_just_above_a_power_of_two(quotients: Tensor) -> Tensor:
    """|log2| is below 256 here, so float32 rounds it by at most 2^-17; eight times that is left out."""
    logs = quotients.double().log2()
    above = logs - logs.floor()
    return (above > 0) & (above < 2**-14)


@samples
@dtypes
@pytest.mark.parametrize("rule", MODES)
@pytest.mark.parametrize("format_name", ELEMENT_DTYPES)
def test_bytes_and_codes(format_name: str, rule: str, dtype: torch.dtype, name: str) -> None:
    format = FORMATS[format_name]
    x = sample(name, format.element, format.block, dtype)
    ours = quantize(x, format, format.rule(rule))
    their_bytes, their_codes = _their_bytes_and_codes(x, format_name, rule)
    amax = x.unflatten(-1, (-1, 32)).abs().amax(-1).double()

    comparable = torch.ones_like(amax, dtype=torch.bool)
    if rule == "rceil":
        comparable = ~_is_just_above_a_power_of_two(amax / format.element.max)
    assert comparable.sum() >= 0.99 * comparable.numel()
    assert torch.equal(ours.scales.stored[comparable], their_bytes[comparable])

    comparable &= (their_bytes != 0) | (amax == 0)
    our_codes, their_codes = (codes.unflatten(-1, (-1, 32)) for codes in (ours.codes, their_codes))
    assert torch.equal(our_codes[comparable], their_codes[comparable])


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("subnormal", "every_exponent")])
@dtypes
def test_packed_bytes(dtype: torch.dtype, name: str) -> None:
    """The samples left out hold blocks of scale byte 0 that are not all zero."""
    format = FORMATS["mxfp4"]
    x = sample(name, format.element, format.block, dtype)
    theirs = MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.EVEN)
    assert torch.equal(quantize(x, format, format.rule("even")).packed(), theirs.qdata.view(torch.uint8))


@pytest.mark.parametrize("name", ["normal", "student_t", "log_normal", "zeros", "one_outlier", "one_row"])
@dtypes
def test_nvfp4_scales(dtype: torch.dtype, name: str) -> None:
    format = FORMATS["nvfp4"]
    x = sample(name, format.element, format.block, dtype)
    ours = quantize(x, format).scales
    tensor_scale = per_tensor_amax_to_scale(x.abs().amax())
    stored, _ = nvfp4_quantize(x, per_tensor_scale=tensor_scale)
    assert torch.equal(ours.tensor_scale, tensor_scale)
    their_scales = stored.float()
    normal = their_scales > 2**-6
    assert normal.any()
    assert torch.equal(ours.stored.float()[normal], their_scales[normal])
    assert (ours.stored.float()[~normal] <= 2**-6).all()
