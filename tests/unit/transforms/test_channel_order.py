"""Orders of channels: the error that they stand for, and that what is found makes it smaller."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from mxrot.transforms.channel_order import (
    ChannelOrder,
    at_once,
    block_traces,
    channel_order,
    channel_orders,
    dealt,
    exchange_costs,
    exchanged,
    pair_gains,
    worth,
)
from mxrot.transforms.moments import balancing_transform

K, BLOCK = 32, 8


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(count: int = 1, seed: int = 0, mixing: float = 0.4) -> Tensor:
    """Second moments [count, K, K] of correlated channels of uneven sizes."""
    mixed = torch.eye(K, dtype=torch.float64) + mixing * random(count, K, K, seed=seed)
    rows = random(count, 200, K, seed=seed + 1) @ mixed * torch.logspace(-1, 1, K, dtype=torch.float64)
    return rows.mT @ rows / 200


def traces_of(inputs: Tensor, weights: Tensor, order: Tensor, block: int = BLOCK) -> Tensor:
    """Of one order."""
    return block_traces(inputs[None], weights[None], order[None], block)[0]


def cost(inputs: Tensor, weights: Tensor, order: Tensor) -> float:
    return float(traces_of(inputs, weights, order).square().sum())


def test_a_trace_is_that_of_the_transformed_moments() -> None:
    """tr S_g is what the balancing transform leaves of either operand."""
    inputs, weights = moments(seed=0), moments(seed=5)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    (found,) = traces_of(inputs, weights, order)
    for place, members in enumerate(order.unflatten(0, (-1, BLOCK))):
        x, w = (one[0][members][:, members][None] for one in (inputs, weights))
        T = balancing_transform(x, w, 1e-12).matrices[0]
        assert torch.trace(T.T @ x[0] @ T).item() == pytest.approx(found[place].item(), rel=1e-8)


def test_two_channels_gain_what_their_own_block_says() -> None:
    inputs, weights = moments(seed=0), moments(seed=5)
    gains = pair_gains(inputs, weights)[0]
    sizes = (inputs[0].diagonal() * weights[0].diagonal()).sqrt()
    for i, j in list(combinations(range(K), 2))[::7]:
        pair = [moments[:, [i, j]][:, :, [i, j]] for moments in (inputs, weights)]
        (trace,) = traces_of(*pair, torch.arange(2), 2)[0]
        assert gains[i, j].item() == pytest.approx((sizes[i] + sizes[j] - trace).item(), abs=1e-6 * sizes.max().item())
    assert torch.equal(gains, gains.T) and not gains.diagonal().any()


def test_channels_are_dealt_evenly() -> None:
    """Sums differ by no more than the smallest channel, where the sizes fall evenly; blocks are full."""
    sizes = torch.linspace(1, 2, K, dtype=torch.float64)[None]
    (places,) = dealt(sizes[None], BLOCK)
    assert places.bincount().tolist() == [BLOCK] * (K // BLOCK)
    sums = torch.zeros(K // BLOCK, dtype=torch.float64).index_add(0, places, sizes[0])
    assert sums.max() - sums.min() <= sizes.min()
    assert dealt(torch.zeros(1, 2, K), BLOCK)[0].bincount().tolist() == [BLOCK] * (K // BLOCK)


def test_what_an_exchange_costs() -> None:
    """Beside blocks of a whole, whose traces are exactly a sum over pairs: then k is 1, and the estimate exact."""
    sizes, gains = random(2, K, seed=0).abs().float() + 1, random(2, K, K, seed=1).abs().float() * 0.02
    gains = gains + gains.mT
    gains.diagonal(dim1=-2, dim2=-1).zero_()

    def sums_of(places: Tensor) -> Tensor:
        member = torch.nn.functional.one_hot(places, K // BLOCK).float()
        return sizes @ member - (member.T @ gains @ member).diagonal(dim1=-2, dim2=-1) / 2

    places = torch.arange(K).flip(0) // BLOCK
    of_one = [tensor[None] for tensor in (places, sizes, gains, sums_of(places))]
    worths, rows = worth(*of_one), torch.arange(K)
    (found,) = exchange_costs(*of_one, rows[None], worths)
    assert torch.equal(exchange_costs(*of_one, rows[None, 3::7], worths)[0], found[3::7])
    before = sums_of(places).square().sum()
    for i, j in list(combinations(range(K), 2))[::5]:
        swapped = places.clone()
        swapped[i], swapped[j] = places[j], places[i]
        expected = float(sums_of(swapped).square().sum() - before)
        assert found[i, j].item() == pytest.approx(expected, abs=1e-4 * float(before) / K)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["balanced", "correlated"])
def test_an_order_makes_the_error_smaller(kind: ChannelOrder, count: int) -> None:
    inputs, weights = moments(count, seed=0), moments(count, seed=5)
    order = channel_order(inputs, weights, BLOCK, kind)
    assert torch.equal(order.sort().values, torch.arange(K))
    assert cost(inputs, weights, order) < 0.97 * cost(inputs, weights, torch.arange(K))
    traces = traces_of(inputs, weights, order).sum(dim=0)
    assert (traces.diff() <= 0).all()


def test_correlated_is_no_worse_than_balanced() -> None:
    """Pairs of channels that are nearly the same find each other."""
    half = random(400, K // 2, seed=0)
    rows = torch.cat([half, half + 0.05 * random(400, K // 2, seed=1)], dim=1)
    inputs, weights = (rows.T @ rows / 400)[None], torch.eye(K, dtype=torch.float64)[None]
    costs = [cost(inputs, weights, channel_order(inputs, weights, BLOCK, kind)) for kind in ("balanced", "correlated")]
    assert costs[1] < 0.85 * costs[0]
    (places,) = exchanged(inputs[None], weights[None], torch.arange(K)[None] // BLOCK, BLOCK)
    assert sum(places[i] == places[i + K // 2] for i in range(K // 2)) > K // 4


def test_an_order_that_is_as_good_stays() -> None:
    same = torch.eye(K, dtype=torch.float64)[None]
    for kind in ("none", "balanced", "correlated"):
        assert torch.equal(channel_order(same, same, BLOCK, kind), torch.arange(K))
        assert torch.equal(channel_order(0 * same, same, BLOCK, kind), torch.arange(K))
        assert torch.equal(channel_order(moments(), same, K, kind), torch.arange(K))


@pytest.mark.parametrize("kind", ["none", "balanced", "correlated"])
def test_orders_that_are_found_together_are_those_of_each_alone(kind: ChannelOrder) -> None:
    """To the last bit, whether one has as good an order already or not."""
    inputs, weights = (torch.stack([moments(2, seed) for seed in range(start, start + 5)]) for start in (0, 20))
    inputs[1] = weights[1] = torch.eye(K, dtype=torch.float64)
    found = channel_orders(inputs, weights, BLOCK, kind)
    assert torch.equal(
        found, torch.stack([channel_order(*own, BLOCK, kind) for own in zip(inputs, weights, strict=True)])
    )
    assert torch.equal(found[1], torch.arange(K))
    assert kind == "none" or len({tuple(order.tolist()) for order in found}) == 5


def test_wide_orders_are_found_one_at_a_time() -> None:
    assert at_once(1, 14336) == 1 < at_once(1, 1536) < at_once(1, 768) == 29
    assert at_once(3, 128) == at_once(1, 128) // 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["balanced", "correlated"])
def test_a_gpu_finds_as_good_an_order(kind: ChannelOrder) -> None:
    """The same one where channels are dealt; exchanges may take other ways of as much use."""
    inputs, weights = moments(2, seed=0), moments(2, seed=5)
    here = channel_order(inputs, weights, BLOCK, kind)
    there = channel_order(inputs.cuda(), weights.cuda(), BLOCK, kind)
    assert not there.is_cuda
    assert cost(inputs, weights, there) == pytest.approx(cost(inputs, weights, here), rel=0.02)


def test_moments_that_are_a_little_off_have_an_order_all_the_same() -> None:
    """Of one token, with an eigenvalue below zero as sums in float32 leave it: the first jitter gives no factor."""
    token = random(1, 64, seed=0)
    inputs = (token.mT @ token)[None]
    inputs -= 1e-8 * inputs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None] * torch.eye(64, dtype=torch.float64)
    weights = random(96, 64, seed=1)
    found = traces_of(inputs, (weights.mT @ weights)[None], torch.arange(64), 32)
    assert found.isfinite().all() and (found > 0).all()
    assert sorted(channel_order(inputs, (weights.mT @ weights)[None], 32, "correlated").tolist()) == list(range(64))
