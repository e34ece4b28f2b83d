"""The ring of the newest tokens: against a list of all."""

from __future__ import annotations

import random as draws

import pytest
import torch

from mxrot.layers.recent_tokens import ROOM, RecentTokens


@pytest.mark.parametrize("seed", range(5))
def test_it_holds_the_newest_tokens(seed: int) -> None:
    """After any appends, of one token or many, crops and choices of sequences."""
    drawn, generator = draws.Random(seed), torch.Generator().manual_seed(seed)
    recent, all_keys, held = RecentTokens(), torch.zeros(2, 3, 0, 4), 0
    for _ in range(300):
        tokens = drawn.choice([1, 1, 1, 2, 7, 90])
        key = torch.randn(len(all_keys), 3, tokens, 4, generator=generator)
        recent.append(key, -key)
        all_keys, held = torch.cat([all_keys, key], dim=2), held + tokens
        if drawn.random() < 0.8:
            recent.keep(20)
            held = min(held, 20)
            assert recent.capacity <= 20 + 1 + ROOM
        if drawn.random() < 0.1:
            removed = drawn.randrange(min(held, 9) + 1)
            recent.drop_last(removed)
            all_keys, held = all_keys[:, :, : all_keys.shape[2] - removed], held - removed
        if drawn.random() < 0.05:
            order = torch.tensor([1, 0])
            recent.select(order)
            all_keys = all_keys[order]
        assert recent.length == held
        start = drawn.randrange(held + 1)
        k, v = recent.read(start, held)
        expected = all_keys[:, :, all_keys.shape[2] - held + start :]
        assert torch.equal(k, expected) and torch.equal(v, -expected)


def test_single_tokens_cost_no_copies() -> None:
    recent = RecentTokens()
    for token in range(200):
        recent.append(torch.full((1, 1, 1, 2), float(token)), torch.zeros(1, 1, 1, 2))
        recent.keep(20)
        if token == 60:
            assert recent.rings is not None
            before = recent.rings[0].data_ptr()
    assert recent.rings is not None and recent.rings[0].data_ptr() == before
    assert recent.nbytes == 2 * recent.capacity * 2 * 4
