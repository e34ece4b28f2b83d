"""Learned weight clipping (OmniQuant, arXiv 2308.13137, section 3.2; DuQuant, arXiv 2406.01721, calls it LWC).

Each block of weights (a whole output channel in formats with such blocks) has two parameters. Its largest and its
smallest element are multiplied by their sigmoids before the rule chooses the scale,

    high = sigmoid(upper) max(W, 0)        low = sigmoid(lower) min(W, 0)

and the weights are rounded to nearest under that scale, in every forward pass, as a checkpoint will hold them. Both
start at sigmoid(4) = 0.982. The gradient is straight-through: the derivatives of the rounding of elements, zero point
and scale are 1. With s the scale, an element inside the range moves by (Q(w) - w) / s per unit of s. An element outside
moves with the end on its side. The weights themselves do not move.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer, as_blocks, encode_blocks
from mxrot.formats.block import choose_parts, round_blocks
from mxrot.formats.block_scales import BlockScales
from mxrot.formats.element import Element
from mxrot.layers import QuantLinear
from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.tuning.loop import Group
from mxrot.tuning.tunable import TunableInputs

START = 4.0
"""The start of both parameters of a block, before the sigmoid."""


def chosen_scales(low: Tensor, high: Tensor, quantizer: TensorQuantizer) -> BlockScales:
    """The scales of blocks whose smallest and largest elements are `low` and `high` [..., G]. A rule that sees only
    extremes gives the same scale for a block of these two."""
    found = choose_parts(torch.stack([low, high], dim=-1), quantizer.format, quantizer.rule)
    assert isinstance(found, BlockScales)
    return found


class RoundClipped(torch.autograd.Function):
    """Blocks rounded to nearest under the scales of given ends, with gradients for the ends."""

    @staticmethod
    def forward(ctx: Any, low: Tensor, high: Tensor, blocks: Tensor, quantizer: TensorQuantizer) -> Tensor:
        """`low` and `high` [N, G] and `blocks` [N, G, B], float32. Returns the values, in the shape of `blocks`."""
        scales = chosen_scales(low, high, quantizer)
        rounded = round_blocks(blocks, scales, quantizer.format)
        ctx.quantizer = quantizer
        ctx.save_for_backward(low, high, blocks, rounded, scales.values(), *_zero_points(scales))
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        low, high, blocks, rounded, scale, *zeros = ctx.saved_tensors
        element, wide = ctx.quantizer.format.element, scale[..., None]
        zero = zeros[0][..., None].to(blocks.dtype) if zeros else torch.zeros_like(wide)
        bottom, top = saturating(element)
        is_over, is_under = blocks > (top - zero) * wide, blocks < (bottom - zero) * wide
        inside = torch.where(is_over | is_under, 0.0, gradient * (rounded - blocks) / wide)
        of_scale = torch.where(scale > 0, inside.sum(dim=-1), 0.0)
        over = torch.where(is_over, gradient, 0.0).sum(dim=-1)
        under = torch.where(is_under, gradient, 0.0).sum(dim=-1)
        if zeros:
            # s = (high - low) / max. Saturated elements lie at high or low, except for the rounding of the zero point.
            lost = torch.where(scale > 0, -low / scale - zero.squeeze(-1), 0.0)
            share = (of_scale + lost * (over + under)) / element.max
            return under - share, over + share, None, None
        # s = max(high, -low) / max. Saturated elements lie at s max or -s max.
        whole = of_scale / element.max + over - under
        is_high = high >= -low
        return torch.where(is_high, 0.0, -whole), torch.where(is_high, whole, 0.0), None, None


def saturating(element: Element) -> tuple[float, float]:
    """The limits below and above which an element saturates: half a step beyond its last values."""
    values = sorted(value for value in set(element.values) if abs(value) <= element.max)
    top = element.max + (values[-1] - values[-2]) / 2
    return (-top if element.is_signed else values[0] - (values[1] - values[0]) / 2), top


def _zero_points(scales: BlockScales) -> list[Tensor]:
    return [] if scales.zero_points is None else [scales.zero_points]


class ClippedLinear(nn.Module):
    """A quantized linear whose scales can move between those of its full ends and zero."""

    def __init__(self, linear: QuantLinear, inputs: TunableInputs) -> None:
        super().__init__()
        weight = linear.qtensor().dequantize()
        if linear.remainder is not None:
            weight = weight + linear.remainder.to(weight)
        self.quantizer, self.bias = linear.weights, linear.bias
        self.blocks: Tensor
        self.register_buffer("blocks", as_blocks(weight, self.quantizer.format, "weight"), persistent=False)
        self.lower = nn.Parameter(torch.full(self.blocks.shape[:-1], START, device=weight.device))
        self.upper = nn.Parameter(self.lower.detach().clone())
        self._inputs = (inputs,)  # in a tuple, so that it is not registered twice
        self._linear = (linear,)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest element of each block after clipping, or 0: float32 [N, G]."""
        low, high = self.blocks.amin(dim=-1).clamp(max=0), self.blocks.amax(dim=-1).clamp(min=0)
        return torch.sigmoid(self.lower) * low, torch.sigmoid(self.upper) * high

    def weight(self) -> Tensor:
        """The quantized weights, float32 [N, K]."""
        with torch.autocast(self.blocks.device.type, enabled=False):
            rounded: Tensor = RoundClipped.apply(*self.ends(), self.blocks, self.quantizer)
        return rounded.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]. The product is bfloat16 under autocast."""
        quantized, _ = self._inputs[0](x)
        product = nn.functional.linear(quantized.to(torch.float32), self.weight())
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """The quantized linear with the codes and scales of the learned ends."""
        linear = self._linear[0]
        scales = chosen_scales(*self.ends(), self.quantizer)
        linear.set_weight(encode_blocks(self.blocks, scales, self.quantizer.format))
        linear.remainder = None
        return linear


@dataclass(frozen=True)
class ClippedBlock:
    """A decoder block while the ends of its weights are learned."""

    block: nn.Module
    inputs: tuple[TunableInputs, ...]
    linears: dict[str, ClippedLinear]
    """The linears by their names in the block."""

    @staticmethod
    def of(block: nn.Module, sites: Sequence[Site]) -> ClippedBlock:
        """Replace the quantized linears by clipped ones."""
        inputs, linears = [], {}
        for site in sites:
            own = TunableInputs.of(block, site)
            own.correction.requires_grad_(False)
            inputs.append(own)
            for name in site.linears:
                old = block.get_submodule(name)
                assert isinstance(old, QuantLinear)
                linears[name] = ClippedLinear(old, own)
                block.set_submodule(name, linears[name])
        return ClippedBlock(block, tuple(inputs), linears)

    def groups(self, options: Tuning) -> list[Group]:
        """Both ends of all blocks of weights."""
        ends = [end for linear in self.linears.values() for end in (linear.lower, linear.upper)]
        return [Group(ends, options.clip_rate)] if ends else []

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The shapes of the weights [N, K]."""
        blocks = [linear.blocks for linear in self.linears.values()]
        return [(own.shape[0], own.shape[1] * own.shape[2]) for own in blocks]

    def begin(self) -> None:
        """Called before a pass: nothing to do."""

    def settle(self) -> None:
        """Called after parameters have changed: free the graph."""
        for inputs in self.inputs:
            inputs.forget()

    def finish(self) -> None:
        """Put the quantized linears back."""
        self.settle()
        for name, linear in self.linears.items():
            self.block.set_submodule(name, linear.finished())
