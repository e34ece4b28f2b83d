"""Channels in the order that a recipe asks for, found on one pass of the original model over the calibration text.

Everything that comes after, the original model that runs beside included, is read from the source with them. Of several
processes each finds some of the orders, from moments that all of them have taken together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxrot.calibration import Executor, Hessian, World
from mxrot.calibration.site_weights import together
from mxrot.errors import NumericsError
from mxrot.models import Site, value_heads
from mxrot.progress import Progress, silent
from mxrot.quantizing.block import copy_of, fill_original, linear_weights
from mxrot.quantizing.experts import Mixture, inside
from mxrot.quantizing.part import BlockRun, Part
from mxrot.surgery import PermutedFfn, PermutedHeads, permutable_linears
from mxrot.transforms import ChannelOrder, channel_order


@dataclass(frozen=True)
class Wanted:
    """An order that is to be found, or several of the same number of channels."""

    name: str
    """The full name of the linear that reads the channels."""
    shape: tuple[int, ...]
    """Of the order, whose last dimension are the channels."""
    moments: tuple[Tensor, Tensor] | None
    """Of inputs and weights, float64 [..., n, K, K] each; None where another process finds the order."""
    block: int
    kind: ChannelOrder

    def find(self) -> Tensor:
        """int64 of the shape."""
        assert self.moments is not None
        pairs = zip(*(moments.reshape(-1, *moments.shape[-3:]) for moments in self.moments), strict=True)
        return torch.stack([channel_order(x, w, self.block, self.kind) for x, w in pairs]).view(self.shape)


class Orders:
    """Of channels of one kind, which take about the same time each."""

    def __init__(self, world: World) -> None:
        self.found: dict[str, Tensor] = {}
        """As `find_orders` gives them."""
        self._world = world
        self._asked = 0
        self._left: list[Wanted] = []

    def ask(self, name: str, moments: tuple[Tensor, Tensor], block: int, kind: ChannelOrder) -> None:
        """Have an order found, or several, from moments [..., n, K, K]; as many at a time as there are processes."""
        is_own = self._asked % self._world.size == self._world.rank
        shape = (*moments[0].shape[:-3], moments[0].shape[-1])
        self._left.append(Wanted(name, shape, moments if is_own else None, block, kind))
        self._asked += 1
        if self._asked % self._world.size == 0:
            self.find()

    def find(self) -> None:
        """Find those that were asked for and are not found yet."""
        own = [one.find() for one in self._left if one.moments is not None]
        if self._world.size == 1:
            self.found |= {one.name: order for one, order in zip(self._left, own, strict=True)}
        elif self._left:
            given = self._world.gather(torch.cat([order.flatten() for order in own]) if own else None)
            flat = torch.cat(given).cpu().split([math.prod(one.shape) for one in self._left])  # one of each process
            self.found |= {one.name: order.view(one.shape) for one, order in zip(self._left, flat, strict=True)}
        self._left = []


@torch.no_grad()
def find_orders(
    run: BlockRun, blocks: list[nn.Module], executor: Executor, progress: Progress = silent
) -> dict[str, Tensor]:
    """The orders that the recipe asks for, int64 by the full names of the linears that read the channels: [I] of inner
    ones, [value heads, D] of values.

    `blocks` have no weights; `executor` stands before the first one, and runs them all. NumericsError with the name of
    a linear whose inputs are not finite on the calibration text.
    """
    ffn, of_heads = Orders(run.world.peers), Orders(run.world.peers)
    for index, block in enumerate(blocks):
        prefix = run.family.block_prefix(index)
        progress(index, len(blocks), f"{prefix}: order of its channels")
        own = copy_of(run, block)
        tensors = run.source.block(index, run.device)
        fill_original(run, own, tensors, prefix)
        executor.begin(own)
        _look_at(run, Part(prefix, index, own, linear_weights(run.family, tensors), executor), ffn, of_heads)
        if run.is_last(index):
            executor.end()
        else:
            executor.advance(prefix)
    ffn.find()
    of_heads.find()
    return ffn.found | of_heads.found


def permuted_run(run: BlockRun, orders: dict[str, Tensor]) -> BlockRun:
    """The run with these orders merged into its source; values that none is of stay as they are."""
    source, wanted = run.source, run.recipe.permutation
    assert wanted is not None
    blocks = range(run.config.num_hidden_layers)
    readers = [f"{run.family.block_prefix(index)}.{run.family.values_read_by}" for index in blocks]
    ffn = {name: order for name, order in orders.items() if name not in readers}
    if ffn:
        source = PermutedFfn(source, ffn)
    if wanted.value_heads != "none":
        heads, width = value_heads(run.config)
        natural = torch.arange(width).expand(heads, width)
        source = PermutedHeads(source, torch.stack([orders.get(name, natural) for name in readers]))
    return replace(run, source=source)


def _look_at(run: BlockRun, part: Part, ffn: Orders, of_heads: Orders) -> None:
    """Ask for the orders of one block."""
    wanted, family = run.recipe.permutation, run.family
    assert wanted is not None and part.executor is not None
    sites = run.active_sites(part.index)
    reader = next((site for site in sites if family.values_read_by in site.linears), None)
    if wanted.value_heads != "none" and reader is not None:
        heads, width = value_heads(run.config)
        block = run.rules.of(part.index, reader.name).transform.block
        of_inputs, of_weights = (
            diagonal_blocks(moments, width).unflatten(0, (heads, -1)) for moments in _moments(run, part, reader)
        )  # [value heads, query heads that read it, D, D]
        of_heads.ask(f"{part.name}.{family.values_read_by}", (of_inputs, of_weights), block, wanted.value_heads)
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
        ffn.ask(f"{here.name}.{site.linears[0]}", (inputs[None], weights[None]), block, wanted.ffn)


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
