"""Quantized linears while they are tuned: the same function, with parameters that have gradients.

A site has a correction R of its transform, T = T_0 R, which starts as the identity. A linear has an offset for each
weight, in steps between neighbouring codes. It starts at the rounding error (up to a margin). The moved weight is
rounded again, so beyond 1/2 it has moved to its neighbour. With a reach of 1 no offset goes further than one code:
rounding is tuned, weights are not trained. With a longer reach they are trained, on their grid. When T moves, the
weights follow, W' = W'_0 R^-T, before they are rounded. A block of weights may also have an offset of its scale's
exponent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mxrot.formats import TensorQuantizer, as_blocks, encode_blocks
from mxrot.formats.element import Element, look_up
from mxrot.formats.exponents import E8M0_MAX_BYTE
from mxrot.kernels import WeightMoves
from mxrot.layers import InputTransform, QuantLinear
from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.transforms import BlockDiagonal
from mxrot.tuning.inverses import inverses
from mxrot.tuning.loop import Group
from mxrot.tuning.straight_through import InverseTransposed, MoveWeights, RotateQuantize, RoundToStored

LARGEST_EXPONENT_OFFSET = 1.0


class TunableInputs(nn.Module):
    """Q(x T) of a site, computed once for all its linears."""

    def __init__(
        self, transform: InputTransform | None, quantizer: TensorQuantizer, readers: int, device: torch.device
    ) -> None:
        super().__init__()
        self.quantizer, self.readers = quantizer, readers
        self._transform = (transform,)  # in a tuple, so that it is not registered here
        matrices = transform.matrices() if transform is not None and transform.has_matrices else None
        block = 32 if matrices is None else matrices.shape[-1]
        start = BlockDiagonal.identity(block, device).matrices if matrices is None else matrices
        self.start: Tensor
        self.register_buffer("start", start.to(device, torch.float32), persistent=False)
        identity = torch.eye(block, device=device).expand_as(self.start).contiguous()
        self.correction = nn.Parameter(identity, requires_grad=matrices is not None)
        self.inverse: Tensor
        self.register_buffer("inverse", identity.clone(), persistent=False)
        self._last: tuple[Tensor, Tensor, Tensor | None] | None = None
        self._reads_left = 0

    @staticmethod
    def of(block: nn.Module, site: Site) -> TunableInputs:
        """The inputs of a quantized site of a decoder block."""
        first = block.get_submodule(site.linears[0])
        assert isinstance(first, QuantLinear) and first.activations is not None
        return TunableInputs(first.transform, first.activations, len(site.linears), first.weight_packed.device)

    @property
    def transform(self) -> InputTransform | None:
        return self._transform[0]

    def matrices(self) -> Tensor:
        """The matrices T as a checkpoint will hold them, float32 [1 | G, B, B]."""
        if not self.correction.requires_grad:
            return self.start
        with torch.autocast(self.start.device.type, enabled=False):
            rounded: Tensor = RoundToStored.apply(self.start @ self.correction)
        return rounded

    def follow(self) -> Tensor | None:
        """R^-T, which multiplies W'_0 if T moves; None if T is fixed."""
        if not self.correction.requires_grad:
            return None
        transposed: Tensor = InverseTransposed.apply(self.correction, self.inverse)
        return transposed

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Q(x T), and `follow`."""
        if self._last is None or self._last[0] is not x:
            led = x if self.transform is None else self.transform.lead(x)
            self._last = x, RotateQuantize.apply(led, self.matrices(), self.quantizer), self.follow()
            self._reads_left = self.readers
        _, quantized, follow = self._last
        self._reads_left -= 1
        if not self._reads_left:
            self.forget()  # with recomputation in the backward pass, keeping it would be useless
        return quantized, follow

    def forget(self) -> None:
        """Free the last input and its graph."""
        self._last = None


class TunableLinear(nn.Module):
    """A quantized linear whose codes and exponents can move."""

    def __init__(self, linear: QuantLinear, inputs: TunableInputs, margin: float, reach: float = 1.0) -> None:
        """`margin` and `reach` as in `Tuning`."""
        super().__init__()
        self.reach = reach
        quantized = linear.qtensor()
        self.format = quantized.format
        element = self.format.element
        values, scales = quantized.dequantize(), quantized.scales.values()
        wide = scales.repeat_interleave(self.format.block_in(values.shape[-1]), dim=-1)
        # Values on a 4-bit grid and their distances are bfloat16 numbers.
        up, down = ((d * wide).to(torch.bfloat16) for d in neighbour_distances(element, quantized.codes))
        self.start = WeightMoves(values.to(torch.bfloat16), up, down, scales)
        lost = torch.zeros_like(values) if linear.remainder is None else linear.remainder.to(values)
        distance = torch.where(lost > 0, up, down).float()
        start = torch.where(distance > 0, lost / distance, 0.0).clamp(margin - 0.5, 0.5 - margin)
        self.offset = nn.Parameter(start)
        self.exponent = nn.Parameter(torch.zeros_like(scales))
        self.bias = linear.bias
        self._inputs = (inputs,)  # in a tuple, so that it is not registered twice
        self._linear = (linear,)

    def weight(self, follow: Tensor | None) -> Tensor:
        """The quantized weights, bfloat16 [N, K]; `follow` is that of the site's inputs."""
        exponent = self.exponent if self.exponent.requires_grad else None
        with torch.autocast(self.offset.device.type, enabled=False):
            weight: Tensor = MoveWeights.apply(self.offset, follow, exponent, self.start, self.format.element)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]: on a CPU in the type of `x`, else bfloat16, which the next operations read faster."""
        quantized, follow = self._inputs[0](x)
        quantized, weight = quantized.to(torch.bfloat16), self.weight(follow)
        if x.device.type == "cpu":
            product = nn.functional.linear(quantized.float(), weight.float()).to(x.dtype)
        else:
            product = nn.functional.linear(quantized, weight)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    @torch.no_grad()
    def clamp(self) -> None:
        """Limit offsets to their reach, and those of exponents to one binade."""
        self.offset.clamp_(-self.reach, self.reach)
        if self.exponent.requires_grad:
            self.exponent.clamp_(-LARGEST_EXPONENT_OFFSET, LARGEST_EXPONENT_OFFSET)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """The quantized linear with the codes of the tuned weights."""
        linear = self._linear[0]
        scales = linear.qtensor().scales
        if self.exponent.requires_grad:
            stored = scales.stored.to(torch.int32) + self.exponent.round().to(torch.int32)
            scales = replace(scales, stored=stored.clamp(0, E8M0_MAX_BYTE).to(torch.uint8))
        weight = self.weight(self._inputs[0].follow())
        linear.set_weight(encode_blocks(as_blocks(weight, self.format, "weight"), scales, self.format))
        linear.remainder = None
        return linear


@dataclass(frozen=True)
class TunableBlock:
    """A decoder block while its quantized linears are tunable."""

    block: nn.Module
    inputs: dict[str, TunableInputs]
    """The inputs, by the name of their site."""
    linears: dict[str, TunableLinear]
    """The linears by their names in the block."""

    @staticmethod
    def of(block: nn.Module, sites: Sequence[Site], margin: float, reach: float = 1.0) -> TunableBlock:
        """Replace the quantized linears by tunable ones; `margin` and `reach` as in `Tuning`."""
        inputs, linears = {}, {}
        for site in sites:
            inputs[site.name] = TunableInputs.of(block, site)
            for name in site.linears:
                old = block.get_submodule(name)
                assert isinstance(old, QuantLinear)
                linears[name] = TunableLinear(old, inputs[site.name], margin, reach)
                block.set_submodule(name, linears[name])
        return TunableBlock(block, inputs, linears)

    def offsets(self) -> list[nn.Parameter]:
        return [linear.offset for linear in self.linears.values()]

    def corrections(self) -> list[nn.Parameter]:
        return [site.correction for site in self.inputs.values() if site.correction.requires_grad]

    def exponents(self) -> list[nn.Parameter]:
        return [linear.exponent for linear in self.linears.values() if linear.exponent.requires_grad]

    def fix_exponents(self) -> None:
        """Keep the exponents fixed."""
        for linear in self.linears.values():
            linear.exponent.requires_grad_(False)

    def fix_transforms(self) -> None:
        """Keep the transforms fixed."""
        for site in self.inputs.values():
            site.correction.requires_grad_(False)

    def groups(self, options: Tuning) -> list[Group]:
        """The groups of `parameter_groups` for this block alone."""
        return parameter_groups([self], options)

    def settle(self) -> None:
        """Call `settle` for this block alone."""
        settle([self])

    @torch.no_grad()
    def finish(self) -> None:
        """Put the quantized linears back, with the tuned codes and transform."""
        self.settle()
        matrices = {name: site.matrices().clone() for name, site in self.inputs.items()}
        finished = {name: linear.finished() for name, linear in self.linears.items()}
        for name, linear in finished.items():
            self.block.set_submodule(name, linear)
        for name, site in self.inputs.items():
            if site.transform is not None and not torch.equal(matrices[name], site.start):
                site.transform.weight.data = BlockDiagonal(matrices[name].double()).to_stored()


@torch.no_grad()
def settle(blocks: Sequence[TunableBlock]) -> None:
    """Called after parameters have changed: limit offsets, invert the corrections, free the graph."""
    sites = [site for block in blocks for site in block.inputs.values()]
    for block in blocks:
        for linear in block.linears.values():
            linear.clamp()
    for site in sites:
        site.forget()
    moving = [site for site in sites if site.correction.requires_grad]
    if moving:
        # For all sites at once, because it then takes only a few operations.
        found = inverses(torch.cat([site.correction for site in moving]))
        for site, part in zip(moving, found.split([len(site.correction) for site in moving]), strict=True):
            site.inverse.copy_(part)


def parameter_groups(blocks: Sequence[TunableBlock], options: Tuning) -> list[Group]:
    """The parameters with their rates. Those without a rate stay fixed."""
    groups = [Group([p for block in blocks for p in block.offsets()], options.offset_rate, options.decay)]
    for block in blocks:
        if not options.transform_rate:
            block.fix_transforms()
        if not options.exponent_rate:
            block.fix_exponents()
    corrections = [parameter for block in blocks for parameter in block.corrections()]
    exponents = [parameter for block in blocks for parameter in block.exponents()]
    groups.append(Group(corrections, options.transform_rate))
    groups.append(Group(exponents, options.exponent_rate))
    return [group for group in groups if group.parameters]


def neighbour_distances(element: Element, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The distances from the value of each code to the next larger and the next smaller value; 0 if there is none."""
    values = sorted({value for value in element.values if value == value and abs(value) <= element.max})
    place = {value: index for index, value in enumerate(values)}
    up, down = [], []
    for value in element.values:
        index = place.get(value)
        up.append(0.0 if index is None or index + 1 == len(values) else values[index + 1] - values[index])
        down.append(0.0 if not index else values[index] - values[index - 1])
    return look_up(tuple(up), codes, torch.float32), look_up(tuple(down), codes, torch.float32)
