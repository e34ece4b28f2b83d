from typing import Any

import pytest
import torch

from mxrot.errors import ConfigError
from mxrot.text import Chat, Reader, Text, TokenIds, check_ids, token_ids
from mxrot.text import tokens as module


class Letters:
    """A tokenizer that knows the code points, with a letter before each text."""

    chat_template = "yes"

    def __init__(self, begin: str = "") -> None:
        self.begin = begin

    def __call__(self, text: str, verbose: bool, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [ord(letter) for letter in (self.begin if add_special_tokens else "") + text]}

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool, **options: Any) -> str:
        assert not tokenize and options["date_string"] == module.TEMPLATE_DATE
        return "<" + "|".join(message["content"] for message in messages) + ">"


def read(*documents: Any, begin: str = "", start: int | None = None) -> str:
    ids = token_ids(Text("t", documents), Reader(Letters(begin), start))
    assert ids.dtype == torch.int64
    return "".join(map(chr, ids.tolist()))


CHAT = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}])
IDS = TokenIds(torch.tensor([ord("x"), ord("y")]))


def test_documents_are_joined_by_blank_lines_or_begin_each() -> None:
    assert read("one", "two") == "one\n\ntwo"
    assert read("one", "two", begin="^") == "^one^two"
    assert read("one", begin="^") == "^one"


def test_conversations_and_ids_have_what_they_bring() -> None:
    assert read(CHAT, CHAT, begin="^") == "<hi|ho><hi|ho>"
    assert read("a", CHAT, "b", "c", IDS) == "a<hi|ho>b\n\ncxy"
    assert read("a", CHAT, IDS, begin="^") == "^a<hi|ho>xy"


def test_what_windows_begin_with_is_in_no_document() -> None:
    assert read("one", "two", begin="^", start=ord("^")) == "one\n\ntwo"
    assert read(CHAT, IDS, start=ord("<")) == "hi|ho>xy"
    assert read(IDS, IDS, start=ord("x")) == "yy"


def test_large_texts_tell_how_far_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, int, str]] = []
    text, reader = Text("t", tuple("abc" for _ in range(130))), Reader(Letters("^"))
    token_ids(text, reader, lambda *now: told.append(now))
    assert told == []
    monkeypatch.setattr(module, "CHARACTERS_THAT_TAKE_TIME", 390)
    token_ids(text, reader, lambda *now: told.append(now))
    assert [done for done, total, what in told if (total, what) == (130, "tokenizing t")] == [0, 64, 128, 130]


@pytest.mark.parametrize("token", [-1, 5, 2**40])
def test_ids_that_the_embedding_lacks(token: int) -> None:
    reader = Reader(Letters(), embedding_rows=5)
    check_ids(torch.tensor([[0, 4]]), "t", reader)
    check_ids(torch.tensor([], dtype=torch.int64), "t", reader)
    with pytest.raises(ConfigError, match=rf"^t: token \(unknown to the tokenizer\) has id {token}, and .* has 5 rows"):
        check_ids(torch.tensor([[0, 1], [token, 99]]), "t", reader)
    check_ids(torch.tensor([99]), "t", Reader(Letters()))
