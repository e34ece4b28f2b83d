"""What is learned while codes stay: numbers of 16 bits that are there anyway and cost nothing at run time.

The gains of norms, biases, and the transforms of inputs. Weights are what their codes stand for, made once, and need
no gradient; a step is cheaper than one that moves rounding, and has few parameters to fit a text with. Inputs are
quantized with gradients straight-through. Gains after encoding are SandwichQuant's (arXiv 2608.24173), scales of values
and of the MLP those of HiRes (2609.34680); here they are channel by channel, in the rows of T.
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
"""What a tensor of a block is rounded to: by the position of the block, and its name there."""


class FrozenLinear(nn.Module):
    """A quantized linear whose codes stay."""

    def __init__(self, linear: QuantLinear, inputs: StraightInputs, dtype: torch.dtype | None) -> None:
        """`dtype` is that of the bias, where it has one that is learned."""
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
        """The linear with the bias that was learned."""
        (linear,) = self._linear
        if self.learned is not None:
            assert linear.bias is not None
            linear.bias.data = self.learned.value().to(linear.bias.dtype)
        return linear


class LightNetwork:
    """Decoder blocks of which numbers of 16 bits are learned for now."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        sites: Callable[[int], Sequence[Site]],
        gains: Sequence[LearnedGain],
        type_of: TypeOf,
        options: Tuning,
    ) -> None:
        """Put frozen linears in the place of quantized ones; `sites` gives those of a block that are quantized."""
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
                # A norm before the site has a gain for each channel.
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
        """What is learned at which rate."""
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
        """Put quantized linears back, with what was learned beside them."""
        self.settle()
        for gain in self.gains:
            gain.finish()
        for inputs in self.inputs:
            if inputs.moving is not None:
                inputs.moving.finish()
        for block, name, linear in self.places:
            block.set_submodule(name, linear.finished())
