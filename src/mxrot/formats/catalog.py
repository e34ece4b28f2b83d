"""Every number format, one constant each. Adding a line here adds the format everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, SupportsIndex

from mxrot.errors import ConfigError
from mxrot.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, UINT4, Element
from mxrot.formats.scale import E4M3_SCALE, E8M0, FP16_SCALE, ScaleRule, ScaleType, get_rule
from mxrot.nearest import not_known


@dataclass(frozen=True)
class Format:
    """A block format: equal elements in blocks along the last dimension, one scale a block."""

    name: str
    element: Element
    block: int
    """Elements that share a scale."""
    scale: ScaleType
    rules: tuple[str, ...]
    """Scale rules that make sense for it; the first is the default."""
    compressed_tensors: str | None = None
    """Name of its layout in compressed-tensors checkpoints, where mxrot writes one."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickled and copied by its name, as what stands in FORMATS: an element's NaN would not equal its copy."""
        return (get_format, (self.name,)) if FORMATS.get(self.name) is self else super().__reduce_ex__(protocol)

    @property
    def bits_per_element(self) -> float:
        """Bits of storage an element, scales and zero points included."""
        zero_point_bits = 0 if _is_signed(self.element) else self.element.bits
        return self.element.bits + (self.scale.bits + zero_point_bits) / self.block

    @property
    def default_rule(self) -> str:
        return self.rules[0]

    def rule(self, name: str | None = None) -> ScaleRule:
        """The rule called `name`, or the default one; ConfigError if the format has no such rule."""
        rule = get_rule(name or self.default_rule)
        if rule.name not in self.rules:
            raise ConfigError(f"format {self.name} has no scale rule {rule.name!r}; it has {', '.join(self.rules)}")
        return rule


def _is_signed(element: Element) -> bool:
    return min(element.values) < 0


_POWER_OF_TWO_RULES = ("even", "floor", "rceil", "mse", "log256")

MXFP4 = Format("mxfp4", E2M1, 32, E8M0, (*_POWER_OF_TWO_RULES, "x3", "7.25"), compressed_tensors="mxfp4-pack-quantized")
MXFP6_E2M3 = Format("mxfp6_e2m3", E2M3, 32, E8M0, _POWER_OF_TWO_RULES)
MXFP6_E3M2 = Format("mxfp6_e3m2", E3M2, 32, E8M0, _POWER_OF_TWO_RULES)
MXFP8_E4M3 = Format("mxfp8_e4m3", E4M3, 32, E8M0, _POWER_OF_TWO_RULES)
MXFP8_E5M2 = Format("mxfp8_e5m2", E5M2, 32, E8M0, _POWER_OF_TWO_RULES)
MXINT8 = Format("mxint8", INT8, 32, E8M0, _POWER_OF_TWO_RULES)
NVFP4 = Format("nvfp4", E2M1, 16, E4M3_SCALE, ("absmax",))
INT4_G32 = Format("int4_g32", INT4, 32, FP16_SCALE, ("absmax",))
INT4_G128 = Format("int4_g128", INT4, 128, FP16_SCALE, ("absmax",))
INT4_G32_ASYM = Format("int4_g32_asym", UINT4, 32, FP16_SCALE, ("minmax",))
INT4_G128_ASYM = Format("int4_g128_asym", UINT4, 128, FP16_SCALE, ("minmax",))

FORMATS: dict[str, Format] = {value.name: value for value in list(globals().values()) if isinstance(value, Format)}


def get_format(name: str) -> Format:
    """The format called `name`; ConfigError with the list of known ones."""
    if name not in FORMATS:
        raise ConfigError(not_known("format", name, FORMATS))
    return FORMATS[name]
