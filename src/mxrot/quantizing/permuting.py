"""The channel orders that a recipe asks for, found in one pass of the original model over the calibration text.

Everything later, including the original model that runs in parallel, is read from the source with these orders. Of
several processes each finds some of the orders. It uses moments that all processes have computed together or, for its
own expert, those of the tokens of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxrot.calibration import Executor, Hessian, World
from mxrot.calibration.site_weights import together
from mxrot.errors import NumericsError
from mxrot.models import Site, value_heads
from mxrot.progress import Progress, silent
from mxrot.quantizing.block import copy_of, fill_original, linear_weights
from mxrot.quantizing.experts import Mixture, inside, some_at_once
from mxrot.quantizing.part import BlockRun, Part
from mxrot.quantizing.shared import by_itself, is_one_each
from mxrot.surgery import PermutedFfn, PermutedHeads, permutable_linears
from mxrot.transforms import ChannelOrder, at_once, channel_orders


@dataclass(frozen=True)
class Wanted:
    """An order to be found, or several orders of the same width."""

    name: str
    """The full name of the linear that reads the channels."""
    shape: tuple[int, ...]
    """The shape of the order. Its last dimension is the channels."""
    sets: int
    """Sets that share an order."""
    block: int
    kind: ChannelOrder

    @property
    def manner(self) -> tuple[object, ...]:
        """The properties that orders found together must share."""
        return self.shape[-1], self.sets, self.block, self.kind


Pair = tuple[Tensor, Tensor]
"""Moments of inputs and weights, each float64 [..., n, K, K]."""


class Orders:
    """Orders of one kind of channels, which take about the same time each."""

    def __init__(self, world: World) -> None:
        self.found: dict[str, Tensor] = {}
        """The found orders, as `find_orders` returns them."""
        self._world, self._turn = world, 0
        self._left: list[tuple[Wanted, int, Pair | None]] = []
        """The open requests, each with the process that will find it, and its moments in that process."""

    def ask(self, wanted: Wanted, moments: Pair) -> None:
        """Request orders from the next process in turn, from moments that all processes have."""
        self.ask_of(self._turn, wanted, moments)
        self._turn = (self._turn + 1) % self._world.size

    def ask_of(self, rank: int, wanted: Wanted, moments: Pair | None) -> None:
        """Request orders from one process, which has the moments. It finds as many together as memory allows."""
        most = at_once(wanted.sets * math.prod(wanted.shape[:-1]), wanted.shape[-1])
        if self._left and (self._left[0][0].manner != wanted.manner or self._count(rank) == most):
            self.find()
        self._left.append((wanted, rank, moments if rank == self._world.rank else None))
        if len(self._left) >= self._world.size * most:
            self.find()

    def _count(self, rank: int) -> int:
        """The number of orders it will find."""
        return sum(by == rank for _, by, _ in self._left)

    def find(self) -> None:
        """Find all orders that are still open."""
        if not self._left:
            return
        moments = [moments for *_, moments in self._left if moments is not None]
        self._left = [(wanted, rank, None) for wanted, rank, _ in self._left]
        own = _orders_of(self._left[0][0], moments)
        given = [own] if self._world.size == 1 else self._world.gather(own)
        flat = iter(given)
        for rank in range(self._world.size):
            wanted = [one for one, by, _ in self._left if by == rank]
            if wanted:
                pieces = _there(next(flat)).cpu().split([math.prod(one.shape) for one in wanted])
                self.found |= {one.name: order.view(one.shape) for one, order in zip(wanted, pieces, strict=True)}
        self._left = []


def _orders_of(wanted: Wanted, moments: list[Pair]) -> Tensor | None:
    """The orders concatenated, int64; None if there are none. `moments` are freed."""
    if not moments:
        return None
    inputs, weights = (
        _together([each.reshape(-1, *each.shape[-3:]) for each in own]) for own in zip(*moments, strict=True)
    )
    moments.clear()
    return channel_orders(inputs, weights, wanted.block, wanted.kind).flatten()


def _together(moments: list[Tensor]) -> Tensor:
    """The moments concatenated. A single one may be large, and is not copied."""
    return moments[0] if len(moments) == 1 else torch.cat(moments)


def _there(found: Tensor | None) -> Tensor:
    assert found is not None, "all have looked at the same orders"
    return found


@torch.no_grad()
def find_orders(
    run: BlockRun, blocks: list[nn.Module], executor: Executor, progress: Progress = silent
) -> dict[str, Tensor]:
    """The orders that the recipe asks for, int64 by the full names of the linears that read the channels.

    They are [I] for inner channels and [value heads, D] for values. `blocks` have no weights; `executor` stands before
    the first one, and runs them all. NumericsError, with the name of a linear whose inputs are not finite on the
    calibration text.
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
    """The run with these orders merged into its source. Values without an order stay as they are."""
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
    """Request the orders of one block."""
    wanted, family = run.recipe.permutation, run.family
    assert wanted is not None and part.executor is not None
    sites = run.active_sites(part.index)
    reader = next((site for site in sites if family.values_read_by in site.linears), None)
    if wanted.value_heads != "none" and reader is not None:
        heads, width = value_heads(run.config)
        block = run.rules.of(part.index, reader.name).transform.block
        of_inputs, of_weights = (
            diagonal_blocks(moments, width).unflatten(0, (heads, -1)) for (moments,) in _moments(run, part, reader)
        )  # [value heads, query heads that read each, D, D]
        name = f"{part.name}.{family.values_read_by}"
        of_heads.ask(
            Wanted(name, (heads, width), of_inputs.shape[1], block, wanted.value_heads), (of_inputs, of_weights)
        )
    inner = set(permutable_linears(family, part.index)) if wanted.ffn != "none" else set()
    found = [site for site in sites if inner & set(site.linears)]
    for site in found:
        if site.expert is None:
            _ask(run, [(part, site)], ffn)
    of_experts = [site for site in found if site.expert is not None]
    if of_experts and family.experts is not None:
        mixture = Mixture.of(part, family.experts.place)
        for alike in some_at_once(of_experts, lambda site: site.group, run.world.size):
            some = [(str(site.expert), site) for site in alike]
            _ask(run, [(mixture.part(expert), inside(site, expert)) for expert, site in some], ffn)


def _ask(run: BlockRun, places: Sequence[tuple[Part, Site]], ffn: Orders) -> None:
    """Request the orders of the channels that linears of MLPs read. If there is one per process, it takes the
    moments."""
    orders = [_wanted(run, part, site) for part, site in places]
    if is_one_each([site for _, site in places], run.world):
        alone, own = by_itself(run, [part for part, _ in places])
        moments = _moments(alone, own, places[run.world.rank][1])
        for rank, order in enumerate(orders):
            ffn.ask_of(rank, order, moments)
        return
    for order, (part, site) in zip(orders, places, strict=True):
        ffn.ask(order, _moments(run, part, site))


def _wanted(run: BlockRun, part: Part, site: Site) -> Wanted:
    """The order of the channels that a linear of an MLP reads."""
    assert run.recipe.permutation is not None
    width = part.weights[site.linears[0]].shape[1]
    block = run.rules.of(part.index, site.name).transform.block_in(width)
    return Wanted(f"{part.name}.{site.linears[0]}", (width,), 1, block, run.recipe.permutation.ffn)


def _moments(run: BlockRun, part: Part, site: Site) -> Pair:
    """The second moments of the inputs of a site and of its weights, float64 [1, K, K] each."""
    assert part.executor is not None
    inputs = Hessian()
    part.executor.observe([(site.reader, inputs.update)])
    found = inputs.result(run.world)
    if not torch.isfinite(found).all():
        raise NumericsError(f"{part.name}.{site.linears[0]}: its input holds NaN or Inf on the calibration text")
    weights = together(part.weights, site.linears)
    return found[None], (weights.T @ weights / len(weights))[None]


def diagonal_blocks(moments: Tensor, width: int) -> Tensor:
    """The blocks [K / width, width, width] of [K, K]."""
    count = len(moments) // width
    return moments.unflatten(0, (count, width)).unflatten(2, (count, width)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
