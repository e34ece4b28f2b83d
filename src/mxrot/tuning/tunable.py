"""The form that quantized linears take while they are tuned: the same function, with parameters that have gradients.

A site has a correction R of its transform, T = T_0 R, which starts as the identity. A linear has an offset for each
weight, in steps between neighbouring codes, that starts at what rounding took away (but for a margin). Where it leads
is rounded again, so beyond 1/2 the weight has moved to its neighbour. With a reach of 1 no offset goes further than one
code: rounding is tuned, weights are not trained; with a longer one they are, on their grid. When T moves, the weights
follow, W' = W'_0 R^-T, before they are rounded. A block of weights may have an offset of its scale's exponent, too.
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
        """Those of a quantized site of a decoder block."""
        first = block.get_submodule(site.linears[0])
        assert isinstance(first, QuantLinear) and first.activations is not None
        return TunableInputs(first.transform, first.activations, len(site.linears), first.weight_packed.device)

    @property
    def transform(self) -> InputTransform | None:
        return self._transform[0]

    def matrices(self) -> Tensor:
        """T as a checkpoint will hold it, float32 [1 | G, B, B]."""
        if not self.correction.requires_grad:
            return self.start
        with torch.autocast(self.start.device.type, enabled=False):
            rounded: Tensor = RoundToStored.apply(self.start @ self.correction)
        return rounded

    def follow(self) -> Tensor | None:
        """R^-T, which W'_0 is multiplied with when T moves; None while it cannot."""
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
            self.forget()  # with recomputation in the backward pass, it would be kept for nothing
        return quantized, follow

    def forget(self) -> None:
        """Let go of the last input and its graph."""
        self._last = None


class TunableLinear(nn.Module):
    """A quantized linear whose codes and exponents may move."""

    def __init__(self, linear: QuantLinear, inputs: TunableInputs, margin: float, reach: float = 1.0) -> None:
        """`margin` and `reach` as in `Tuning`."""
        super().__init__()
        self.reach = reach
        quantized = linear.qtensor()
        self.format = quantized.format
        element = self.format.element
        values, scales = quantized.dequantize(), quantized.scales.values()
        wide = scales.repeat_interleave(self.format.block_in(values.shape[-1]), dim=-1)
        # Values on a grid of four bits and their distances are bfloat16 numbers.
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
        """The quantized weights, bfloat16 [N, K]; `follow` as of the site's inputs."""
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
        """Keep offsets within their reach, and those of exponents within one binade."""
        self.offset.clamp_(-self.reach, self.reach)
        if self.exponent.requires_grad:
            self.exponent.clamp_(-LARGEST_EXPONENT_OFFSET, LARGEST_EXPONENT_OFFSET)

    @torch.no_grad()
    def finished(self) -> QuantLinear:
        """The linear with the codes that the tuned weights have."""
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
    """A decoder block whose quantized linears are tunable for now."""

    block: nn.Module
    inputs: dict[str, TunableInputs]
    """By the name of their site."""
    linears: dict[str, TunableLinear]
    """By their names in the block."""

    @staticmethod
    def of(block: nn.Module, sites: Sequence[Site], margin: float, reach: float = 1.0) -> TunableBlock:
        """Put tunable linears in the place of quantized ones; `margin` and `reach` as in `Tuning`."""
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
        """Leave the exponents as they are."""
        for linear in self.linears.values():
            linear.exponent.requires_grad_(False)

    def fix_transforms(self) -> None:
        """Leave the transforms as they are."""
        for site in self.inputs.values():
            site.correction.requires_grad_(False)

    def groups(self, options: Tuning) -> list[Group]:
        """As `parameter_groups` gives them for this block alone."""
        return parameter_groups([self], options)

    def settle(self) -> None:
        """As `settle` does for this block alone."""
        settle([self])

    @torch.no_grad()
    def finish(self) -> None:
        """Put quantized linears back, with the codes and the transform that tuning has led to."""
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
    """After parameters have changed: offsets within bounds, inverses of the corrections, no graph kept."""
    sites = [site for block in blocks for site in block.inputs.values()]
    for block in blocks:
        for linear in block.linears.values():
            linear.clamp()
    for site in sites:
        site.forget()
    moving = [site for site in sites if site.correction.requires_grad]
    if moving:
        # Here and not where they are needed: for all sites at once it is a few operations.
        found = inverses(torch.cat([site.correction for site in moving]))
        for site, part in zip(moving, found.split([len(site.correction) for site in moving]), strict=True):
            site.inverse.copy_(part)


def parameter_groups(blocks: Sequence[TunableBlock], options: Tuning) -> list[Group]:
    """What is learned at which rate; what has none is left as it is."""
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
    """How far the next larger and the next smaller value lie from that of each code; 0 where there is none."""
    values = sorted({value for value in element.values if value == value and abs(value) <= element.max})
    place = {value: index for index, value in enumerate(values)}
    up, down = [], []
    for value in element.values:
        index = place.get(value)
        up.append(0.0 if index is None or index + 1 == len(values) else values[index + 1] - values[index])
        down.append(0.0 if not index else values[index] - values[index - 1])
    return look_up(tuple(up), codes, torch.float32), look_up(tuple(down), codes, torch.float32)
