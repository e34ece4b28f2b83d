"""What distillation moves in a network: rounding and transforms, or two-bit weights and their levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from mxrot.models import Site
from mxrot.sections import Tuning
from mxrot.tuning.levels import LevelsNetwork
from mxrot.tuning.loop import Group
from mxrot.tuning.tunable import TunableBlock, parameter_groups, settle


class TunedNetwork(Protocol):
    """A network whose quantized linears are others for now."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Of the weights [N, K] that are quantized."""

    def groups(self, options: Tuning) -> list[Group]:
        """What is learned at which rate; what has none is left as it is."""

    def begin(self) -> None:
        """Before each pass, in its graph."""

    def settle(self) -> None:
        """After parameters have changed."""

    def finish(self) -> None:
        """Put quantized linears back."""


@dataclass(frozen=True)
class RoundedNetwork:
    """One whose rounding, transforms and exponents move."""

    blocks: Sequence[TunableBlock]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        offsets = [offset for block in self.blocks for offset in block.offsets()]
        return [(offset.shape[0], offset.shape[1]) for offset in offsets]

    def groups(self, options: Tuning) -> list[Group]:
        return parameter_groups(self.blocks, options)

    def begin(self) -> None:
        return

    def settle(self) -> None:
        settle(self.blocks)

    def finish(self) -> None:
        for block in self.blocks:
            block.finish()


def tuned_network(
    blocks: Sequence[nn.Module], active_sites: Callable[[int], Sequence[Site]], options: Tuning
) -> TunedNetwork:
    """Put what moves in the place of the quantized linears of decoder blocks, as the options say."""
    if options.moves == "levels":
        return LevelsNetwork(blocks, active_sites)
    return RoundedNetwork(
        [TunableBlock.of(block, active_sites(index), options.margin) for index, block in enumerate(blocks)]
    )
