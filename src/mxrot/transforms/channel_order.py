"""In which order channels go into blocks: free where the rows that make them and the columns that read them can move.

A transform that balances second moments leaves a block of channels the error (tr S_g)^2 / B, with S_g the singular
values of L_w^T L_x, S_x = L_x L_x^T and S_w = L_w L_w^T the block's moments of inputs and weights (transforms/moments).
So an order is good where F = sum_g (tr S_g)^2 is small. With a_i^2 = S_x,ii S_w,ii, and r and q the correlations of two
channels in S_x and in S_w, a block of these two alone has the trace a_i + a_j - v_ij with (ours: the trace of the root
of a matrix of two rows is the root of its trace and of twice the root of its determinant)

    v_ij = a_i + a_j - (a_i^2 + a_j^2 + 2 a_i a_j (r q + ((1 - r^2) (1 - q^2))^(1/2)))^(1/2)

- "balanced": the sums of a_i are made equal. The channels are dealt in decreasing order, each to the block that is not
  full and that it costs least.
- "correlated": from there pairs of channels of two blocks change places. Which may help is told by v: what a channel
  is worth in a block is a share k_g of the sum of its v there, with k_g as the block's own trace has it,
  tr S_g = sum_i a_i - k_g sum_(i<j) v_ij. What an exchange does is told by the traces themselves, and one that makes F
  larger is taken back.

The order as it is stays where F is no smaller by what was found. Else the blocks are put in decreasing order of tr S_g,
so that GPTQ comes to the largest first. Several sets of moments may share one order (the query heads that read one
value head): F is their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ChannelOrder = Literal["none", "balanced", "correlated"]

ROUNDS = 64
"""Of exchanges at most; in each a block takes part in one."""
ROWS = 128
"""Of v that are computed at once."""
PART, FEWEST = 4, 256
"""One channel in so many is looked at in a round, those first that another block draws most, and this many at least."""
NARROW = 128
"""Channels up to which a CPU is faster: a GPU takes longer to launch a round than the round takes."""
JITTERS = (1e-12, 1e-9, 1e-6)
"""Of the trace of a block, added to its diagonal so that what has no full rank has a Cholesky factor: the first that
does."""
ORDER_BYTES = {"none": 0.0, "balanced": 18.0, "correlated": 20.0}
"""For each of K^2 pairs of channels, at the peak, the moments of inputs and weights (8 each) included."""
LOOK_BYTES = 41.0
"""For each pair of which one channel is looked at in a round."""
TOGETHER_BYTES = 2**30
"""That orders which are found together take."""
LEAST_GAIN = 1e-4
"""Of what an exchange is expected to take off F, relative to the mean of a block."""


def channel_order(inputs: Tensor, weights: Tensor, block: int, kind: ChannelOrder, rounds: int = ROUNDS) -> Tensor:
    """The order of K channels for blocks of `block`: int64 [K] on the CPU; channel j is the one that was order[j].

    `inputs` and `weights` are second moments [n, K, K], float64, of n sets of channels that share the order. K is a
    multiple of `block`. Channels whose moments are zero are dealt like the others.
    """
    return channel_orders(inputs[None], weights[None], block, kind, rounds)[0]


def channel_orders(inputs: Tensor, weights: Tensor, block: int, kind: ChannelOrder, rounds: int = ROUNDS) -> Tensor:
    """As `channel_order`, the orders [E, K] of E times as many sets [E, n, K, K], each of them that of its own alone.

    A GPU takes about as long for many narrow ones as for one of them; `at_once` says for how many there is memory.
    """
    count, _, width, _ = inputs.shape
    natural = torch.arange(width).repeat(count, 1)
    if kind == "none" or width == block:
        return natural
    if width <= NARROW:
        inputs, weights = inputs.cpu(), weights.cpu()
    sizes = (_diagonal(inputs) * _diagonal(weights)).clamp(min=0).sqrt()
    places = dealt(sizes.cpu(), block).to(inputs.device)
    if kind == "correlated":
        places = exchanged(inputs, weights, places, block, rounds)
    found = places.argsort(stable=True)
    traces = block_traces(inputs, weights, found, block)
    before = block_traces(inputs, weights, natural.to(found.device), block)
    is_less = (traces.square().sum(dim=(1, 2)) < before.square().sum(dim=(1, 2))).cpu()
    largest_first = traces.sum(dim=1).argsort(descending=True, stable=True)
    by_block = found.unflatten(1, (-1, block))
    found = by_block.gather(1, largest_first[..., None].expand_as(by_block)).flatten(1).cpu()
    return torch.where(is_less[:, None], found, natural)


def at_once(count: int, width: int) -> int:
    """How many orders of so many channels, of `count` sets each, are found together: one at least."""
    return max(1, int(TOGETHER_BYTES / (count * (ORDER_BYTES["correlated"] + LOOK_BYTES) * width**2)))


def dealt(sizes: Tensor, block: int) -> Tensor:
    """The block of each channel, int64 [E, K], from sizes a [E, n, K] on the CPU: those of the least sum of squared
    sums."""
    orders, count, width = sizes.shape
    each = torch.arange(orders)
    sums = torch.zeros(orders, count, width // block, dtype=sizes.dtype)
    room = torch.full((orders, width // block), block)
    places = torch.empty(orders, width, dtype=torch.int64)
    for channel in sizes.square().sum(dim=1).argsort(descending=True, stable=True).T:
        own = sizes[each, :, channel, None]
        cost = (sums * own).sum(dim=1).masked_fill(room == 0, torch.inf)
        # Of equals the emptiest: channels without any size would all go to the first one.
        chosen = torch.where(cost == cost.amin(dim=1, keepdim=True), room, -1).argmax(dim=1)
        places[each, channel] = chosen
        sums[each, :, chosen] += own[..., 0]
        room[each, chosen] -= 1
    return places


def pair_gains(inputs: Tensor, weights: Tensor) -> Tensor:
    """v: what two channels in one block take off its trace; float32 [..., K, K], zero on the diagonal."""
    found = torch.empty(inputs.shape, dtype=torch.float32, device=inputs.device)
    for x, w, into in zip(*(tensor.flatten(0, -3) for tensor in (inputs, weights, found)), strict=True):
        scales = [moments.diagonal().clamp(min=0).sqrt() for moments in (x, w)]
        inverses = [torch.where(scale > 0, 1 / scale, 0.0) for scale in scales]
        size = scales[0] * scales[1]
        for start in range(0, len(size), ROWS):
            rows = slice(start, start + ROWS)
            r, q = (
                moments[rows] * inverse[rows, None] * inverse for moments, inverse in zip((x, w), inverses, strict=True)
            )
            together = r * q + ((1 - r.square()).clamp(min=0) * (1 - q.square()).clamp(min=0)).sqrt()
            sums, products = size[rows, None] + size, size[rows, None] * size
            into[rows] = sums - (sums.square() - 2 * products * (1 - together)).clamp(min=0).sqrt()
        into.fill_diagonal_(0)
    return found


def exchanged(inputs: Tensor, weights: Tensor, places: Tensor, block: int, rounds: int = ROUNDS) -> Tensor:
    """Places [E, K], the block of each channel, after exchanges of two channels each that take something off F."""
    gains, places = pair_gains(inputs, weights), places.clone()
    sizes = (_diagonal(inputs) * _diagonal(weights)).clamp(min=0).sqrt().float()
    refused = torch.zeros(len(gains), *gains.shape[2:], dtype=torch.bool, device=gains.device)
    traces = block_traces(inputs, weights, places.argsort(stable=True), block)
    each = torch.arange(len(gains), device=gains.device)[:, None]
    for _ in range(rounds):
        worths = worth(places, sizes, gains, traces.float())
        rows = _restless(places, worths, traces)
        change = exchange_costs(places, sizes, gains, traces, rows, worths)
        best, partner = change.masked_fill_(refused[each, rows], 0.0).min(dim=2)
        bounds = -LEAST_GAIN * traces.square().sum(dim=(1, 2)) / traces.shape[2]
        told = (tensor.tolist() for tensor in (rows, best, partner, places, bounds))
        swaps = [(one, *swap) for one, own in enumerate(zip(*told, strict=True)) for swap in _apart(*own)]
        if not swaps:
            break
        which, first, second = torch.tensor(swaps, device=places.device).T
        twice, touched = which.repeat(2), torch.cat([places[which, first], places[which, second]])
        after = _swapped(places, which, first, second).argsort(stable=True).unflatten(1, (-1, block))
        found = _traces_of(inputs, weights, twice, after[twice, touched])
        lost = (found.square() - traces[twice, :, touched].square()).sum(dim=1)
        is_worse = lost[: len(first)] + lost[len(first) :] >= 0
        worse = which[is_worse], first[is_worse], second[is_worse]
        refused[worse] = refused[worse[0], worse[2], worse[1]] = True
        is_kept = ~is_worse.repeat(2)
        traces[twice[is_kept], :, touched[is_kept]] = found[is_kept]
        places = _swapped(places, which[~is_worse], first[~is_worse], second[~is_worse])
    return places


def _swapped(places: Tensor, which: Tensor, first: Tensor, second: Tensor) -> Tensor:
    found = places.clone()
    found[which, first], found[which, second] = places[which, second], places[which, first]
    return found


def exchange_costs(
    places: Tensor, sizes: Tensor, gains: Tensor, traces: Tensor, rows: Tensor, worths: tuple[Tensor, Tensor]
) -> Tensor:
    """What F should become more by when channels i, of `rows` [E, R], and j change places: float32 [E, R, K]; 0 where
    they are in one block.

    With t_g the trace of a block [E, n, G] and c_i,g = k_g sum of v_ij over the j in it, and i in g, j in h, the block
    g gets t_g - a_i + a_j + c_i,g - c_j,g + k_g v_ij, and h the same with i and j the other way round.
    """
    each = torch.arange(len(places), device=places.device)[:, None]
    blocks = places[each, rows]
    change = torch.zeros(*rows.shape, places.shape[1], dtype=gains.dtype, device=gains.device)
    for position in range(gains.shape[1]):
        a, exact = sizes[:, position], traces[:, position].to(gains.dtype)
        beside, share = (tensor[:, position] for tensor in worths)
        here = exact.gather(1, places)
        left = here - a + beside.gather(1, places[:, None])[:, 0]
        pairs = gains[:, position][each, rows]
        after = torch.addcmul(
            left[each, rows][..., None] + a[:, None] - beside[each, blocks], pairs, share[each, blocks][..., None]
        )
        change += after.square_()
        other = left[:, None] + a[each, rows][..., None]
        other -= beside.mT[each, rows].gather(2, places[:, None].expand(-1, rows.shape[1], -1))
        after = torch.addcmul(other, pairs, share.gather(1, places)[:, None])
        del other
        change += after.square_()
        change -= here[each, rows].square()[..., None] + here.square()[:, None]
    return change.masked_fill_(blocks[..., None] == places[:, None], 0.0)


def worth(places: Tensor, sizes: Tensor, gains: Tensor, traces: Tensor) -> tuple[Tensor, Tensor]:
    """What each channel is worth in each block, c [E, n, G, K], and the share k of each block [E, n, G]."""
    count, blocks = traces.shape[1:]
    beside, share = gains.new_empty(*sizes.shape[:2], blocks, sizes.shape[2]), torch.empty_like(traces)
    for one, own in enumerate(places):
        member = F.one_hot(own, blocks).to(gains.dtype)
        for position in range(count):
            found = member.T @ gains[one, position]
            whole = found.gather(0, own[None])[0] @ member / 2
            lost = sizes[one, position] @ member - traces[one, position]
            share[one, position] = torch.where(whole > 0, (lost / whole).clamp(0, 1), 0.0)
            beside[one, position] = found.mul_(share[one, position, :, None])
    return beside, share


def _restless(places: Tensor, worths: tuple[Tensor, Tensor], traces: Tensor) -> Tensor:
    """The channels that most of what is theirs draws to another block: a part of all, int64 [E, R]."""
    beside, _ = worths
    drawn = torch.zeros_like(beside[:, 0, 0])
    for position in range(traces.shape[1]):
        here = traces[:, position].to(drawn.dtype).gather(1, places)
        own = beside[:, position].gather(1, places[:, None])[:, 0]
        drawn += here * (beside[:, position].amax(dim=1) - own)
    return drawn.topk(looked_at(places.shape[1])).indices


def looked_at(width: int) -> int:
    """How many of so many channels are looked at in a round."""
    return max(min(width, FEWEST), width // PART)


def _apart(
    rows: list[int], best: list[float], partner: list[int], places: list[int], bound: float
) -> list[tuple[int, int]]:
    """The best exchanges, each below `bound`, of which no two touch the same block: their gains add up."""
    taken: set[int] = set()
    found = []
    for place in sorted(range(len(rows)), key=best.__getitem__):
        if best[place] >= bound:
            break
        touched = {places[rows[place]], places[partner[place]]}
        if taken.isdisjoint(touched):
            taken |= touched
            found.append((rows[place], partner[place]))
    return found


def block_traces(inputs: Tensor, weights: Tensor, order: Tensor, block: int) -> Tensor:
    """tr S_g of the blocks that orders make, int64 [E, G B]: float64 [E, n, G], from moments [E, n, K, K]."""
    members = order.unflatten(1, (-1, block))
    which = torch.arange(len(order), device=order.device).repeat_interleave(members.shape[1])
    return _traces_of(inputs, weights, which, members.flatten(0, 1)).unflatten(0, members.shape[:2]).mT


def _traces_of(inputs: Tensor, weights: Tensor, which: Tensor, members: Tensor) -> Tensor:
    """tr S_g of blocks of these members, int64 [M, B], among the channels of the sets of `which` [M]: [M, n]."""
    places = which[:, None, None], slice(None), members[:, :, None], members[:, None, :]
    of_inputs, of_weights = (moments[places].movedim(-1, 1) for moments in (inputs, weights))
    traces = of_inputs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    root = _roots(of_inputs, traces)
    found = torch.linalg.eigvalsh(root.mT @ of_weights @ root).clamp(min=0).sqrt().sum(dim=-1)
    return torch.where(traces > 0, found, 0.0)


def _roots(moments: Tensor, traces: Tensor) -> Tensor:
    """Cholesky factors of second moments [..., B, B], each plus a little of its trace."""
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    roots = torch.empty_like(moments)
    is_open = torch.ones_like(traces, dtype=torch.bool)
    for jitter in JITTERS:
        added = torch.where(traces > 0, jitter * traces, 1.0)[..., None, None]
        found, info = torch.linalg.cholesky_ex(moments + added * identity)
        roots = torch.where(is_open[..., None, None], found, roots)
        is_open &= info > 0
        if not is_open.any():
            break
    return roots


def _diagonal(moments: Tensor) -> Tensor:
    return moments.diagonal(dim1=-2, dim2=-1)
