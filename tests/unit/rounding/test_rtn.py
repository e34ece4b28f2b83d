import torch

from mxrot.formats import get_format, quantize
from mxrot.rounding.rtn import RoundToNearest


def test_it_is_quantize() -> None:
    """Whatever the Hessian; no damping is reported."""
    format = get_format("mxfp4")
    weight = torch.randn(5, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rule in map(format.rule, format.rules):
        expected = quantize(weight, format, rule)
        for hessian in (None, torch.full((96, 96), torch.nan)):
            got = RoundToNearest().round(weight, format, rule, hessian, "w")
            assert got.damping is None
            assert torch.equal(got.weight.codes, expected.codes)
            assert torch.equal(got.weight.scales.stored, expected.scales.stored)
