"""The routing of calibration tokens to the experts of a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mxrot.calibration.executor import Executor
from mxrot.calibration.placement import Placement


@dataclass(frozen=True)
class Routing:
    """The inputs of the experts of a block, batch by batch."""

    executor: Executor
    """The executor of the block."""
    tokens: list[Tensor]
    """Tokens of each batch, [tokens, H], as the block's placement keeps them."""
    chosen: list[Tensor]
    """The experts of each token, int64 [tokens, experts per token]."""

    @staticmethod
    @torch.no_grad()
    def of(executor: Executor, experts: str) -> Routing:
        """Run the block up to the module `experts`."""
        found = Routing(executor, [], [])
        handle = executor.block.get_submodule(experts).register_forward_pre_hook(
            lambda _, arguments: found.chosen.append(arguments[1])
        )
        try:
            executor.observe([(experts, lambda x: found.tokens.append(executor.placement.put(x)))])
        finally:
            handle.remove()
        return found

    def count(self, expert: int) -> int:
        """The number of tokens routed to an expert, over all processes."""
        return self._counts[expert] if expert < len(self._counts) else 0

    @cached_property
    def _counts(self) -> list[int]:
        """The counts by the number of the expert, up to the last one with tokens."""
        found = torch.stack([torch.tensor([len(rows) for rows in batch]) for batch in self._rows]).sum(dim=0)
        return [int(count) for count in self.executor.world.sum(found).tolist()]

    @cached_property
    def _rows(self) -> list[tuple[Tensor, ...]]:
        """For each batch and expert, the rows routed to the expert, in order: int64."""
        experts = self.executor.world.largest(1 + max((int(chosen.max()) for chosen in self.chosen), default=0))
        found = []
        for chosen in self.chosen:
            gets = torch.zeros(experts, len(chosen), dtype=torch.bool, device=chosen.device)
            gets.t().scatter_(1, chosen, True)
            rows = gets.nonzero(as_tuple=True)[1].contiguous()  # without the column of experts
            found.append(rows.split(gets.sum(dim=1).tolist()))
        return found

    def sent_to(self, module: nn.Module, expert: int | None, routing: Routing | None = None) -> Executor:
        """An executor that runs the expert `module` on its tokens, [1, tokens, H] per batch; None stands for all
        tokens.

        `routing` gives the tokens' experts; by default, this one.
        """
        rows = self._rows if routing is None else routing._rows
        hidden = []
        for x, of_experts in zip(self.tokens, rows, strict=True):
            if expert is None:
                hidden.append(self.executor.placement.get(x)[None])
            elif expert < len(of_experts) and len(of_experts[expert]):
                hidden.append(self.executor.placement.get(x)[of_experts[expert]][None])
        device, world = self.executor.placement.device, self.executor.world
        found = Executor(hidden, ({},), Placement(device), world, self.tokens[0].dtype)
        found.begin(module)
        return found
