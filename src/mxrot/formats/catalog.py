"""All number formats, one constant for each. A line added here adds a format everywhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, SupportsIndex

from mxrot.errors import ConfigError
from mxrot.formats.block_scales import E4M3_SCALE, E8M0, FP16_SCALE, ScaleType
from mxrot.formats.by_sign import BySign
from mxrot.formats.element import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, UINT2, UINT4, Element
from mxrot.formats.grid import Grid, Uniform
from mxrot.formats.look_up_table import LookUpTable
from mxrot.formats.scale import ScaleRule, get_rule
from mxrot.nearest import not_known


@dataclass(frozen=True)
class Format:
    """A block format. Blocks lie along the last dimension, and each holds values of one grid."""

    name: str
    grid: Grid
    block: int | None
    """The number of elements that share scales and other parts. None means the whole row."""
    rules: tuple[str, ...]
    """The scale rules of the format. The first is the default."""
    longest_block: int | None = None
    """If set, blocks fit the row: a block is the largest multiple of `block` that divides the row, up to this size."""
    compressed_tensors: str | None = None
    """The name of its layout in compressed-tensors checkpoints, if mxrot writes one."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle and copy a format of FORMATS by its name: the NaN of an element would not equal its copy."""
        return (get_format, (self.name,)) if FORMATS.get(self.name) is self else super().__reduce_ex__(protocol)

    @property
    def bits(self) -> int:
        """The number of bits of a code."""
        return self.grid.bits

    @property
    def uniform(self) -> Uniform:
        """The grid of a format with one scale per block. Kernels support no other."""
        assert isinstance(self.grid, Uniform)
        return self.grid

    @property
    def element(self) -> Element:
        """The element of a uniform grid."""
        return self.uniform.element

    @property
    def scale(self) -> ScaleType:
        """The scale type of a uniform grid."""
        return self.uniform.scale

    def block_in(self, columns: int) -> int:
        """Elements of a block in a row of `columns` elements, at least 1."""
        if self.block is None:
            return max(columns, 1)
        sizes = range(self.longest_block or self.block, self.block, -self.block)
        return next((size for size in sizes if columns and columns % size == 0), self.block)

    def bits_in(self, columns: int) -> float:
        """The bits that a row of `columns` elements takes under the default rule, codes and all parts included."""
        blocks = columns / self.block_in(columns)
        parts = [part for part in self.grid.parts(self.rule()) if part.per != "tensor"]
        return columns * self.bits + sum(
            part.bits * math.prod(part.shape) * (blocks if part.per == "block" else 1) for part in parts
        )

    @property
    def bits_per_element(self) -> float:
        """Bits of storage per element, with scales and zero points but without parts of a whole row or tensor.

        Blocks are taken as long as the format allows.
        """
        block = self.longest_block or self.block
        return float(self.bits) if block is None else self.bits_in(block) / block

    @property
    def default_rule(self) -> str:
        return self.rules[0]

    def rule(self, name: str | None = None) -> ScaleRule:
        """The rule with this name, or the default rule. ConfigError if the format has no such rule."""
        rule = get_rule(name or self.default_rule)
        if rule.name not in self.rules:
            raise ConfigError(f"format {self.name} has no scale rule {rule.name!r}; it has {', '.join(self.rules)}")
        return rule


_MX_RULES = ("even", "floor", "rceil", "mse", "log256")

MXFP4 = Format(
    "mxfp4",
    Uniform(E2M1, E8M0),
    32,
    (*_MX_RULES, "x3", "7.25", "search", "x3-search"),
    compressed_tensors="mxfp4-pack-quantized",
)
MXFP6_E2M3 = Format("mxfp6_e2m3", Uniform(E2M3, E8M0), 32, _MX_RULES)
MXFP6_E3M2 = Format("mxfp6_e3m2", Uniform(E3M2, E8M0), 32, _MX_RULES)
MXFP8_E4M3 = Format("mxfp8_e4m3", Uniform(E4M3, E8M0), 32, _MX_RULES)
MXFP8_E5M2 = Format("mxfp8_e5m2", Uniform(E5M2, E8M0), 32, _MX_RULES)
MXINT8 = Format("mxint8", Uniform(INT8, E8M0), 32, _MX_RULES)
NVFP4 = Format("nvfp4", Uniform(E2M1, E4M3_SCALE), 16, ("absmax",))
AMXFP4 = Format("amxfp4", BySign(E2M1, E5M2), 32, ("absmax",))
INT4_G32 = Format("int4_g32", Uniform(INT4, FP16_SCALE), 32, ("absmax",))
INT4_G128 = Format("int4_g128", Uniform(INT4, FP16_SCALE), 128, ("absmax",))
INT4_G32_ASYM = Format("int4_g32_asym", Uniform(UINT4, FP16_SCALE), 32, ("minmax",))
INT4_G128_ASYM = Format("int4_g128_asym", Uniform(UINT4, FP16_SCALE), 128, ("minmax",))
INT4_ROW_ASYM = Format("int4_row_asym", Uniform(UINT4, FP16_SCALE), None, ("minmax",))
INT2_G32_ASYM = Format("int2_g32_asym", Uniform(UINT2, FP16_SCALE), 32, ("minmax",))
INT2_ROW_ASYM = Format("int2_row_asym", Uniform(UINT2, FP16_SCALE), None, ("minmax",))
INT4_ROW = Format("int4_row", Uniform(INT4, FP16_SCALE), None, ("absmax", "absmax-search"))
LUT2 = Format("lut2", LookUpTable(), 32, ("lloyd", "spaced"), longest_block=128)
LUT2_G128 = Format("lut2_g128", LookUpTable(), 128, ("lloyd", "spaced"))
INT8_ROW = Format("int8_row", Uniform(INT8, FP16_SCALE), None, ("absmax",))

FORMATS: dict[str, Format] = {value.name: value for value in list(globals().values()) if isinstance(value, Format)}


def get_format(name: str) -> Format:
    """The format with this name. ConfigError, with a list of all formats, if there is none."""
    if name not in FORMATS:
        raise ConfigError(not_known("format", name, FORMATS))
    return FORMATS[name]
