import pytest
import torch
from torch import Tensor

from mxrot.cuda_graphs import Replays

each_device = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)


def chain(x: Tensor, y: Tensor) -> Tensor:
    for _ in range(20):
        x = (x @ y).clamp(-2, 2)
        x = x.index_select(0, x.abs().sum(dim=1).argsort(descending=True))
    return x


def operands(seed: int, rows: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, 8, generator=generator).to(device),
        torch.randn(8, 8, generator=generator).to(device),
    )


@each_device
def test_gradients_are_added_to(device: str) -> None:
    """At each call as if it had just been run, with what the parameter is by then."""
    weight = torch.nn.Parameter(operands(9, 8, device)[0])
    twin = torch.nn.Parameter(weight.detach().clone())

    def learn(parameter: Tensor, x: Tensor) -> Tensor:
        for _ in range(10):
            x = torch.tanh(x @ parameter)
        loss = x.square().sum()
        loss.backward()
        return loss.detach()

    replay = Replays()
    for seed in range(5):
        x, _ = operands(seed, 4, device)
        found, expected = replay("step", lambda x: learn(weight, x), x), learn(twin, x)
        assert weight.grad is not None and twin.grad is not None
        assert torch.equal(found, expected) and torch.equal(weight.grad, twin.grad) and weight.grad.abs().sum() > 0
        with torch.no_grad():
            for parameter in (weight, twin):
                parameter -= 1e-3 * parameter.grad
        if seed % 2:
            weight.grad.zero_()
            twin.grad.zero_()


@each_device
def test_every_call_gives_what_the_function_gives(device: str) -> None:
    """The first one runs, the second is recorded, later ones are played; shapes and keys are kept apart."""
    replay, kept = Replays(), []
    for seed in range(5):
        for rows in (4, 7):
            x, y = operands(seed, rows, device)
            before = x.clone(), y.clone()
            kept.append((replay("a", chain, x, y), chain(x, y)))
            kept.append((replay("b", lambda x, y: -chain(x, y), x, y), -chain(x, y)))
            assert torch.equal(x, before[0]) and torch.equal(y, before[1])
    # At the end, because a later call must not write into what an earlier one returned.
    assert all(torch.equal(found, expected) for found, expected in kept)
    assert not torch.equal(kept[0][0], kept[4][0])
