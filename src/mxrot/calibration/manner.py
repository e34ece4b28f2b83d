"""How a model writes its own calibration text: where sequences begin, which are conversations, how it samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mxrot.sections import First
from mxrot.text import Turns


@dataclass(frozen=True)
class Manner:
    """How sequences are written. Those of a kind are spread evenly over all; the rest is free text."""

    first: First = "uniform"
    prompted: float = 0.0
    """Share that goes on from a piece of a given text."""
    chats: float = 0.0
    """Share that are conversations, both of whose speakers the model is; 0 counts where there are no `turns`."""
    temperatures: tuple[float, ...] = (1.0,)
    """The sequences of each kind take them in turn."""
    turns: Turns | None = None
    """Of the model's chat template."""


@dataclass(frozen=True)
class Kinds:
    """Which sequences are of which kind: rows, int64."""

    prompted: Tensor
    chats: Tensor
    free: Tensor

    @staticmethod
    def of(manner: Manner, sequences: int, has_text: bool) -> Kinds:
        """As `manner` says; free text where there is no text to go on from, or no chat template."""
        prompted = _spread(torch.arange(sequences), manner.prompted if has_text else 0.0, sequences)
        rest = _without(torch.arange(sequences), prompted)
        chats = _spread(rest, 0.0 if manner.turns is None else manner.chats, sequences)
        return Kinds(prompted, chats, _without(rest, chats))

    def temperatures(self, values: tuple[float, ...]) -> Tensor | None:
        """Of each sequence, float32 [S, 1]; None where none differs from 1."""
        if set(values) == {1.0}:
            return None
        found = torch.empty(sum(len(rows) for rows in (self.prompted, self.chats, self.free)), 1)
        for rows in (self.prompted, self.chats, self.free):
            found[rows, 0] = torch.tensor(values)[torch.arange(len(rows)) % len(values)]
        return found


def _spread(rows: Tensor, share: float, of: int) -> Tensor:
    """A share of `of`, taken evenly from `rows`, which are all there are at most."""
    count = min(len(rows), round(share * of))
    return rows[torch.arange(count) * len(rows) // max(1, count)]


def _without(rows: Tensor, taken: Tensor) -> Tensor:
    return rows[~torch.isin(rows, taken)]
