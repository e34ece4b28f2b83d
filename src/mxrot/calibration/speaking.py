"""Conversations in which the model is both speakers: whose turn it is, and the tokens between two turns."""

from __future__ import annotations

import torch
from torch import Tensor

from mxrot.text import Turns

USER_TOKENS = 64
"""The length of a user's turn, at most. An answer has no limit."""


class Speakers:
    """The state of conversations written side by side, one token at a time, [S] each.

    A turn ends when the model draws a token that ends it, or after USER_TOKENS of a user. Then the tokens follow that
    the template puts before the next turn.
    """

    def __init__(self, turns: Turns, ends: tuple[int, ...], is_chat: Tensor) -> None:
        device, count = is_chat.device, len(is_chat)
        self.is_chat = is_chat
        self._ends = torch.tensor(sorted({*turns.ends, *ends}), device=device)
        between = (turns.answer, turns.question)
        self._lengths = torch.tensor([len(part) for part in between], device=device)
        self._between = torch.zeros(2, max(len(part) for part in between), dtype=torch.int64, device=device)
        for row, part in zip(self._between, between, strict=True):
            row[: len(part)] = torch.tensor(part, device=device)
        self._answers = torch.zeros(count, dtype=torch.int64, device=device)  # 1 during an answer
        self._said = torch.zeros(count, dtype=torch.int64, device=device)
        self._written = torch.full((count,), -1, dtype=torch.int64, device=device)  # of the tokens between, or -1

    def next(self, drawn: Tensor, given: Tensor | None) -> Tensor:
        """The tokens [S] to write after the model has drawn `drawn`. Rows whose token is `given` (bool) wait."""
        speaks = self.is_chat if given is None else self.is_chat & ~given
        ends = torch.isin(drawn, self._ends) | ((self._answers == 0) & (self._said >= USER_TOKENS))
        begins = speaks & (self._written < 0) & ends
        self._written = torch.where(begins, 0, self._written)
        between = speaks & (self._written >= 0)
        # Indexed by the last speaker: row 0 is the text before an answer.
        token = torch.where(between, self._between[self._answers, self._written.clamp(min=0)], drawn)
        self._written = self._written + between.long()
        is_over = between & (self._written == self._lengths[self._answers])
        self._answers = torch.where(is_over, 1 - self._answers, self._answers)
        self._written = torch.where(is_over, -1, self._written)
        self._said = torch.where(between, 0, self._said + speaks.long())
        return token
