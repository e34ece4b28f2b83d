from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_model

from mxrot.models.tokenizer import load_tokenizer
from mxrot.text import Turns, turns_of

MARKED = """{{ 'Be kind.' }}{% for m in messages %}{{ '<b>' + m.role + ':' + m.content | trim + '<e>' }}{% endfor %}"""
BRACKETS = """{% for m in messages %}{{ '[' + m.content + ']' if m.role == 'user' else m.content }}{% endfor %}"""


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    found = load_tokenizer(write_tiny_model(tmp_path))
    found.add_special_tokens({"additional_special_tokens": ["<b>", "<e>"]})
    return found


def test_what_stands_around_turns(tokenizer: Any) -> None:
    tokenizer.chat_template = MARKED
    turns = turns_of(tokenizer)
    assert turns is not None
    written = [tokenizer.decode(list(part)) for part in (turns.opening, turns.answer, turns.question)]
    assert written == ["Be kind.<b>user:", "<e><b>assistant:", "<e><b>user:"]
    assert turns.ends == (tokenizer.convert_tokens_to_ids("<e>"),)


def test_a_conversation_is_the_template_s_own(tokenizer: Any) -> None:
    """The parts, with what is said between them, are what the template makes of the same conversation."""
    tokenizer.chat_template = MARKED
    turns = turns_of(tokenizer)
    assert isinstance(turns, Turns)
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    whole = tokenizer.apply_chat_template([*messages, {"role": "user", "content": "Ah"}], tokenize=False)
    said = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Why?", "So.", "Ah<e>")]
    made = [*turns.opening, *said[0], *turns.answer, *said[1], *turns.question, *said[2]]
    assert made == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_turn_that_no_special_token_ends(tokenizer: Any) -> None:
    tokenizer.chat_template = BRACKETS
    turns = turns_of(tokenizer)
    assert turns is not None and turns.ends == ()
    assert tokenizer.decode(list(turns.opening) + list(turns.answer) + list(turns.question)) == "[]["


@pytest.mark.parametrize(
    "template", [None, "{{ raise_exception('never') }}", "no word of it", "{{ messages[0].content }}"]
)
def test_a_template_that_takes_no_conversation(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    assert turns_of(tokenizer) is None
