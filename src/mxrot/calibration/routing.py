"""Which calibration tokens go to which expert of a block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mxrot.calibration.block_inputs import BlockInputs
from mxrot.calibration.capture import observe_inputs


@dataclass(frozen=True)
class Routing:
    """What the experts of a block read, batch by batch."""

    inputs: BlockInputs
    """Of the block."""
    tokens: list[Tensor]
    """[tokens, H] each, as `inputs.put` keeps them."""
    chosen: list[Tensor]
    """int64 [tokens, experts a token]: where each goes."""

    @staticmethod
    @torch.no_grad()
    def of(block: nn.Module, experts: str, inputs: BlockInputs) -> Routing:
        """Run `block` up to the module `experts`."""
        found = Routing(inputs, [], [])
        handle = block.get_submodule(experts).register_forward_pre_hook(
            lambda _, arguments: found.chosen.append(arguments[1])
        )
        try:
            observe_inputs(block, experts, inputs, lambda x: found.tokens.append(inputs.put(x)))
        finally:
            handle.remove()
        return found

    def count(self, expert: int) -> int:
        """Tokens that are sent to an expert, of all processes."""
        return self._counts[expert] if expert < len(self._counts) else 0

    @cached_property
    def _counts(self) -> list[int]:
        """By the number of the expert, as far as any gets some."""
        found = torch.cat(self.chosen).flatten().bincount()
        counts = torch.zeros(self.inputs.world.largest(len(found)), dtype=torch.int64)
        counts[: len(found)] = found.cpu()
        return [int(count) for count in self.inputs.world.sum(counts).tolist()]

    def sent_to(self, expert: int | None, chosen: Sequence[Tensor] | None = None) -> BlockInputs:
        """The tokens that an expert gets, [1, tokens, H] a batch; None stands for all of them.

        `chosen` takes the place of this routing's own.
        """
        found = BlockInputs([], ({},), device=self.inputs.device, world=self.inputs.world)
        for x, places in zip(self.tokens, self.chosen if chosen is None else chosen, strict=True):
            rows = self.inputs.get(x)
            if expert is not None:
                rows = rows[(places == expert).any(dim=-1)]
            if len(rows):
                found.hidden.append(rows[None])
        return found
