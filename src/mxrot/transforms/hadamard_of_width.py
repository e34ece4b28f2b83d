"""One Hadamard matrix over all channels of a site: QuaRot's online transform before down_proj (arXiv 2404.00456,
section 4; R4 in SpinQuant, 2405.16406).

It spreads an outlier over the whole width, at K log K operations a token, and keeps no tensor. The matrix has no random
signs, as in QuaRot: `orders.factors_of` says how it is made up, and which widths have one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from mxrot.errors import ConfigError
from mxrot.transforms.base import SiteSample, TransformMethod
from mxrot.transforms.stages import HadamardOfWidth, HadamardOfWidthSpec, Sharing, StageSpec


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
