"""The dual transform beside a slow twin in numpy, its zigzag permutation, and what it asks and costs."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from tests.unit.transforms import slow_search
from torch import Tensor

from mxrot.calibration import COLLECTORS
from mxrot.errors import ConfigError
from mxrot.transforms import (
    BlockDiagonal,
    BlockDiagonalSpec,
    FitSize,
    Permutation,
    PermutationSpec,
    Sharing,
    SiteSample,
    SiteTransform,
    generator_for,
)
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.dual import DualRotation, zigzag_order

BLOCK, GROUPS, STEPS = 8, 5, 6
WIDTH = BLOCK * GROUPS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def spiked(seed: int) -> Tensor:
    """Two batches [2, windows, tokens, K] with outlier channels of several sizes."""
    x = random(2, 3, 12, WIDTH, seed=seed)
    x[..., 3::11] *= 20 * random(4, seed=seed + 100).abs()
    return x


def site(method: DualRotation, x: Tensor) -> SiteSample:
    """What `method` asked for, seen in the batches x."""
    block = method.block_in(x.shape[-1])
    (need,) = method.needs
    collector = COLLECTORS[need](block, method.tokens_kept, x[..., 0].numel())
    for batch in x:
        collector.update(batch)
    return SiteSample(torch.zeros(1, x.shape[-1], dtype=torch.float64), block, {need: collector.result()})


def fitted(method: DualRotation, x: Tensor, sharing: Sharing, seed: int = 0) -> SiteTransform:
    return method.fit(site(method, x), sharing, torch.Generator().manual_seed(seed))


# The zigzag permutation


def slow_zigzag(maxima: list[float], block: int) -> list[int]:
    """Channel by channel, dealt to stacks that are walked to and fro."""
    groups = len(maxima) // block
    stacks: list[list[int]] = [[] for _ in range(groups)]
    here, way = 0, 1
    for channel in sorted(range(len(maxima)), key=lambda channel: -maxima[channel]):  # sorted() keeps equal ones
        stacks[here].append(channel)
        if 0 <= here + way < groups:
            here += way
        else:
            way = -way  # the same stack again
    return [channel for stack in stacks for channel in stack]


@pytest.mark.parametrize(("groups", "block"), [(1, 4), (2, 1), (3, 4), (4, 3), (12, 128), (6, 96)])
@pytest.mark.parametrize("kind", ["normal", "with equal ones", "all equal", "one peak"])
def test_zigzag_equals_its_slow_twin(groups: int, block: int, kind: str) -> None:
    maxima = random(groups * block).abs()
    if kind == "with equal ones":
        maxima = (2 * maxima).round()
    elif kind == "all equal":
        maxima = torch.ones(groups * block)
    elif kind == "one peak":
        maxima[-1] = 1e4
    assert zigzag_order(maxima, block).tolist() == slow_zigzag(maxima.tolist(), block)


@pytest.mark.parametrize(("groups", "block"), [(2, 1), (3, 4), (4, 3), (5, 7), (12, 128)])
def test_zigzag_evens_out_the_means_of_the_blocks(groups: int, block: int) -> None:
    """Two of them differ by at most (largest - smallest) / B, which two blocks of one channel each reach."""
    for seed in range(5):
        maxima = random(groups * block, seed=seed).double().abs().exp()
        order = zigzag_order(maxima, block)
        assert torch.equal(order.sort().values, torch.arange(groups * block))
        means = maxima[order].view(groups, block).mean(dim=1)
        bound = float(maxima.max() - maxima.min()) / block
        assert float(means.max() - means.min()) <= bound * (1 + 1e-12)
        uneven = maxima.sort().values.view(groups, block).mean(dim=1)
        if block > 1:
            assert means.max() - means.min() < 0.5 * (uneven.max() - uneven.min())


def test_zigzag_by_hand() -> None:
    maxima = torch.tensor([5.0, 1.0, 9.0, 7.0, 3.0, 8.0])
    # 9 to the first, 8 to the second, 7 to the third; 5 to the third, 3 to the second, 1 to the first.
    assert zigzag_order(maxima, 2).tolist() == [2, 1, 5, 4, 3, 0]


# The whole transform


def slow_dual(method: DualRotation, tokens: np.ndarray, sharing: Sharing, seed: int) -> tuple[np.ndarray, float]:
    """T [K, K] and the least margin of any decision, from whole tokens [rows, K]."""
    generator = torch.Generator().manual_seed(seed)
    margins: list[float] = []

    def rotation(x: np.ndarray) -> np.ndarray:
        q = list(random_orthogonal(method.steps, BLOCK - 1, generator).numpy())
        blocks = [x[:, start : start + BLOCK] for start in range(0, WIDTH, BLOCK)]
        if sharing == "site":
            blocks = [slow_search.largest_rows(np.concatenate(blocks), 8 * method.rows)]
        searches = [slow_search.search(block, q, lambda rows: float(np.abs(rows).max()), "channel") for block in blocks]
        margins.extend(found.margin for found in searches)
        dense = np.zeros((WIDTH, WIDTH))
        for group in range(GROUPS):
            inside = slice(group * BLOCK, (group + 1) * BLOCK)
            dense[inside, inside] = searches[group % len(searches)].product
        return dense

    first = rotation(tokens)
    maxima = np.abs(tokens @ first).max(axis=0)
    ordered = np.sort(maxima)
    margins.append(float(((ordered[1:] - ordered[:-1]) / ordered[1:]).min()))
    permutation = np.zeros((WIDTH, WIDTH))
    for place, channel in enumerate(slow_zigzag(maxima.tolist(), BLOCK)):
        permutation[channel, place] = 1.0
    second = rotation(tokens @ first @ permutation)
    return first @ permutation @ second, min(margins)


@pytest.mark.parametrize("sharing", ["site", "block"])
@pytest.mark.parametrize("options", [{"rows": 36}, {"rows": 6}, {"sample": "mean"}], ids=str)
def test_the_transform_equals_its_slow_twin(options: dict[str, Any], sharing: Sharing) -> None:
    """72 tokens in two batches; with 36 rows every second one, with 6 every twelfth; the mean is over 6 windows."""
    method = DualRotation(block=BLOCK, steps=STEPS, **options)
    for seed in (0, 1):
        x = spiked(seed)
        flat = x.double().numpy().reshape(-1, WIDTH)
        mean = flat.reshape(6, 12, WIDTH).mean(axis=0)
        tokens = mean if method.sample == "mean" else flat[:: 72 // method.rows]
        expected, margin = slow_dual(method, tokens, sharing, seed)
        # The search rotates in float32: 6 steps of B products, each to 6e-8.
        assert margin > 1e-5, "choose another seed"
        got = fitted(method, x, sharing, seed).apply(torch.eye(WIDTH, dtype=torch.float64)).numpy()
        assert np.abs(got - expected).max() <= 1e-13


@pytest.mark.parametrize("sharing", ["site", "block"])
def test_it_spreads_what_is_uneven(sharing: Sharing) -> None:
    """The largest peak does not grow, and blocks end nearer to each other."""
    method, x = DualRotation(block=BLOCK, steps=32, rows=72), spiked(4)
    transform = fitted(method, x, sharing)
    before = x.double().flatten(0, -2)
    after = transform.apply(before)
    assert after.abs().max() < 0.5 * before.abs().max()

    def spread(rows: Tensor) -> float:
        means = rows.abs().amax(dim=0).view(GROUPS, BLOCK).mean(dim=1)
        return float(means.max() / means.min())

    assert spread(after) < 0.5 * spread(before)


def test_the_second_rotation_is_fitted_to_what_it_will_see() -> None:
    """The search on what the first two stages give ends with the third, whatever it was drawn after."""
    method, x = DualRotation(block=BLOCK, steps=STEPS, rows=72), spiked(2)
    transform = fitted(method, x, "block")
    first, order, second = transform.stages
    led = order.apply(first.apply(x.flatten(0, -2)))
    drawn = torch.Generator().manual_seed(0)
    random_orthogonal(STEPS, BLOCK - 1, drawn)
    blocks = led.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
    sample = SiteSample(torch.zeros(1, WIDTH, dtype=torch.float64), BLOCK, {"peaks": blocks})
    again = method._search(BLOCK).fit(sample, "block", drawn)
    assert isinstance(second, BlockDiagonal)
    assert torch.equal(again.matrices, second.matrices)
    other = method._search(BLOCK).fit(sample, "block", torch.Generator().manual_seed(1))
    assert not torch.equal(other.matrices, second.matrices)


def test_dead_inputs_are_left_as_they_are() -> None:
    transform = fitted(DualRotation(block=BLOCK, steps=STEPS), torch.zeros(2, 3, 12, WIDTH), "block")
    first, order, second = transform.stages
    assert isinstance(first, BlockDiagonal) and isinstance(second, BlockDiagonal)
    assert torch.equal(first.matrices, torch.eye(BLOCK, dtype=torch.float64).expand_as(first.matrices))
    assert torch.equal(second.matrices, first.matrices)
    assert isinstance(order, Permutation)
    assert order.order.tolist() == slow_zigzag([0.0] * WIDTH, BLOCK)


# Which block


@pytest.mark.parametrize(
    ("width", "block", "expected"),
    [
        (4096, 128, 128),
        (576, 128, 96),
        (1536, 128, 128),
        (2880, 128, 96),
        (4544, 128, 64),
        (32, 128, 32),
        (96, 64, 32),
        (96, 16, 16),
        (96, 48, 48),
        (100, 128, 128),
        (16, 128, 128),
    ],
)
def test_the_largest_block_that_divides_the_width(width: int, block: int, expected: int) -> None:
    """Of multiples of 32; a width that has none is refused as one that is no multiple of 32."""
    method = DualRotation(block=block)
    assert method.block_in(width) == expected
    first, order, second = method.own_specs(width, "block")
    is_each = "block" if width > expected else "site"
    assert first == second == BlockDiagonalSpec(expected, is_each) and order == PermutationSpec()


@pytest.mark.parametrize(("block", "multiple"), [(128, 32), (96, 32), (64, 32), (48, 16), (16, 16)])
def test_widths_are_multiples(block: int, multiple: int) -> None:
    assert DualRotation(block=block).multiple == multiple


# What it asks and costs


def test_what_it_asks_of_calibration() -> None:
    assert DualRotation().needs == {"spaced"} and DualRotation(sample="mean").needs == {"mean"}
    assert DualRotation(rows=7).tokens_kept == 7


@pytest.mark.parametrize("options", [{"steps": 0}, {"rows": 0}, {"steps": -1}], ids=str)
def test_nothing_to_search_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"^transform dual: steps and rows must be positive, got "):
        DualRotation(**options)


def test_two_searches_are_twice_the_work() -> None:
    size = FitSize(48, 1536, "site", tokens=10_000)
    method = DualRotation()
    assert method.fitting_work(size) == {"fitted": 2 * method._search(128).fitting_work(size)["fitted"]}
    assert method.fitting_bytes(size) > method._search(128).fitting_bytes(size)


def test_seeds_and_names_draw_their_own() -> None:
    method, x = DualRotation(block=BLOCK, steps=STEPS), spiked(1)
    found = [
        method.fit(site(method, x), "block", generator_for(seed, name)).apply(torch.eye(WIDTH, dtype=torch.float64))
        for seed, name in ((0, "a"), (1, "a"), (0, "b"))
    ]
    assert all((a - b).abs().max() > 0.1 for a, b in pairwise(found))


def test_the_order_of_a_seed() -> None:
    """Golden: other numbers here are another transform for every checkpoint that is made with the same seed."""
    order = fitted(DualRotation(block=BLOCK, steps=STEPS, rows=72), spiked(0), "block").stages[1]
    assert isinstance(order, Permutation)
    expected = (
        "25 8 24 32 39 20 23 21 1 4 36 27 35 12 37 18 30 14 11 28 5 7 22 17 34 3 38 31 0 13 10 19 2 29 9 26 6 15 33 16"
    )
    assert " ".join(map(str, order.order.tolist())) == expected
