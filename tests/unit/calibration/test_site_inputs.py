"""Hessian and shift of a site against their definitions, on every token at once."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from mxrot.calibration import Executor, first_executor
from mxrot.calibration.site_inputs import SiteInputs
from mxrot.calibration.site_weights import SiteWeights
from mxrot.formats import TensorQuantizer, get_format
from mxrot.models import Site
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.models.families.llama import LLAMA_SITES
from mxrot.rounding import Requirements
from mxrot.transforms import BlockDiagonal, SiteTransform
from mxrot.transforms.base import random_orthogonal

FORMAT = get_format("mxfp4")
QUANTIZER = TensorQuantizer(FORMAT, FORMAT.rule())
SITES = {site.name: site for site in LLAMA_SITES}
each_site = pytest.mark.parametrize("site", LLAMA_SITES, ids=lambda site: site.name)


class Blocks:
    """A block and its original with other weights and other inputs, in three batches."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        model = LlamaForCausalLM(tiny_config())
        model.requires_grad_(False)
        self.block = model.model.layers[0]
        self.executor = first_executor(model, LLAMA, random_windows(5, 12), 2)
        self.executor.begin(self.block)
        self.original = deepcopy(self.block)
        for parameter in self.block.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        hidden = self.executor.stacked(range(5)).split(2)
        moved = [batch + 0.01 * torch.randn(batch.shape) for batch in hidden]
        self.originals = Executor(moved, self.executor.arguments, self.executor.placement)
        self.originals.begin(self.original)

    def seen(self, name: str, original: bool) -> Tensor:
        """The inputs [tokens, K] of one submodule, over all batches."""
        found: list[Tensor] = []
        (self.originals if original else self.executor).observe([(name, found.append)])
        return torch.cat([x.flatten(0, 1) for x in found]).double()


@pytest.fixture
def blocks() -> Blocks:
    return Blocks()


def weight_of(block: nn.Module, site: Site) -> Tensor:
    return torch.cat([block.get_submodule(name).weight for name in site.linears]).double()  # type: ignore[misc]


def weights_of(block: nn.Module, site: Site, transform: BlockDiagonal | None = None) -> SiteWeights:
    return SiteWeights({name: block.get_submodule(name).weight for name in site.linears}, site.linears, transform)  # type: ignore[misc]


def site_inputs(blocks: Blocks, site: Site, quantizer: TensorQuantizer | None) -> SiteInputs:
    transform = SiteTransform((BlockDiagonal(random_orthogonal(1, 32, torch.Generator().manual_seed(1))),)).as_applied()
    return SiteInputs(blocks.executor, site, transform, quantizer)


def quantized(x: Tensor, inputs: SiteInputs) -> Tensor:
    assert inputs.transform is not None
    moved = inputs.transform.apply(x.float())
    return (moved if inputs.quantizer is None else inputs.quantizer(moved)).double()


@each_site
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("quantizer", [None, QUANTIZER], ids=["W4A16", "W4A4"])
def test_the_hessian(blocks: Blocks, site: Site, relative: bool, quantizer: TensorQuantizer | None) -> None:
    inputs = site_inputs(blocks, site, quantizer)
    found = inputs.hessian(weights_of(blocks.block, site), Requirements(True, relative=relative))
    x = quantized(blocks.seen(site.linears[0], original=False), inputs)
    if relative and site.residual is not None:
        stream = blocks.seen(site.residual, original=False)
        stream = stream + blocks.seen(site.linears[0], original=False) @ weight_of(blocks.block, site).T
        x = x / stream.square().mean(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(x.square().mean()))


@each_site
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("target", ["original", "residual"])
def test_hessian_and_shift(blocks: Blocks, site: Site, relative: bool, target: str) -> None:
    inputs = site_inputs(blocks, site, QUANTIZER)
    weight = weight_of(blocks.block, site)
    assert inputs.transform is not None
    folded = inputs.transform.fold(weight)
    requirements = Requirements(True, target, relative)  # type: ignore[arg-type]
    hessian, shift = inputs.hessian_and_shift(
        blocks.originals, weights_of(blocks.block, site, inputs.transform), requirements
    )

    x = quantized(blocks.seen(site.linears[0], original=False), inputs)
    wanted = blocks.seen(site.linears[0], original=True) @ weight.T
    missing = wanted - x @ folded.T
    if site.residual is not None:
        here, there = (blocks.seen(site.residual, original=original) for original in (False, True))
        if target == "residual":
            missing = missing + there - here
        if relative:
            size = (wanted + there).square().mean(dim=1, keepdim=True).sqrt()
            x, missing = x / size, missing / size
    torch.testing.assert_close(hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-5 * float(x.square().mean()))
    expected = missing.T @ x / len(x)
    torch.testing.assert_close(shift, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_nothing_is_missing_where_nothing_has_changed(blocks: Blocks) -> None:
    """No quantizer, no transform, the same block on the same inputs: the shift is rounding noise."""
    for site in LLAMA_SITES:
        inputs = SiteInputs(blocks.executor, site, None, None)
        weight = weight_of(blocks.block, site)
        same = blocks.executor.another()
        same.begin(deepcopy(blocks.block))
        hessian, shift = inputs.hessian_and_shift(same, weights_of(blocks.block, site), Requirements(True, "residual"))
        assert shift.abs().max() <= 1e-5 * (weight @ hessian).abs().max()


def test_what_is_known_of_a_block_is_not_computed_again(blocks: Blocks) -> None:
    """Attention runs once for each batch, however often what follows it is observed."""
    calls: list[int] = []
    handle = blocks.block.self_attn.q_proj.register_forward_pre_hook(lambda module, args: calls.append(1))
    site, requirements = SITES["gate_up"], Requirements(True)
    weights = weights_of(blocks.block, site)
    expected = site_inputs(blocks, site, None).hessian(weights, requirements)
    assert len(calls) == 3
    blocks.executor.children_done(["self_attn"])
    for _ in range(3):
        assert torch.equal(site_inputs(blocks, site, None).hessian(weights, requirements), expected)
    assert len(calls) == 6
    handle.remove()
    assert "forward" not in vars(blocks.block.self_attn)
