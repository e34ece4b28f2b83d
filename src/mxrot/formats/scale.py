"""The rules that choose block scales.

A rule takes blocks [..., B] and returns one scale per block. Exponents are read from the exponent bits of the block
maximum, never from a floating-point logarithm.

The runtime that serves a model decides which rule quantizes the activations, so every reported accuracy names its rule.
Weights may use any rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats.block_scales import E4M3_SCALE, FP16_SCALE, LOG256_LEVELS, BlockScales, ScaleType
from mxrot.formats.element import Element
from mxrot.formats.exponents import (
    block_maxima,
    ceil_exponents,
    e8m0_bytes,
    even_exponents,
    floor_exponents,
    least_error_exponents,
    seven_and_a_quarter_exponents,
    third_exponents,
)
from mxrot.formats.shrinks import shrunk_maxima
from mxrot.nearest import not_known

_SMALLEST_NORMAL = 2.0**-126
_WHOLE = 1 << 23
"""One more than the largest fraction field of a float32."""


@dataclass(frozen=True)
class ScaleRule(ABC):
    """One way to choose block scales."""

    name: str
    summary: str
    dynamic: bool = True
    """True if it may quantize activations at run time."""
    raises_from: Callable[..., int] | None = None
    """For an exponent floor(log2 amax) - emax or one more: the least fraction field of amax that gives the latter.

    Called with (element) for float32, with (element, 2^n) for a float with n fraction bits. None for other rules.
    """
    by_row: bool = False
    """If a scale depends on other blocks: True if these are all in its own row."""
    clip: float = 1.0
    """The factor applied to the largest and smallest element of a block before the rule sees them. Below 1, elements
    beyond it saturate and the others get finer steps."""

    def clipped(self, clip: float) -> ScaleRule:
        """This rule with `clip`. ConfigError unless it is above 0 and at most 1."""
        if not 0 < clip <= 1:
            raise ConfigError(f"clip {clip} is not above 0 and at most 1")
        # With a clip, the fraction field of the unclipped maximum no longer tells which exponent is chosen.
        return self if clip == self.clip else replace(self, clip=clip, raises_from=None)

    @property
    def is_clipped(self) -> bool:
        return self.clip != 1

    @property
    def sees_extremes_only(self) -> bool:
        """True if scales depend on the largest and the smallest element of each block alone."""
        return True

    def maxima(self, blocks: Tensor) -> Tensor:
        """max |x| of each block, clipped; NaN if the block holds one."""
        return self.cut(block_maxima(blocks))

    def cut(self, extremes: Tensor) -> Tensor:
        """The largest or smallest elements of blocks, clipped."""
        return extremes * self.clip if self.is_clipped else extremes

    def looks_at_whole_tensor(self, scale_type: ScaleType) -> bool:
        """True if the scale of a block depends on blocks of other rows."""
        return False

    def has_tensor_scale(self, scale_type: ScaleType) -> bool:
        """True if one tensor scale multiplies the scales of all blocks."""
        return False

    def for_rows(self) -> ScaleRule:
        """This rule for inputs. Their rows are tokens, and a token must not depend on others in its batch."""
        return self

    def stored_type(self, scale_type: ScaleType) -> ScaleType:
        """How this rule stores its scales in a format with the scale type `scale_type`."""
        return scale_type

    @property
    def is_power_of_two(self) -> bool:
        """True if every scale is a power of two."""
        return False

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle and copy a rule of RULES by its name."""
        return (get_rule, (self.name,)) if RULES.get(self.name) is self else super().__reduce_ex__(protocol)

    @abstractmethod
    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        """The scales of float32/float64 `blocks` [..., B]. A block that holds NaN or Inf gets the scale NaN."""


@dataclass(frozen=True)
class ExponentRule(ScaleRule):
    """A rule that picks a power of two."""

    exponents: Callable[[Tensor, Element], Tensor] = floor_exponents
    """Integer exponents [...] for the maxima [...] of blocks; those out of range saturate."""
    factor: float | None = None
    """A constant that multiplies every scale. None means 1."""

    @property
    def is_power_of_two(self) -> bool:
        return self.factor is None

    def has_tensor_scale(self, scale_type: ScaleType) -> bool:
        return self.factor is not None

    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        maxima = self.maxima(blocks)
        stored = e8m0_bytes(self._exponents(blocks, maxima, element), maxima)
        factor = None if self.factor is None else blocks.new_full((), self.factor, dtype=torch.float32)
        return BlockScales(stored, scale_type, tensor_scale=factor)

    def _exponents(self, blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
        return self.exponents(maxima, element)


@dataclass(frozen=True)
class LeastErrorRule(ExponentRule):
    """A rule that tries an exponent and its two neighbours on the block itself."""

    @property
    def sees_extremes_only(self) -> bool:
        return False

    def _exponents(self, blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
        return least_error_exponents(blocks, self.exponents(maxima, element), element)


@dataclass(frozen=True)
class ShrunkRule(ExponentRule):
    """A rule that shrinks the maxima first (`formats.shrinks`): a clip for each block, chosen by its own error."""

    @property
    def sees_extremes_only(self) -> bool:
        return False

    def _exponents(self, blocks: Tensor, maxima: Tensor, element: Element) -> Tensor:
        return self.exponents(shrunk_maxima(blocks, maxima, element), element)


@dataclass(frozen=True)
class Log256Rule(ScaleRule):
    """amax / max, with its logarithm floored to 256 levels between the smallest and the largest of the tensor.

    The code released with DuQuant++ computes this instead of E8M0. No hardware reads it. If all scales of a tensor are
    equal, they stay as they are.
    """

    def looks_at_whole_tensor(self, scale_type: ScaleType) -> bool:
        return not self.by_row

    def for_rows(self) -> ScaleRule:
        return replace(self, by_row=True)

    def stored_type(self, scale_type: ScaleType) -> ScaleType:
        return LOG256_LEVELS

    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        logs = (self.maxima(blocks).float() / element.max).clamp(min=_SMALLEST_NORMAL).log2()
        if logs.numel() == 0:
            return BlockScales(logs, LOG256_LEVELS)
        low, high = logs.aminmax(dim=-1, keepdim=True) if self.by_row else logs.aminmax()
        span = high - low
        levels = (255 * (logs - low) / torch.where(span > 0, span, 1.0)).floor().clamp(0, 255)
        return BlockScales(torch.exp2(low + levels * span / 255), LOG256_LEVELS)


@dataclass(frozen=True)
class AbsMaxRule(ScaleRule):
    """amax / max, rounded to the scale type."""

    shrinks: bool = False
    """True if amax is shrunk first, as in `ShrunkRule`."""

    @property
    def sees_extremes_only(self) -> bool:
        return not self.shrinks

    def looks_at_whole_tensor(self, scale_type: ScaleType) -> bool:
        return scale_type == E4M3_SCALE and not self.by_row

    def has_tensor_scale(self, scale_type: ScaleType) -> bool:
        return scale_type == E4M3_SCALE

    def for_rows(self) -> ScaleRule:
        return replace(self, by_row=True)

    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        maxima = self.maxima(blocks)
        maxima = shrunk_maxima(blocks, maxima, element) if self.shrinks else maxima
        scales = maxima / element.max
        if scale_type == FP16_SCALE:
            return BlockScales(scales.to(torch.float16), scale_type)
        largest_scale = torch.finfo(torch.float8_e4m3fn).max
        if not maxima.numel():
            peak = maxima.new_zeros(())
        else:
            peak = maxima.amax(dim=-1, keepdim=True) if self.by_row else maxima.amax()
        tensor_scale = (peak / (element.max * largest_scale)).float()
        relative = scales / torch.where(tensor_scale > 0, tensor_scale, 1.0).to(scales.dtype)
        stored = relative.clamp(max=largest_scale).to(torch.float8_e4m3fn)
        return BlockScales(stored, scale_type, tensor_scale=tensor_scale)


@dataclass(frozen=True)
class MinMaxRule(ScaleRule):
    """(max - min) / the largest code in FP16, and an integer zero point, for unsigned elements. The range always
    includes 0."""

    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        low, high = self.cut(blocks.amin(dim=-1).clamp(max=0)), self.cut(blocks.amax(dim=-1).clamp(min=0))
        stored = ((high - low) / element.max).to(scale_type.dtype)
        scale = stored.to(blocks.dtype)
        zero_points = (-low / torch.where(scale > 0, scale, 1.0)).round().clamp(0, element.max)
        return BlockScales(stored, scale_type, zero_points=zero_points.nan_to_num().to(torch.uint8))


@dataclass(frozen=True)
class LevelsRule(ScaleRule):
    """A rule for formats whose blocks hold their own values. The grid reads its settings."""

    is_spaced: bool = True
    """True if the values are equally spaced between the ends of the block."""

    @property
    def sees_extremes_only(self) -> bool:
        return self.is_spaced

    def choose(self, blocks: Tensor, element: Element, scale_type: ScaleType) -> BlockScales:
        raise TypeError(f"rule {self.name} chooses values, and a uniform format has those of its element")


# Named functions, so that a rule outside RULES can be pickled, too.
def _never_raises(element: Element, whole: int = _WHOLE) -> int:
    return whole


def _raises_where_rounded_up(element: Element, whole: int = _WHOLE) -> int:
    return whole - (whole >> (element.mantissa_bits + 1))


def _raises_beyond_max(element: Element, whole: int = _WHOLE) -> int:
    return int((math.ldexp(element.max, -element.max_exponent) - 1) * whole) + 1


RULES: dict[str, ScaleRule] = {
    rule.name: rule
    for rule in (
        ExponentRule(
            "floor",
            "floor(log2 amax) - emax: OCP, microxcaling, gguf",
            raises_from=_never_raises,
            exponents=floor_exponents,
        ),
        ExponentRule(
            "even",
            "floor of amax rounded: compressed-tensors, Quark, vLLM emulation",
            raises_from=_raises_where_rounded_up,
            exponents=even_exponents,
        ),
        ExponentRule(
            "rceil",
            "ceil(log2(amax / max)): FlashInfer, AITER, cuBLAS",
            raises_from=_raises_beyond_max,
            exponents=ceil_exponents,
        ),
        ExponentRule(
            "7.25",
            "ceil(log2(amax / 7.25)): AutoRound, for weights",
            dynamic=False,
            exponents=seven_and_a_quarter_exponents,
        ),
        ExponentRule("x3", "2^floor(log2 amax) / 3: QuTLASS, FP-Quant", exponents=third_exponents, factor=1 / 3),
        LeastErrorRule("mse", "least squared error of three exponents", dynamic=False),
        ShrunkRule(
            "search",
            "even, of maxima that are shrunk by least |error|^2.4: MR-GPTQ's search, its scales cast to E8M0",
            dynamic=False,
            exponents=even_exponents,
        ),
        ShrunkRule(
            "x3-search",
            "x3, of maxima that are shrunk by least |error|^2.4: MR-GPTQ",
            dynamic=False,
            exponents=third_exponents,
            factor=1 / 3,
        ),
        Log256Rule("log256", "256 levels of log2(scale): released DuQuant++ code, no hardware"),
        AbsMaxRule("absmax", "amax / max in the scale's own type"),
        AbsMaxRule(
            "absmax-search",
            "absmax, of maxima that are shrunk by least |error|^2.4: QuaRot's weights",
            dynamic=False,
            shrinks=True,
        ),
        MinMaxRule("minmax", "(max - min) / the largest code, and a zero point"),
        LevelsRule("lloyd", "the four values of least squared error", dynamic=False, is_spaced=False),
        LevelsRule("spaced", "four equally spaced values from the smallest to the largest element", dynamic=False),
    )
}


def get_rule(name: str) -> ScaleRule:
    """The rule called `name`. ConfigError, with a list of all rules, if there is none."""
    if name not in RULES:
        raise ConfigError(not_known("scale rule", name, RULES))
    return RULES[name]
