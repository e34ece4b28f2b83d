"""The transform of a site's inputs: its stages, one after the other.

The last stage, where it is block-diagonal, is multiplied by the kernel that quantizes. All before it are multiplied in
float32, one after the other, and what comes out is rounded to the type of the inputs once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.transforms.stages import (
    SPECS,
    BlockDiagonal,
    BlockDiagonalSpec,
    Permutation,
    PermutationSpec,
    Stage,
    StageSpec,
    StoredTensors,
    working_type,
)


@dataclass(frozen=True, eq=False)
class SiteTransform:
    """The stages of one site's inputs, in the order in which they are applied; at least one."""

    stages: tuple[Stage, ...]

    @staticmethod
    def of(found: Stage | SiteTransform) -> SiteTransform:
        """A stage by itself as the whole transform."""
        return found if isinstance(found, SiteTransform) else SiteTransform((found,))

    @property
    def specs(self) -> tuple[StageSpec, ...]:
        return tuple(stage.spec for stage in self.stages)

    @property
    def matrices(self) -> Tensor | None:
        """T of the stage that the quantizer applies, float64 [1 | G, B, B]; None where the last is none."""
        last = self.stages[-1]
        return last.matrices if isinstance(last, BlockDiagonal) else None

    def lead(self, x: Tensor) -> Tensor:
        """`x` after all stages but the one of `matrices`, in the type of `x`."""
        return applied_in_turn(self.stages if self.matrices is None else self.stages[:-1], x)

    def apply(self, x: Tensor) -> Tensor:
        """What linears see before their inputs are quantized: float64 input in float64, all others in float32."""
        led = self.lead(x)
        return led.to(working_type(x)) if self.matrices is None else self.stages[-1].apply(led)

    def fold(self, weight: Tensor) -> Tensor:
        """W T^-T in float64 for `weight` [N, K]."""
        for stage in self.stages:
            weight = stage.fold(weight)
        return weight

    def after_scaling(self, values: Tensor) -> SiteTransform:
        """The transform that multiplies x_j by values_j first, [K] float64; its specs are those of `scaled_specs`."""
        return SiteTransform(_scaled(self.stages, values))

    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint holds, by the names of `stored_tensors`."""
        parts = [stage.stored() for stage in self.stages]
        return {name: parts[position][own] for name, (position, own) in _places(self.specs).items()}

    @staticmethod
    def from_stored(specs: Sequence[StageSpec], stored: Mapping[str, Tensor]) -> SiteTransform:
        """What runtimes apply, from the tensors of a checkpoint."""
        parts = by_stage(specs, stored)
        return SiteTransform(tuple(spec.stage(part) for spec, part in zip(specs, parts, strict=True)))

    def as_applied(self) -> SiteTransform:
        """This transform after the rounding of a checkpoint: fold weights against this one."""
        return SiteTransform(tuple(stage.as_applied() for stage in self.stages))


def applied_in_turn(stages: Sequence[Stage], x: Tensor) -> Tensor:
    """`x` after these stages, in float32 (float64 in float64), rounded to the type of `x` at the end."""
    found = x
    for stage in stages:
        found = stage.apply(found)
    return found.to(x.dtype)


def stored_tensors(specs: Sequence[StageSpec], width: int) -> StoredTensors:
    """What a checkpoint holds of a site's transform for `width` channels; ConfigError where a stage has none.

    The last stage that has a tensor of some name gives it that name; those before add their number.
    """
    parts = [spec.tensors(width) for spec in specs]
    return {name: parts[position][own] for name, (position, own) in _places(specs).items()}


def empty_tensors(specs: Sequence[StageSpec], width: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
    """The same as tensors without values."""
    shapes = stored_tensors(specs, width)
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def tensor_problem(name: str, tensor: Tensor) -> str | None:
    """What is wrong with one tensor of a transform, by its name there; None where nothing is."""
    own = re.sub(r"_\d+$", "", name)
    found = (kind().problem({own: tensor}) for kind in SPECS.values() if kind.names == (own,))
    return next((problem for problem in found if problem), None)


def by_stage(specs: Sequence[StageSpec], stored: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Of the tensors of a site's transform those of each stage, by the stage's own names."""
    parts: list[dict[str, Tensor]] = [{} for _ in specs]
    for name, (position, own) in _places(specs).items():
        parts[position][own] = stored[name]
    return parts


def _places(specs: Sequence[StageSpec]) -> dict[str, tuple[int, str]]:
    """Names in a checkpoint to the number of a stage and its own name for the tensor."""
    last = {own: position for position, spec in enumerate(specs) for own in spec.names}
    return {
        own if last[own] == position else f"{own}_{position}": (position, own)
        for position, spec in enumerate(specs)
        for own in spec.names
    }


def scaled_specs(specs: tuple[StageSpec, ...], width: int) -> tuple[StageSpec, ...]:
    """What `SiteTransform.after_scaling` makes of a transform: factors of channels join the first block-diagonal stage
    where only permutations come before it, and are a stage of their own elsewhere."""
    first, *rest = specs
    if isinstance(first, BlockDiagonalSpec):
        return (_one_each(first.block, width), *rest)
    if isinstance(first, PermutationSpec) and rest:
        return (first, *scaled_specs(tuple(rest), width))
    return (_one_each(1, width), *specs)


def _one_each(block: int, width: int) -> BlockDiagonalSpec:
    return BlockDiagonalSpec(block, "block" if width > block else "site")


def _scaled(stages: tuple[Stage, ...], values: Tensor) -> tuple[Stage, ...]:
    first, *rest = stages
    if isinstance(first, BlockDiagonal):
        return (BlockDiagonal.diagonal(values, first.block).compose(first), *rest)
    if isinstance(first, Permutation) and rest:
        return (first, *_scaled(tuple(rest), values[first.order]))
    return (BlockDiagonal.diagonal(values, 1), *stages)
