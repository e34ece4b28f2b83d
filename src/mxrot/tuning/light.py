"""Training with fixed codes: of 16-bit numbers that exist anyway and cost nothing at run time.

These are the gains of norms, biases, and the transforms of inputs. Weights are dequantized once, and need no gradient.
A step is cheaper than one that moves rounding, and has few parameters that could overfit. Inputs are quantized with
straight-through gradients. Gains after encoding are from SandwichQuant (arXiv 2608.24173), scales of values and of the
MLP from HiRes (2609.34680). Here they are per channel, in the rows of T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mxrot.layers import QuantLinear
from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.tuning.gains import LearnedGain, LearnedVector
from mxrot.tuning.loop import Group
from mxrot.tuning.moving_transform import MovingTransform
from mxrot.tuning.straight_inputs import StraightInputs, product_type

TypeOf = Callable[[int, str], torch.dtype]
"""The type that a tensor of a block is rounded to, by the index of the block and the tensor's name in it."""


class FrozenLinear(nn.Module):
    """A quantized linear with fixed codes."""

    def __init__(self, linear: QuantLinear, inputs: StraightInputs, dtype: torch.dtype | None) -> None:
        """`dtype` is the type of the bias, if it has one that is learned."""
        super().__init__()
        weight = linear.qtensor().dequantize()
        self.weight: Tensor
        self.register_buffer("weight", weight.to(product_type(weight.device)), persistent=False)
        self.bias = linear.bias
        self.learned: LearnedVector | None = None
        if linear.bias is not None and dtype is not None:
            start = linear.bias.detach().float()
            self.learned = LearnedVector(start, start.abs() + start.abs().mean(), dtype)
        self._inputs = (inputs,)  # in a tuple, so that it is not registered twice
        self._linear = (linear,)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        product = nn.functional.linear(self._inputs[0](x), self.weight)
        bias = self.bias if self.learned is None else self.learned.value()
        return product if bias is None else product + bias.to(product.dtype)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """The quantized linear with the learned bias."""
        (linear,) = self._linear
        if self.learned is not None:
            assert linear.bias is not None
            linear.bias.data = self.learned.value().to(linear.bias.dtype)
        return linear


class LightNetwork:
    """Decoder blocks while their 16-bit numbers are learned."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        sites: Callable[[int], Sequence[Site]],
        gains: Sequence[LearnedGain],
        type_of: TypeOf,
        options: Tuning,
    ) -> None:
        """Replace the quantized linears by frozen ones. `sites` gives the quantized sites of a block."""
        self.gains = list(gains)
        self.inputs: list[StraightInputs] = []
        self.places: list[tuple[nn.Module, str, FrozenLinear]] = []
        self.corrections: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []
        for index, block in enumerate(blocks):
            for site in sites(index):
                inputs = self._inputs_of(block, site, options)
                for name in site.linears:
                    old = block.get_submodule(name)
                    assert isinstance(old, QuantLinear)
                    dtype = type_of(index, f"{name}.bias") if options.bias_rate and old.bias is not None else None
                    linear = FrozenLinear(old, inputs, dtype)
                    block.set_submodule(name, linear)
                    self.places.append((block, name, linear))

    def _inputs_of(self, block: nn.Module, site: Site, options: Tuning) -> StraightInputs:
        first = block.get_submodule(site.linears[0])
        assert isinstance(first, QuantLinear) and first.activations is not None
        transform, moving = first.transform, None
        if transform is not None and transform.has_matrices:
            moving = MovingTransform(transform, first.in_features)
            moving.correction.requires_grad_(options.transform_rate > 0)
            if options.transform_rate:
                self.corrections.append(moving.correction)
            if moving.scales is not None:
                # A norm before the site already has a gain for each channel.
                is_learned = options.scale_rate > 0 and (site.norm is None or not self.gains)
                moving.scales.requires_grad_(is_learned)
                self.scales += [moving.scales] if is_learned else []
        inputs = StraightInputs(transform, first.activations, len(site.linears), moving)
        self.inputs.append(inputs)
        return inputs

    @property
    def shapes(self) -> list[tuple[int, int]]:
        return [(linear.weight.shape[0], linear.weight.shape[1]) for _, _, linear in self.places]

    def groups(self, options: Tuning) -> list[Group]:
        """The parameters with their rates."""
        biases = [linear.learned.change for _, _, linear in self.places if linear.learned is not None]
        found = [
            Group([gain.vector.change for gain in self.gains], options.norm_rate),
            Group(biases, options.bias_rate),
            Group(self.scales, options.scale_rate),
            Group(self.corrections, options.transform_rate),
        ]
        return [group for group in found if group.rate and group.parameters]

    def begin(self) -> None:
        for gain in self.gains:
            gain.begin()

    def settle(self) -> None:
        for gain in self.gains:
            gain.settle()
        for inputs in self.inputs:
            inputs.forget()

    @torch.no_grad()
    def finish(self) -> None:
        """Put the quantized linears back, with what was learned beside them."""
        self.settle()
        for gain in self.gains:
            gain.finish()
        for inputs in self.inputs:
            if inputs.moving is not None:
                inputs.moving.finish()
        for block, name, linear in self.places:
            block.set_submodule(name, linear.finished())
