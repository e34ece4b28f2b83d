"""The tokens that a chat template puts around the turns of a conversation: before the user's text, and between
speakers.

A model that was trained on conversations also writes the user's turn, after the tokens before it (Magpie, arXiv
2406.08464, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mxrot.text.tokens import TEMPLATE_DATE

_MARKS = ("zqxuserone", "zqxanswer", "zqxusertwo")
"""The texts of the speakers in a sample conversation, which shows the tokens around them. No template contains them."""


@dataclass(frozen=True)
class Turns:
    """Token ids that a chat template writes, without the texts of the speakers."""

    opening: tuple[int, ...]
    """Before the user's first text."""
    answer: tuple[int, ...]
    """Between the user's text and the answer."""
    question: tuple[int, ...]
    """Between the answer and the user's next text."""
    ends: tuple[int, ...] = ()
    """Special tokens that end a turn: the first ones between two speakers, if they are special."""


def turns_of(tokenizer: Any) -> Turns | None:
    """The turns of a tokenizer's chat template. None if it has none, or if it accepts no plain conversation."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        return None
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, _MARKS, strict=True)]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, date_string=TEMPLATE_DATE))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError):
        return None
    if [rendered.count(mark) for mark in _MARKS] != [1, 1, 1]:
        return None
    opening, rest = rendered.split(_MARKS[0])
    answer, rest = rest.split(_MARKS[1])
    question, _ = rest.split(_MARKS[2])
    parts = [_ids(part, tokenizer) for part in (opening, answer, question)]
    if not all(parts):
        return None
    special = {
        *tokenizer.all_special_ids,
        *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special),
    }
    ends = dict.fromkeys(part[0] for part in parts[1:] if part[0] in special)
    return Turns(parts[0], parts[1], parts[2], tuple(ends))


def _ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])
