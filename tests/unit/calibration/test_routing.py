"""Which tokens are calibrated on for which expert."""

import torch
from tests.tiny_model import random_windows, tiny_mixture
from torch import Tensor

from mxrot.calibration import Executor, Routing, first_executor
from mxrot.layers import separate_experts
from mxrot.models import FAMILIES

WINDOWS = random_windows(4, 16)


def routed() -> tuple[Routing, torch.nn.Module, Executor]:
    model = tiny_mixture("mixtral").requires_grad_(False)
    separate_experts(model)
    executor = first_executor(model, FAMILIES["mixtral"], WINDOWS, 2)
    block = model.model.layers[0]
    executor.begin(block)
    return Routing.of(executor, "mlp.experts"), block, executor


def read_by(executor: Executor) -> list[Tensor]:
    """What an expert is run on, batch by batch: [tokens, H]."""
    return [executor.placement.get(x)[0] for x in executor._hidden]


def test_they_are_the_rows_that_the_expert_computes() -> None:
    routing, block, executor = routed()
    for number, expert in enumerate(block.mlp.experts):
        seen: list[Tensor] = []
        handle = expert.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        for _ in executor.outputs():
            pass
        handle.remove()
        sent = routing.sent_to(expert, number)
        mine = read_by(sent)
        assert len(mine) == len(seen) and sent.keywords == {} and sent.block is expert
        assert all(sorted(one.tolist()) == sorted(other.tolist()) for one, other in zip(mine, seen, strict=True))
        scanned = [x[(chosen == number).any(dim=-1)] for x, chosen in zip(routing.tokens, routing.chosen, strict=True)]
        assert torch.equal(torch.cat(mine or scanned), torch.cat(scanned)), "in the order in which they come"
        assert routing.count(number) == sent.tokens
    assert sum(routing.count(number) for number in range(4)) == 2 * WINDOWS.numel()
    assert routing.count(3) == 0 and not routing.sent_to(block.mlp.experts[3], 3).batches


def test_all_tokens_and_those_that_another_routing_names() -> None:
    routing, block, executor = routed()
    expert = block.mlp.experts[0]
    assert torch.equal(torch.cat(read_by(routing.sent_to(expert, None))), torch.cat(routing.tokens))
    other = Routing(executor, [], [torch.zeros_like(chosen) for chosen in routing.chosen])
    assert routing.sent_to(expert, 0, other).tokens == WINDOWS.numel()
    assert routing.sent_to(expert, 1, other).tokens == 0 and other.count(0) == WINDOWS.numel()


def test_nothing_stays_behind() -> None:
    _, block, _ = routed()
    assert not any(module._forward_pre_hooks for module in block.modules())
