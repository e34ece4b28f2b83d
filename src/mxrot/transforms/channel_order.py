"""The order in which channels go into blocks, free if their producing rows and reading columns can be permuted.

A transform that balances second moments leaves a block of channels the error (tr S_g)^2 / B. Here S_g are the singular
values of L_w^T L_x, with S_x = L_x L_x^T and S_w = L_w L_w^T the block's moments of inputs and weights
(transforms/moments). So an order is good if F = sum_g (tr S_g)^2 is small. Let a_i^2 = S_x,ii S_w,ii, and let r and q
be the correlations of two channels in S_x and in S_w. A block of these two alone has the trace a_i + a_j - v_ij with
(ours: for a matrix M of two rows, tr M^(1/2) = (tr M + 2 (det M)^(1/2))^(1/2))

    v_ij = a_i + a_j - (a_i^2 + a_j^2 + 2 a_i a_j (r q + ((1 - r^2) (1 - q^2))^(1/2)))^(1/2)

- "balanced": the sums of a_i are made equal. Channels are dealt in decreasing order, each to the cheapest block that is
  not full.
- "correlated": starting from there, pairs of channels in two blocks change places. v suggests which exchanges may help:
  the worth of a channel in a block is a share k_g of the sum of its v there, with k_g taken from the block's own trace,
  tr S_g = sum_i a_i - k_g sum_(i<j) v_ij. The traces themselves give the effect of an exchange, and one that makes F
  larger is taken back.

If the new order does not make F smaller, the old order stays. Otherwise the blocks are sorted by decreasing tr S_g, so
that GPTQ rounds the largest first. Several sets of moments may share one order (the query heads that read one value
head). F is then their sum.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ChannelOrder = Literal["none", "balanced", "correlated"]

ROUNDS = 64
"""The most rounds of exchanges. A block takes part in one exchange per round."""
ROWS = 128
"""The rows of v computed at once."""
PART, FEWEST = 4, 256
"""A round considers one channel in PART, at least FEWEST: those that other blocks attract most."""
NARROW = 128
"""Up to this many channels a CPU is faster: a GPU takes longer to launch a round than to compute it."""
JITTERS = (1e-12, 1e-9, 1e-6)
"""Shares of a block's trace, added to its diagonal so that a matrix without full rank has a Cholesky factor. The first
that works is taken."""
ORDER_BYTES = {"none": 0.0, "balanced": 18.0, "correlated": 20.0}
"""Bytes for each of K^2 pairs of channels, at the peak, the moments of inputs and weights (8 each) included."""
LOOK_BYTES = 41.0
"""Bytes for each pair with one channel considered in a round."""
TOGETHER_BYTES = 2**30
"""The bytes that orders found together may take."""
LEAST_GAIN = 1e-4
"""The least expected decrease of F by an exchange, relative to the mean of a block."""


def channel_order(inputs: Tensor, weights: Tensor, block: int, kind: ChannelOrder, rounds: int = ROUNDS) -> Tensor:
    """The order of K channels for blocks of `block`: int64 [K] on the CPU. Channel j is the former channel order[j].

    `inputs` and `weights` are second moments [n, K, K], float64, of n sets of channels that share the order. K is a
    multiple of `block`. Channels with zero moments are dealt like the others.
    """
    return channel_orders(inputs[None], weights[None], block, kind, rounds)[0]


def channel_orders(inputs: Tensor, weights: Tensor, block: int, kind: ChannelOrder, rounds: int = ROUNDS) -> Tensor:
    """Like `channel_order`, for E independent groups of sets [E, n, K, K]: orders [E, K].

    A GPU takes about as long for many narrow ones as for one. `at_once` tells how many fit into memory.
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
    """The number of orders of `width` channels, with `count` sets each, that are found together; at least one."""
    return max(1, int(TOGETHER_BYTES / (count * (ORDER_BYTES["correlated"] + LOOK_BYTES) * width**2)))


def dealt(sizes: Tensor, block: int) -> Tensor:
    """The block of each channel, int64 [E, K], from sizes a [E, n, K] on the CPU, for a small sum of squared block
    sums."""
    orders, count, width = sizes.shape
    each = torch.arange(orders)
    sums = torch.zeros(orders, count, width // block, dtype=sizes.dtype)
    room = torch.full((orders, width // block), block)
    places = torch.empty(orders, width, dtype=torch.int64)
    for channel in sizes.square().sum(dim=1).argsort(descending=True, stable=True).T:
        own = sizes[each, :, channel, None]
        cost = (sums * own).sum(dim=1).masked_fill(room == 0, torch.inf)
        # In a tie the emptiest block is taken. Otherwise all channels of size zero would go to the first.
        chosen = torch.where(cost == cost.amin(dim=1, keepdim=True), room, -1).argmax(dim=1)
        places[each, channel] = chosen
        sums[each, :, chosen] += own[..., 0]
        room[each, chosen] -= 1
    return places


def pair_gains(inputs: Tensor, weights: Tensor) -> Tensor:
    """v, the decrease of the trace by two channels sharing a block; float32 [..., K, K], zero on the diagonal."""
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
    """The places [E, K], the block of each channel, after exchanges of two channels that each decrease F."""
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
    """The expected change of F when channels i, of `rows` [E, R], and j change places: float32 [E, R, K].

    It is 0 for channels of the same block. Let t_g be the trace of a block [E, n, G], and c_i,g be k_g times the sum of
    v_ij over the j in it. For i in g and j in h, block g gets t_g - a_i + a_j + c_i,g - c_j,g + k_g v_ij, and h the
    same with i and j swapped.
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
    """The worth c [E, n, G, K] of each channel in each block, and the share k [E, n, G] of each block."""
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
    """The channels most attracted to another block, int64 [E, R]; R is a part of all channels."""
    beside, _ = worths
    drawn = torch.zeros_like(beside[:, 0, 0])
    for position in range(traces.shape[1]):
        here = traces[:, position].to(drawn.dtype).gather(1, places)
        own = beside[:, position].gather(1, places[:, None])[:, 0]
        drawn += here * (beside[:, position].amax(dim=1) - own)
    return drawn.topk(looked_at(places.shape[1])).indices


def looked_at(width: int) -> int:
    """The number of `width` channels that a round considers."""
    return max(min(width, FEWEST), width // PART)


def _apart(
    rows: list[int], best: list[float], partner: list[int], places: list[int], bound: float
) -> list[tuple[int, int]]:
    """The best exchanges below `bound` of which no two touch the same block, so that their gains add up."""
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
    """tr S_g of the blocks that orders, int64 [E, G B], make: float64 [E, n, G], from moments [E, n, K, K]."""
    members = order.unflatten(1, (-1, block))
    which = torch.arange(len(order), device=order.device).repeat_interleave(members.shape[1])
    return _traces_of(inputs, weights, which, members.flatten(0, 1)).unflatten(0, members.shape[:2]).mT


def _traces_of(inputs: Tensor, weights: Tensor, which: Tensor, members: Tensor) -> Tensor:
    """tr S_g [M, n] of blocks with these members, int64 [M, B], among the channels of the sets `which` [M]."""
    places = which[:, None, None], slice(None), members[:, :, None], members[:, None, :]
    of_inputs, of_weights = (moments[places].movedim(-1, 1) for moments in (inputs, weights))
    traces = of_inputs.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    root = _roots(of_inputs, traces)
    found = torch.linalg.eigvalsh(root.mT @ of_weights @ root).clamp(min=0).sqrt().sum(dim=-1)
    return torch.where(traces > 0, found, 0.0)


def _roots(moments: Tensor, traces: Tensor) -> Tensor:
    """Cholesky factors of second moments [..., B, B], each plus a small share of its trace."""
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
