"""A format and a scale rule. Together they define how a tensor is quantized and stored."""

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
"""The name of a weight's packed codes in a checkpoint."""
PART = "weight_"
"""The prefix of the names of its parts in a checkpoint."""


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
        """True if all quantized values are bfloat16 numbers."""
        return self.format.grid.is_exact_in_bfloat16(self.rule)

    @property
    def is_mxfp4(self) -> bool:
        return self.format.name == "mxfp4" and self.rule.is_power_of_two

    @property
    def looks_up(self) -> bool:
        """True if codes are indices into a table of values that each block has."""
        return isinstance(self.format.grid, LookUpTable)

    @property
    def looks_at_whole_tensor(self) -> bool:
        """True if the result for a block depends on blocks of other rows."""
        return self.format.grid.looks_at_whole_tensor(self.rule)

    @property
    def part_names(self) -> tuple[str, ...]:
        """The names of the parts, as in `Parts.tensors`."""
        return tuple(part.name for part in self.format.grid.parts(self.rule))

    def as_parts(self, tensors: Sequence[Tensor]) -> Parts:
        """The parts, from the tensors of a checkpoint in the order of `part_names`."""
        return self.format.grid.as_parts(dict(zip(self.part_names, tensors, strict=True)), self.rule)

    def stored_parts(self, out_features: int, in_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """The shape and type of each tensor of a weight [out_features, in_features], by its name in a checkpoint.

        The codes come first. ConfigError if a row does not hold whole blocks.
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
        """The names of format and rule, and the clip if there is one, as `named` reads them: "mxfp4 even clip 0.9"."""
        return f"{self.format.name} {self.spelled_rule}"

    @property
    def spelled_rule(self) -> str:
        """The name of the rule, and its clip if it has one."""
        return f"{self.rule.name} clip {self.rule.clip}" if self.rule.is_clipped else self.rule.name

    @staticmethod
    def named(spelled: str) -> TensorQuantizer:
        """The inverse of `spelled`."""
        format, rule, *clip = spelled.split(" ")
        return TensorQuantizer.of(format, rule, float(clip[1]) if clip else 1.0)

    @staticmethod
    def of(format: str, rule: str | None = None, clip: float = 1.0) -> TensorQuantizer:
        """The quantizer with these names of format and rule. ConfigError if one does not exist or the clip is
        invalid."""
        found = get_format(format)
        return TensorQuantizer(found, found.rule(rule).clipped(clip))
