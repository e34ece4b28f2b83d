"""Smoothing of blocks whose norms multiply by 1 + weight, with norms that compute in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import config_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.calibration import block_arguments
from mxrot.models import FAMILIES, Family, Site, value_heads
from mxrot.surgery import Weights, fold_into_producer, shareable_scales

GEMMA = [FAMILIES["gemma2"], FAMILIES["gemma3"]]
SITES = {site.name: site for site in GEMMA[0].sites}
WITH_NORM = [site.name for site in SITES.values() if site.norm]
EXPONENTS = torch.rand(96, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
both = pytest.mark.parametrize("family", GEMMA, ids=lambda family: family.name)


class Block:
    """A decoder block in float64, its weights and its outputs."""

    def __init__(self, name: str) -> None:
        family = FAMILIES[name]
        torch.manual_seed(0)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config_of(family)).double()
        self.model.requires_grad_(False)
        for parameter in self.model.parameters():
            parameter *= 10
        spread_gains(self.model, family)
        for module in self.model.modules():
            if "RMSNorm" in type(module).__name__:
                module.forward = float64_norm(module)  # type: ignore[method-assign]
        self.module = self.model.get_submodule(family.block_prefix(0))
        self.heads = value_heads(self.model.config)
        self.keywords = block_arguments(self.model, family, torch.arange(9)[None])[0]
        self.weights: Weights = {
            linear: self.module.get_parameter(f"{linear}.weight").clone()
            for site in family.sites
            for linear in site.linears
        }

    def outputs(self) -> Tensor:
        for name, weight in self.weights.items():
            self.module.get_parameter(f"{name}.weight").copy_(weight)
        hidden = torch.randn(2, 9, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        output: Tensor = self.module(hidden, **self.keywords)
        return output

    def gain(self, site: Site) -> Tensor:
        """The tensor of weights; the gain is one more."""
        return self.module.get_parameter(f"{site.norm}.weight")

    def smooth(self, site: Site, dtype: torch.dtype, scales: Tensor | None = None) -> Tensor:
        """Fold scales over four orders of magnitude in, and give them."""
        if scales is None:
            scales = 10 ** (4 * EXPONENTS[: self.weights[site.linears[0]].shape[1]] - 2)
        scales = shareable_scales(scales, site, self.heads)
        fold_into_producer(self.module, site, self.weights, scales, self.heads, dtype)
        return scales


def float64_norm(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, epsilon = norm.weight, norm.eps
        assert isinstance(weight, Tensor) and isinstance(epsilon, float)
        return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * (1 + weight)

    return forward


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@both
def test_a_block_computes_the_same(family: Family) -> None:
    block = Block(family.name)
    expected = block.outputs()
    for site in SITES.values():
        block.smooth(site, torch.float64)
    assert relative_error(block.outputs(), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WITH_NORM)
def test_the_weights_make_up_for_the_rounding_of_a_gain(name: str, dtype: torch.dtype) -> None:
    block, site = Block("gemma2"), SITES[name]
    expected, gain = block.outputs(), 1 + block.gain(site)
    scales = block.smooth(site, dtype)
    assert torch.equal(block.gain(site), block.gain(site).to(dtype).double())
    assert not torch.equal(1 + block.gain(site), gain / scales)
    assert relative_error(block.outputs(), expected) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_small_gain_does_not_become_zero(dtype: torch.dtype, sign: float) -> None:
    """Gains of 1e-6, and there is no number of these types so close to -1: the nearest one stands in for them."""
    block, site = Block("gemma2"), SITES["qkv"]
    block.gain(site).copy_(sign * (1 + block.gain(site)) - 1)
    expected = block.outputs()
    block.smooth(site, dtype, torch.full((64,), 1e6, dtype=torch.float64))
    nearest = 1 + block.gain(site)
    assert torch.equal(nearest, torch.full_like(nearest, sign * torch.finfo(dtype).eps / (2 if sign > 0 else 1)))
    assert relative_error(block.outputs(), expected) <= 1e-12


def test_a_gain_of_zero_stays_zero() -> None:
    block, site = Block("gemma2"), SITES["qkv"]
    block.gain(site)[3] = -1
    expected = block.outputs()
    block.smooth(site, torch.float16)
    assert block.gain(site)[3] == -1 and all(weight.isfinite().all() for weight in block.weights.values())
    assert relative_error(block.outputs(), expected) <= 1e-12
