"""Two-bit weights while they are learned: the weights themselves, and the partition of their blocks.

A weight is kept in steps of its block (a third of the span of the levels at the start), so that one rate has the same
effect everywhere. It is looked up in every forward pass: the boundaries that it exceeds determine its level. Gradients,
from that of the looked-up weight:

- a weight between the ends of its block has the same gradient (straight-through), one beyond them has none;
- a level has the sum of the gradients of its members, which is its true gradient;
- a boundary has a windowed surrogate, since its true gradient is zero almost everywhere: when it moves up by a small d,
  the weights within d of it fall to the level below. Those within WINDOW are counted instead, times d / (2 WINDOW).

Inputs are quantized with straight-through gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.formats import NamedParts, QTensor, as_blocks
from mxrot.formats.look_up_table import level_values
from mxrot.layers import QuantLinear
from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.tuning.level_tables import LevelTables
from mxrot.tuning.loop import Group
from mxrot.tuning.straight_inputs import StraightInputs, product_type

WINDOW = 0.25
"""The distance from a boundary within which weights count for its gradient, in steps of the block."""


def codes_under(weights: Tensor, edges: Tensor) -> Tensor:
    """The number of the three boundaries in `edges` [G, 5] that each of `weights` [G, B] exceeds: int64."""
    return torch.searchsorted(edges[:, 1:-1].contiguous(), weights)


class LookUp(torch.autograd.Function):
    """The levels of weights, with gradients for weights, levels and boundaries."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, edges: Tensor, values: Tensor, unit: Tensor) -> Tensor:
        """`weights` [G, B] and `edges` [G, 5] are in units [G]; `values` [G, 4] may have any type. Returns [G, B] in
        that type."""
        ctx.save_for_backward(weights, edges, values, unit)
        return values.gather(-1, codes_under(weights, edges))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weights, edges, values, unit = ctx.saved_tensors
        gradient = gradient.float()
        distance = weights[:, None, :] - edges[:, :, None]
        above = distance > 0
        of_weights = of_edges = of_values = None
        if ctx.needs_input_grad[0]:
            of_weights = gradient * (above[:, 0] & ~above[:, -1]) * unit[:, None]
        if ctx.needs_input_grad[2]:
            beyond = (gradient[:, None, :] * above[:, 1:-1]).sum(dim=-1)
            at_least = torch.cat([gradient.sum(dim=-1, keepdim=True), beyond, torch.zeros_like(beyond[:, :1])], dim=-1)
            of_values = (at_least[:, :-1] - at_least[:, 1:]).to(values.dtype)
        if ctx.needs_input_grad[1]:
            near = distance[:, 1:-1].abs_() < WINDOW
            falls = (gradient[:, None, :] * near).sum(dim=-1) * (values[:, :-1] - values[:, 1:]).float()
            of_edges = nn.functional.pad(falls / (2 * WINDOW), (1, 1))
        return of_weights, of_edges, of_values, None


class LevelsLinear(nn.Module):
    """A two-bit linear whose weights and levels are learned."""

    def __init__(self, linear: QuantLinear, inputs: StraightInputs) -> None:
        super().__init__()
        weight = linear.qtensor().dequantize()
        if linear.remainder is not None:
            weight = weight + linear.remainder.to(weight)
            linear.remainder = None  # frees its memory
        self.shape, self.bias = weight.shape, linear.bias
        self.weights = nn.Parameter(as_blocks(weight, linear.weights.format, "weight").flatten(0, 1))
        self.edges: Tensor | None = None
        self.values: Tensor | None = None
        self.unit: Tensor | None = None
        self._inputs = (inputs,)  # in a tuple, so that it is not registered twice
        self._linear = (linear,)

    def start_levels(self) -> Tensor:
        """The levels chosen by rounding, float32 [G, 4]."""
        return level_values(self._linear[0].qtensor().parts, torch.float32).flatten(0, 1)

    def weight(self) -> Tensor:
        """The quantized weights [N, K], in the type of the values."""
        assert self.edges is not None and self.values is not None and self.unit is not None
        found: Tensor = LookUp.apply(self.weights, self.edges, self.values, self.unit)
        return found.view(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        product = nn.functional.linear(self._inputs[0](x), self.weight())
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @torch.no_grad()
    def finished(self, edges: Tensor, parts: NamedParts) -> QuantLinear:
        """The quantized linear with the learned codes and these levels."""
        linear = self._linear[0]
        rows = self.shape[0]
        codes = codes_under(self.weights, edges).to(torch.uint8).view(self.shape)
        own = {name: tensor.unflatten(0, (rows, -1)) for name, tensor in parts.tensors.items()}
        linear.set_weight(QTensor(codes, NamedParts(own), linear.weights.format))
        return linear


class LevelsNetwork:
    """A network of two-bit linears while they are learned."""

    def __init__(self, blocks: Sequence[nn.Module], sites: Callable[[int], Sequence[Site]]) -> None:
        """Replace the quantized linears by learned ones. `sites` gives the quantized sites of a block."""
        self.places: list[tuple[nn.Module, str, LevelsLinear]] = []
        self.inputs: list[StraightInputs] = []
        is_spaced = True
        for index, block in enumerate(blocks):
            for site in sites(index):
                first = block.get_submodule(site.linears[0])
                assert isinstance(first, QuantLinear) and first.activations is not None
                is_spaced = first.weights.rule.sees_extremes_only
                inputs = StraightInputs(first.transform, first.activations, len(site.linears))
                self.inputs.append(inputs)
                for name in site.linears:
                    old = block.get_submodule(name)
                    assert isinstance(old, QuantLinear)
                    linear = LevelsLinear(old, inputs)
                    block.set_submodule(name, linear)
                    self.places.append((block, name, linear))
        self.gains = [gain for block in blocks for gain in gains_of(block).values()]
        linears = [linear for _, _, linear in self.places]
        self.shapes = [(linear.shape[0], linear.shape[1]) for linear in linears]
        self.tables: LevelTables | None = None
        if linears:
            starts = [linear.start_levels() for linear in linears]
            self.tables = LevelTables([linear.weights.detach() for linear in linears], starts, is_spaced)
            self.tables.to(linears[0].weights.device)
            self._in_units(self.tables)

    @torch.no_grad()
    def _in_units(self, tables: LevelTables) -> None:
        for (_, _, linear), unit in zip(self.places, tables.unit.split(tables.counts), strict=True):
            linear.unit = unit
            linear.weights.div_(unit[:, None])

    def groups(self, options: Tuning) -> list[Group]:
        """The parameters with their rates. Those without a rate stay fixed."""
        if self.tables is None:
            return []
        weights = [linear.weights for _, _, linear in self.places]
        for parameters, rate in ((weights, options.offset_rate), (self.gains, options.norm_rate)):
            for parameter in parameters:
                parameter.requires_grad_(rate > 0)
        groups = [Group(weights, options.offset_rate, options.decay), Group(self.gains, options.norm_rate)]
        found = [group for group in groups if group.rate and group.parameters]
        return found + self.tables.groups(options)

    def begin(self) -> None:
        """Called before a pass: compute the boundaries and levels of all linears."""
        if self.tables is None:
            return
        with torch.autocast(self.tables.unit.device.type, enabled=False):
            edges, values = self.tables.edges(), self.tables.values()
            values = values.to(product_type(values.device))
        pieces = zip(edges.split(self.tables.counts), values.split(self.tables.counts), strict=True)
        for (_, _, linear), piece in zip(self.places, pieces, strict=True):
            linear.edges, linear.values = piece

    def settle(self) -> None:
        """Called after parameters have changed: free the graph."""
        for inputs in self.inputs:
            inputs.forget()
        for _, _, linear in self.places:
            linear.edges = linear.values = None

    @torch.no_grad()
    def finish(self) -> None:
        """Put the quantized linears back, with the learned codes and levels."""
        self.settle()
        for gain in self.gains:
            gain.requires_grad_(False)
        if self.tables is None:
            return
        parts = self.tables.stored().split_rows(self.tables.counts)
        edges = self.tables.edges().split(self.tables.counts)
        for (block, name, linear), own, edge in zip(self.places, parts, edges, strict=True):
            assert isinstance(own, NamedParts)
            block.set_submodule(name, linear.finished(edge, own))


def gains_of(block: nn.Module) -> dict[str, nn.Parameter]:
    """The gains of the norms of a decoder block, by their names in it."""
    return {name: one for name, one in block.named_parameters() if one.dim() == 1 and name.endswith("norm.weight")}
