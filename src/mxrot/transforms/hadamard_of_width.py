"""One Hadamard matrix over all channels of a site: QuaRot's online transform before down_proj (arXiv 2404.00456,
section 4; R4 in SpinQuant, 2405.16406).

It spreads an outlier over the whole width, with K log K operations per token, and stores no tensor. As in QuaRot, the
matrix has no random signs. `orders.factors_of` gives its factors, and the widths that have one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.transforms.base import SiteSample, TransformMethod
from mxrot.transforms.orders import factors_of, multiply_by_hadamard
from mxrot.transforms.stages import Sharing, Stage, StageSpec, StoredTensors, working_type


@dataclass(frozen=True)
class HadamardOfWidthSpec(StageSpec):
    """One Hadamard matrix over all channels. `orders.factors_of` tells which widths have one."""

    kind = "hadamard-of-width"

    def check(self, width: int) -> None:
        try:
            factors_of(width)
        except ConfigError as error:
            if width % 128:
                raise
            raise ConfigError(
                f'{error}; take Hadamard matrices over blocks of 128 there (method = "hadamard", block = 128)'
            ) from error

    def tensors(self, width: int) -> StoredTensors:
        self.check(width)
        return {}

    def stage(self, stored: Mapping[str, Tensor]) -> HadamardOfWidth:
        return HadamardOfWidth()


@dataclass(frozen=True)
class HadamardOfWidth(Stage):
    """x -> x H with H orthonormal over all channels, its own inverse transpose."""

    @property
    def spec(self) -> HadamardOfWidthSpec:
        return HadamardOfWidthSpec()

    def apply(self, x: Tensor) -> Tensor:
        found: Tensor = multiply_by_hadamard(x.to(working_type(x)), False)
        return found

    def fold(self, weight: Tensor) -> Tensor:
        return self.apply(weight.double())

    def stored(self) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True)
class WholeHadamard(TransformMethod):
    """The orthonormal Hadamard matrix over the whole width."""

    name = "hadamard_of_width"
    is_one_for_all = True

    def __post_init__(self) -> None:
        super().__post_init__()
        default = next(field.default for field in fields(self) if field.name == "block")
        if self.block != default:
            raise ConfigError(
                f"transform {self.name}: mixes all channels, so block = {self.block} says nothing; leave it out, or "
                'take method "hadamard", whose matrices mix as many channels as block says'
            )

    @property
    def multiple(self) -> int:
        return 1

    def own_specs(self, width: int, sharing: Sharing) -> tuple[StageSpec, ...]:
        return (HadamardOfWidthSpec(),)

    def fit(self, sample: SiteSample, sharing: Sharing, generator: torch.Generator) -> HadamardOfWidth:
        return HadamardOfWidth()
