"""What distillation moves in a network: rounding and transforms, two-bit weights and their levels, or gains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.tuning.gains import LearnedGain
from mxrot.tuning.levels import LevelsNetwork
from mxrot.tuning.light import LightNetwork, TypeOf
from mxrot.tuning.loop import Group
from mxrot.tuning.tunable import TunableBlock, parameter_groups, settle


class TunedNetwork(Protocol):
    """A network whose quantized linears are temporarily replaced."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """The shapes of the quantized weights [N, K]."""

    def groups(self, options: Tuning) -> list[Group]:
        """The parameters with their rates. Those without a rate stay fixed."""

    def begin(self) -> None:
        """Called before each pass, within its graph."""

    def settle(self) -> None:
        """Called after parameters have changed."""

    def finish(self) -> None:
        """Put the quantized linears back."""


@dataclass(frozen=True)
class RoundedNetwork:
    """A network whose rounding, transforms, exponents and gains of norms move."""

    blocks: Sequence[TunableBlock]
    gains: Sequence[LearnedGain] = ()

    @property
    def shapes(self) -> list[tuple[int, int]]:
        offsets = [offset for block in self.blocks for offset in block.offsets()]
        return [(offset.shape[0], offset.shape[1]) for offset in offsets]

    def groups(self, options: Tuning) -> list[Group]:
        gains = [Group([gain.vector.change for gain in self.gains], options.norm_rate)] if self.gains else []
        return parameter_groups(self.blocks, options) + gains

    def begin(self) -> None:
        for gain in self.gains:
            gain.begin()

    def settle(self) -> None:
        settle(self.blocks)
        for gain in self.gains:
            gain.settle()

    def finish(self) -> None:
        for block in self.blocks:
            block.finish()
        for gain in self.gains:
            gain.finish()


def tuned_network(
    blocks: Sequence[nn.Module],
    active_sites: Callable[[int], Sequence[Site]],
    gains: Sequence[LearnedGain],
    type_of: TypeOf,
    options: Tuning,
) -> TunedNetwork:
    """Replace the quantized linears of decoder blocks by trainable ones, as the options say.

    `gains` are the learned ones, already installed in their norms. `type_of` gives the type of a block's tensors.
    """
    if options.moves == "levels":
        return LevelsNetwork(blocks, active_sites)
    if options.moves == "gains":
        return LightNetwork(blocks, active_sites, gains, type_of, options)
    tunable = [
        TunableBlock.of(block, active_sites(index), options.margin, options.reach) for index, block in enumerate(blocks)
    ]
    return RoundedNetwork(tunable, gains)
