"""The transform of a site's inputs: its stages, one after the other.

If the last stage is block-diagonal, the kernel that quantizes also multiplies by it. All stages before it are
multiplied in float32, one after the other, and the result is rounded once to the type of the inputs.
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
    """The stages of one site's inputs, in the order of application; at least one."""

    stages: tuple[Stage, ...]

    @staticmethod
    def of(found: Stage | SiteTransform) -> SiteTransform:
        """A stage alone as the whole transform."""
        return found if isinstance(found, SiteTransform) else SiteTransform((found,))

    @property
    def specs(self) -> tuple[StageSpec, ...]:
        return tuple(stage.spec for stage in self.stages)

    @property
    def matrices(self) -> Tensor | None:
        """T of the stage that the quantizer applies, float64 [1 | G, B, B]; None if the last stage is not
        block-diagonal."""
        last = self.stages[-1]
        return last.matrices if isinstance(last, BlockDiagonal) else None

    def lead(self, x: Tensor) -> Tensor:
        """`x` after all stages except the one of `matrices`, in the type of `x`."""
        return applied_in_turn(self.stages if self.matrices is None else self.stages[:-1], x)

    def apply(self, x: Tensor) -> Tensor:
        """The inputs of the linears before quantization: float64 for float64 input, else float32."""
        led = self.lead(x)
        return led.to(working_type(x)) if self.matrices is None else self.stages[-1].apply(led)

    def fold(self, weight: Tensor) -> Tensor:
        """W T^-T in float64 for `weight` [N, K]."""
        for stage in self.stages:
            weight = stage.fold(weight)
        return weight

    def after_scaling(self, values: Tensor) -> SiteTransform:
        """The transform with a multiplication of x_j by values_j first, [K] float64. Its specs are those of
        `scaled_specs`."""
        return SiteTransform(_scaled(self.stages, values))

    def stored(self) -> dict[str, Tensor]:
        """The tensors for a checkpoint, by the names of `stored_tensors`."""
        parts = [stage.stored() for stage in self.stages]
        return {name: parts[position][own] for name, (position, own) in _places(self.specs).items()}

    @staticmethod
    def from_stored(specs: Sequence[StageSpec], stored: Mapping[str, Tensor]) -> SiteTransform:
        """The transform that runtimes apply, from the tensors of a checkpoint."""
        parts = by_stage(specs, stored)
        return SiteTransform(tuple(spec.stage(part) for spec, part in zip(specs, parts, strict=True)))

    def as_applied(self) -> SiteTransform:
        """This transform after the rounding of a checkpoint. Weights are folded against this one."""
        return SiteTransform(tuple(stage.as_applied() for stage in self.stages))


def applied_in_turn(stages: Sequence[Stage], x: Tensor) -> Tensor:
    """`x` after these stages, in float32 (float64 for float64), rounded to the type of `x` at the end."""
    found = x
    for stage in stages:
        found = stage.apply(found)
    return found.to(x.dtype)


def stored_tensors(specs: Sequence[StageSpec], width: int) -> StoredTensors:
    """The tensors of a site's transform in a checkpoint, for `width` channels. ConfigError if a stage does not allow
    it.

    The last stage with a tensor of some name keeps that name. Earlier stages add their number.
    """
    parts = [spec.tensors(width) for spec in specs]
    return {name: parts[position][own] for name, (position, own) in _places(specs).items()}


def empty_tensors(specs: Sequence[StageSpec], width: int, device: torch.device | str = "meta") -> dict[str, Tensor]:
    """The same tensors without values."""
    shapes = stored_tensors(specs, width)
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}


def tensor_problem(name: str, tensor: Tensor) -> str | None:
    """The problem of one tensor of a transform, by its name there; None if it is valid."""
    own = re.sub(r"_\d+$", "", name)
    found = (kind().problem({own: tensor}) for kind in SPECS.values() if kind.names == (own,))
    return next((problem for problem in found if problem), None)


def by_stage(specs: Sequence[StageSpec], stored: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each stage of a site's transform, by the stage's own names."""
    parts: list[dict[str, Tensor]] = [{} for _ in specs]
    for name, (position, own) in _places(specs).items():
        parts[position][own] = stored[name]
    return parts


def _places(specs: Sequence[StageSpec]) -> dict[str, tuple[int, str]]:
    """From names in a checkpoint to the number of a stage and its own name for the tensor."""
    last = {own: position for position, spec in enumerate(specs) for own in spec.names}
    return {
        own if last[own] == position else f"{own}_{position}": (position, own)
        for position, spec in enumerate(specs)
        for own in spec.names
    }


def scaled_specs(specs: tuple[StageSpec, ...], width: int) -> tuple[StageSpec, ...]:
    """The specs after `SiteTransform.after_scaling`. The channel factors join the first block-diagonal stage if only
    permutations come before it, otherwise they become a stage of their own."""
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
