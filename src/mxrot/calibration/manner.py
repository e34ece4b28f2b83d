"""How a model writes its own calibration text: the starts of sequences, conversations, and sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.sections import First
from mxrot.text import Turns


@dataclass(frozen=True)
class Manner:
    """How sequences are written. Those of each kind are spread evenly over all; the rest is free text."""

    first: First = "uniform"
    prompted: float = 0.0
    """The share that continues a piece of a given text."""
    chats: float = 0.0
    """The share of conversations, in which the model is both speakers. It counts as 0 without `turns`."""
    temperatures: tuple[float, ...] = (1.0,)
    """Sampling temperatures, taken in turn by each kind's sequences."""
    turns: Turns | None = None
    """The turns of the model's chat template."""


@dataclass(frozen=True)
class Kinds:
    """The sequences of each kind: rows, int64."""

    prompted: Tensor
    chats: Tensor
    free: Tensor

    @staticmethod
    def of(manner: Manner, sequences: int, has_text: bool) -> Kinds:
        """The kinds that `manner` asks for. Without text to continue or a chat template these are free text."""
        prompted = _spread(torch.arange(sequences), manner.prompted if has_text else 0.0, sequences)
        rest = _without(torch.arange(sequences), prompted)
        chats = _spread(rest, 0.0 if manner.turns is None else manner.chats, sequences)
        return Kinds(prompted, chats, _without(rest, chats))

    def temperatures(self, values: tuple[float, ...]) -> Tensor | None:
        """The temperature of each sequence, float32 [S, 1]; None if all are 1."""
        if set(values) == {1.0}:
            return None
        found = torch.empty(sum(len(rows) for rows in (self.prompted, self.chats, self.free)), 1)
        for rows in (self.prompted, self.chats, self.free):
            found[rows, 0] = torch.tensor(values)[torch.arange(len(rows)) % len(values)]
        return found


def _spread(rows: Tensor, share: float, of: int) -> Tensor:
    """A share of `of`, taken evenly from `rows`; at most all of them."""
    count = min(len(rows), round(share * of))
    return rows[torch.arange(count) * len(rows) // max(1, count)]


def _without(rows: Tensor, taken: Tensor) -> Tensor:
    return rows[~torch.isin(rows, taken)]
