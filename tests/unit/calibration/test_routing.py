"""Which tokens are calibrated on for which expert."""

import torch
from tests.tiny_model import random_windows, tiny_mixture
from torch import Tensor

from mxrot.calibration import BlockInputs, Routing, first_block_inputs
from mxrot.layers import separate_experts
from mxrot.models import FAMILIES

WINDOWS = random_windows(4, 16)


def routed() -> tuple[Routing, torch.nn.Module, BlockInputs]:
    model = tiny_mixture("mixtral").requires_grad_(False)
    separate_experts(model)
    inputs = first_block_inputs(model, FAMILIES["mixtral"], WINDOWS, 2)
    block = model.model.layers[0]
    return Routing.of(block, "mlp.experts", inputs), block, inputs


def test_they_are_the_rows_that_the_expert_computes() -> None:
    routing, block, inputs = routed()
    for number, expert in enumerate(block.mlp.experts):
        seen: list[Tensor] = []
        handle = expert.register_forward_pre_hook(lambda _, arguments, seen=seen: seen.append(arguments[0]))
        for hidden in inputs.hidden:
            block(hidden, **inputs.keywords)
        handle.remove()
        sent = routing.sent_to(number)
        assert len(sent.hidden) == len(seen) and sent.keywords == {}
        for mine, theirs in zip(sent.hidden, seen, strict=True):
            assert mine.shape == (1, *theirs.shape)
            assert sorted(mine[0].tolist()) == sorted(theirs.tolist())
        assert routing.count(number) == sent.tokens
    assert sum(routing.count(number) for number in range(4)) == 2 * WINDOWS.numel()
    assert routing.count(3) == 0 and not routing.sent_to(3).hidden


def test_all_tokens_and_those_that_another_routing_names() -> None:
    routing, *_ = routed()
    everything = routing.sent_to(None)
    assert torch.equal(torch.cat(everything.hidden, dim=1)[0], torch.cat(routing.tokens))
    other = [torch.zeros_like(chosen) for chosen in routing.chosen]
    assert routing.sent_to(0, other).tokens == WINDOWS.numel() and routing.sent_to(1, other).tokens == 0


def test_nothing_stays_behind() -> None:
    _, block, _ = routed()
    assert not any(module._forward_pre_hooks for module in block.modules())
