"""GPTQ under clipped rules: the clip is the rule's, and nothing else changes."""

import pytest
import torch

from mxrot.formats import TensorQuantizer, quantize
from mxrot.kernels import plain_round_reached, round_reached
from mxrot.rounding.gptq import GPTQ

NAMES = ["mxfp4 even clip 0.8", "mxfp4 rceil clip 0.8", "int4_g32_asym minmax clip 0.8", "nvfp4 absmax clip 0.9"]


def weights() -> torch.Tensor:
    return torch.randn(12, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scales", ["reached", "fixed"])
@pytest.mark.parametrize("spelled", NAMES)
def test_without_correlations_it_is_rounding_to_nearest(spelled: str, scales: str) -> None:
    quantizer = TensorQuantizer.named(spelled)
    if scales == "reached" and quantizer.looks_at_whole_tensor:
        scales = "fixed"
    identity = torch.eye(96, dtype=torch.float64)
    found = GPTQ(scales=scales).round(weights(), quantizer.format, quantizer.rule, identity, "w").weight  # type: ignore[arg-type]
    expected = quantize(weights(), quantizer.format, quantizer.rule)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scales.stored.float(), expected.scales.stored.float())
    unclipped = quantize(weights(), quantizer.format)
    assert not torch.equal(found.codes, unclipped.codes)


@pytest.mark.parametrize("offsets", [(0,), (0, -1, 1)])
def test_a_block_that_is_reached_has_clipped_scales(offsets: tuple[int, ...]) -> None:
    quantizer = TensorQuantizer.named("mxfp4 even clip 0.7")
    columns = weights()[:, :32]
    upper = torch.eye(32, dtype=torch.float64) + torch.randn(32, 32, dtype=torch.float64).triu(1) * 0.1
    into = torch.empty_like(columns), torch.empty_like(columns)
    arguments = columns, upper, quantizer.format, quantizer.rule, offsets
    found = round_reached(*arguments, upper.diagonal().reciprocal(), into)
    expected = plain_round_reached(*arguments)
    assert torch.equal(found.scales.stored, expected.scales.stored) and torch.equal(into[0], expected.values)
    if offsets == (0,):
        own = quantizer.rule.choose(columns[:, None], quantizer.format.element, quantizer.format.scale).stored
        assert torch.equal(found.scales.stored, own)
