"""Channels in the order that a recipe asks for, found on one pass of the original model over the calibration text.

Everything that comes after, the original model that runs beside included, is read from the source with them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mxrot.calibration import Executor, Hessian
from mxrot.calibration.site_weights import together
from mxrot.errors import NumericsError
from mxrot.models import Site, value_heads
from mxrot.progress import Progress, silent
from mxrot.quantizing.block import copy_of, fill_original, linear_weights
from mxrot.quantizing.experts import Mixture, inside
from mxrot.quantizing.part import BlockRun, Part
from mxrot.surgery import PermutedFfn, PermutedHeads, permutable_linears
from mxrot.transforms import channel_order


@dataclass
class Orders:
    """Of the channels of all blocks."""

    ffn: dict[str, Tensor] = field(default_factory=dict)
    """int64 [I] by the full names of the linears that read them."""
    value_heads: list[Tensor] = field(default_factory=list)
    """int64 [value heads, D] of each decoder block; empty where they stay as they are."""


@torch.no_grad()
def permuted_run(run: BlockRun, blocks: list[nn.Module], executor: Executor, progress: Progress = silent) -> BlockRun:
    """The run with the recipe's permutations merged into its source.

    `blocks` have no weights; `executor` stands before the first one, and runs them all. NumericsError with the name of
    a linear whose inputs are not finite on the calibration text.
    """
    orders = Orders()
    for index, block in enumerate(blocks):
        prefix = run.family.block_prefix(index)
        progress(index, len(blocks), f"{prefix}: order of its channels")
        own = copy_of(run, block)
        tensors = run.source.block(index, run.device)
        fill_original(run, own, tensors, prefix)
        executor.begin(own)
        _look_at(run, Part(prefix, index, own, linear_weights(run.family, tensors), executor), orders)
        if run.is_last(index):
            executor.end()
        else:
            executor.advance(prefix)
    source = run.source
    if orders.ffn:
        source = PermutedFfn(source, orders.ffn)
    if orders.value_heads:
        source = PermutedHeads(source, torch.stack(orders.value_heads))
    return replace(run, source=source)


def _look_at(run: BlockRun, part: Part, orders: Orders) -> None:
    """Find the orders of one block."""
    wanted, family = run.recipe.permutation, run.family
    assert wanted is not None and part.executor is not None
    sites = run.active_sites(part.index)
    if wanted.value_heads != "none":
        reader = next((site for site in sites if family.values_read_by in site.linears), None)
        orders.value_heads.append(_order_of_heads(run, part, reader))
    inner = set(permutable_linears(family)) if wanted.ffn != "none" else set()
    found = [site for site in sites if inner & set(site.linears)]
    mixture = None
    if family.experts is not None and any(site.expert is not None for site in found):
        mixture = Mixture.of(part, family.experts.place)
    for site in found:
        here = part
        if mixture is not None and site.expert is not None:
            here, site = mixture.part(site.expert), inside(site, site.expert)
        block = run.rules.of(part.index, site.name).transform.block_in(here.weights[site.linears[0]].shape[1])
        inputs, weights = _moments(run, here, site)
        orders.ffn[f"{here.name}.{site.linears[0]}"] = channel_order(inputs[None], weights[None], block, wanted.ffn)


def _order_of_heads(run: BlockRun, part: Part, site: Site | None) -> Tensor:
    """int64 [value heads, D]; as they are where nothing of the site is quantized."""
    wanted = run.recipe.permutation
    assert wanted is not None
    heads, width = value_heads(run.config)
    if site is None:
        return torch.arange(width).expand(heads, width)
    block = run.rules.of(part.index, site.name).transform.block
    # [value heads, query heads that read it, D, D]
    inputs, weights = (
        diagonal_blocks(moments, width).unflatten(0, (heads, -1)) for moments in _moments(run, part, site)
    )
    return torch.stack([channel_order(x, w, block, wanted.value_heads) for x, w in zip(inputs, weights, strict=True)])


def _moments(run: BlockRun, part: Part, site: Site) -> tuple[Tensor, Tensor]:
    """The second moments of the inputs of a site and of its weights, float64 [K, K] each."""
    assert part.executor is not None
    inputs = Hessian()
    part.executor.observe([(site.reader, inputs.update)])
    found = inputs.result(run.world)
    if not torch.isfinite(found).all():
        raise NumericsError(f"{part.name}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
    weights = together(part.weights, site.linears)
    return found, weights.T @ weights / len(weights)


def diagonal_blocks(moments: Tensor, width: int) -> Tensor:
    """[K / width, width, width] of [K, K]."""
    count = len(moments) // width
    return moments.unflatten(0, (count, width)).unflatten(2, (count, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
