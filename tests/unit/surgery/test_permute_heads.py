"""Channels inside value heads in another order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.unit.surgery.changed_sources import logits, off_by, write_with_biases
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import FolderSource
from mxrot.surgery import PermutedHeads

VALUES, READER = "self_attn.v_proj", "self_attn.o_proj"


@pytest.fixture
def exact(tmp_path: Path) -> FolderSource:
    return FolderSource(write_with_biases(tmp_path / "exact"))


def drawn(seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(16, generator=draws) for _ in range(4)]).unflatten(0, (2, 2))


def test_the_function_stays_and_bits_only_move(exact: FolderSource) -> None:
    """Each value head has an order of its own, which the query heads that read it share."""
    orders = drawn()
    source = PermutedHeads(exact, orders)
    assert 0 < off_by(logits(source), logits(exact)) < 1e-12
    before, after = exact.block(1), source.block(1)
    for head, order in enumerate(orders[1]):
        rows = slice(16 * head, 16 * head + 16)
        for kind in ("weight", "bias"):
            name = f"{VALUES}.{kind}"
            assert torch.equal(after[name][rows], before[name][rows][order])
        for query in (2 * head, 2 * head + 1):
            columns = slice(16 * query, 16 * query + 16)
            name = f"{READER}.weight"
            assert torch.equal(after[name][:, columns], before[name][:, columns][:, order])
    others = before.keys() - {f"{VALUES}.weight", f"{VALUES}.bias", f"{READER}.weight"}
    assert all(torch.equal(after[name], before[name]) for name in others)


def test_the_inverse_orders_give_every_bit_back(exact: FolderSource) -> None:
    source = PermutedHeads(PermutedHeads(exact, drawn()), drawn().argsort(dim=-1))
    assert all(torch.equal(tensor, exact.block(1)[name]) for name, tensor in source.block(1).items())
    assert len(set(source.changes)) == 2


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        (drawn()[:1], r"value heads: orders of shape \[1, 2, 16\]; expected \[2, 2, 16\]$"),
        (torch.zeros(2, 2, 16), "value heads: an order that is no permutation of 16$"),
    ],
)
def test_what_is_no_order_is_refused(exact: FolderSource, orders: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PermutedHeads(exact, orders)
