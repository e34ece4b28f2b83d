"""Which calibration tokens go to which expert of a block."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mxrot.calibration.executor import Executor
from mxrot.calibration.placement import Placement


@dataclass(frozen=True)
class Routing:
    """What the experts of a block read, batch by batch."""

    executor: Executor
    """Of the block."""
    tokens: list[Tensor]
    """[tokens, H] each, as the block's placement keeps them."""
    chosen: list[Tensor]
    """int64 [tokens, experts a token]: where each goes."""

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
        """Tokens that are sent to an expert, of all processes."""
        return self._counts[expert] if expert < len(self._counts) else 0

    @cached_property
    def _counts(self) -> list[int]:
        """By the number of the expert, as far as any gets some."""
        found = torch.stack([torch.tensor([len(rows) for rows in batch]) for batch in self._rows]).sum(dim=0)
        return [int(count) for count in self.executor.world.sum(found).tolist()]

    @cached_property
    def _rows(self) -> list[tuple[Tensor, ...]]:
        """Of each batch, by the number of the expert, the rows that are sent to it, in their order: int64."""
        experts = self.executor.world.largest(1 + max((int(chosen.max()) for chosen in self.chosen), default=0))
        found = []
        for chosen in self.chosen:
            gets = torch.zeros(experts, len(chosen), dtype=torch.bool, device=chosen.device)
            gets.t().scatter_(1, chosen, True)
            rows = gets.nonzero(as_tuple=True)[1].contiguous()  # without the column of experts
            found.append(rows.split(gets.sum(dim=1).tolist()))
        return found

    def sent_to(self, module: nn.Module, expert: int | None, routing: Routing | None = None) -> Executor:
        """Runs `module`, an expert, on the tokens that it gets, [1, tokens, H] a batch; None stands for all of them.

        `routing` says where they go; without, this one.
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
