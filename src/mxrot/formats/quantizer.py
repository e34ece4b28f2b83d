"""A format and a scale rule. Together they define how a tensor is quantized, and what is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.formats.block import fake_quantize
from mxrot.formats.catalog import Format, get_format
from mxrot.formats.look_up_table import LookUpTable
from mxrot.formats.parts import Parts
from mxrot.formats.scale import ScaleRule

PACKED = "weight_packed"
"""The name in a checkpoint of the packed codes of a weight."""
PART = "weight_"
"""What the names of its parts start with there."""


@dataclass(frozen=True)
class TensorQuantizer:
    """A format and the rule that chooses its scales."""

    format: Format
    rule: ScaleRule

    def __call__(self, x: Tensor) -> Tensor:
        """The values of the quantized tensor, float32."""
        return fake_quantize(x, self.format, self.rule)

    @property
    def is_exact_in_bfloat16(self) -> bool:
        """Are all quantized values bfloat16 numbers?"""
        return self.format.grid.is_exact_in_bfloat16(self.rule)

    @property
    def is_mxfp4(self) -> bool:
        return self.format.name == "mxfp4" and self.rule.is_power_of_two

    @property
    def looks_up(self) -> bool:
        """Are codes the places of values in a table that each block has?"""
        return isinstance(self.format.grid, LookUpTable)

    @property
    def looks_at_whole_tensor(self) -> bool:
        """Does what a block becomes depend on blocks of other rows?"""
        return self.format.grid.looks_at_whole_tensor(self.rule)

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of what stands beside the codes, as in `Parts.tensors`."""
        return tuple(part.name for part in self.format.grid.parts(self.rule))

    def as_parts(self, tensors: Sequence[Tensor]) -> Parts:
        """Parts as a checkpoint holds them, in the order of `part_names`."""
        return self.format.grid.as_parts(dict(zip(self.part_names, tensors, strict=True)), self.rule)

    def stored_parts(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor of a weight [out_features, in_features], by its name in a checkpoint.

        The codes come first. ConfigError if a row is not whole blocks.
        """
        format = self.format
        block = format.block_in(in_features)
        if in_features % block:
            raise ConfigError(
                f"rows of {in_features} elements are not a multiple of the block size {block} of {format.name}"
            )
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        found[PACKED] = (out_features, in_features * format.bits // 8), torch.uint8
        for part in format.grid.parts(self.rule):
            found[PART + part.name] = part.shape_of(out_features, in_features // block), part.dtype
        return found

    def stored_bytes(self, out_features: int, in_features: int) -> tuple[int, int]:
        """The bytes of the codes and of the other parts of such a weight."""
        codes, *parts = (
            math.prod(shape) * dtype.itemsize for shape, dtype in self.stored_parts(out_features, in_features).values()
        )
        return codes, sum(parts)

    @property
    def spelled(self) -> str:
        """Format and rule by name, and the clip where there is one, as `named` reads it: "mxfp4 even clip 0.9"."""
        return f"{self.format.name} {self.spelled_rule}"

    @property
    def spelled_rule(self) -> str:
        """The rule by its name, and its clip where it has one."""
        return f"{self.rule.name} clip {self.rule.clip}" if self.rule.is_clipped else self.rule.name

    @staticmethod
    def named(spelled: str) -> TensorQuantizer:
        """The inverse of `spelled`."""
        format, rule, *clip = spelled.split(" ")
        return TensorQuantizer.of(format, rule, float(clip[1]) if clip else 1.0)

    @staticmethod
    def of(format: str, rule: str | None = None, clip: float = 1.0) -> TensorQuantizer:
        """By the names of its format and rule; ConfigError if there is none of that name, or no such clip."""
        found = get_format(format)
        return TensorQuantizer(found, found.rule(rule).clipped(clip))
