"""The worst passage of a report: its tokens as text, and the continuations of both models."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mxrot.evaluation import worst_passage
from mxrot.prompting import continue_prompt
from mxrot.report.contents import ShownPassage
from mxrot.text import Windows

_CONTEXT = 24
"""The number of tokens shown before the passage. The models read all tokens of the window."""


def shown_passage(model: PreTrainedModel, original: PreTrainedModel, tokenizer: Any, read: Windows) -> ShownPassage:
    """The worst passage of these windows."""
    found = worst_passage(model, original, read.ids)
    before = read.ids[found.window : found.window + 1, : found.start]
    words = [
        [_word(tokenizer, number) for number in each.tolist()] for each in (found.ids, found.original, found.quantized)
    ]
    places = range(found.start, found.start + len(found.ids))
    says = [continue_prompt(each, tokenizer, before, len(found.ids)) for each in (original, model)]
    last = places[-1]
    return ShownPassage(
        where=f"Tokens {found.start} to {last} of window {found.window} of the text {read.text.name}, both from 0.",
        rows=list(zip(places, words[0], found.kl.tolist(), words[1], words[2], strict=True)),
        context="".join(_word(tokenizer, number) for number in before[0, -_CONTEXT:].tolist()),
        original=says[0],
        quantized=says[1],
    )


def _word(tokenizer: Any, number: int) -> str:
    return str(tokenizer.decode([number]))
