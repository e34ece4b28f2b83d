"""Documents to token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError, DataError
from mxrot.progress import Progress, silent
from mxrot.text.document import Chat, Document, Text

TEMPLATE_DATE = "26 Jul 2024"
"""The date for templates that write one, so that a run can be repeated on another day. It is the default of Llama 3's
template."""
CHARACTERS_THAT_TAKE_TIME = 1_000_000
"""The number of characters, about a second's work, above which progress is shown."""
_DOCUMENTS_BETWEEN_SIGNS = 64


@dataclass(frozen=True)
class Reader:
    """The properties of the model that decide about the tokens of a text."""

    tokenizer: Any
    start: int | None = None
    """The token that each window must begin with. None if there is none."""
    embedding_rows: int | None = None
    """The upper bound of token ids. None if it is not known."""


def token_ids(text: Text, reader: Reader, progress: Progress = silent) -> Tensor:
    """The tokens of all documents of a text, concatenated, int64 [N].

    Each document is tokenized separately, with the special tokens that the tokenizer adds around a text. If it adds
    none, text documents are joined by blank lines and tokenized as one string. A conversation has only the tokens that
    the chat template writes. If the reader has a `start`, windows get it, and documents do not contain it.

    ConfigError for a conversation without a template, DataError if the template refuses one.
    """
    documents = _joined(text.documents, reader)
    total = max(1, len(documents))
    if _characters(documents) < CHARACTERS_THAT_TAKE_TIME:
        progress = silent
    pieces = []
    for number, document in enumerate(documents):
        if number % _DOCUMENTS_BETWEEN_SIGNS == 0:
            progress(number, total, f"tokenizing {text.name}")
        ids = torch.as_tensor(_ids_of(document, reader), dtype=torch.int64)
        if reader.start is not None and len(ids) and ids[0] == reader.start:
            ids = ids[1:]
        pieces.append(ids)
    progress(total, total, f"tokenizing {text.name}")
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _characters(documents: list[Document]) -> int:
    """The approximate number of characters to be tokenized."""
    prose = sum(len(document) for document in documents if isinstance(document, str))
    chats = (document.messages for document in documents if isinstance(document, Chat))
    return prose + sum(len(message["content"]) for messages in chats for message in messages)


def check_ids(ids: Tensor, name: str, reader: Reader) -> None:
    """ConfigError if a token id has no row in the embedding."""
    if reader.embedding_rows is None or ids.numel() == 0:
        return
    wrong = ids[(ids < 0) | (ids >= reader.embedding_rows)]
    if wrong.numel() == 0:
        return
    token = int(wrong[0])
    raise ConfigError(
        f"{name}: token {_spelled(token, reader.tokenizer)} has id {token}, and the model's embedding has "
        f"{reader.embedding_rows} rows; the tokenizer or the ids are of another model, or tokens were added without "
        "resize_token_embeddings"
    )


def adds_tokens(tokenizer: Any) -> bool:
    """True if the tokenizer adds special tokens around a text."""
    return len(tokenizer("", verbose=False)["input_ids"]) > 0


def _joined(documents: tuple[Document, ...], reader: Reader) -> list[Document]:
    """The documents that are tokenized separately."""
    if sum(isinstance(document, str) for document in documents) < 2:
        return list(documents)
    if reader.start is None and adds_tokens(reader.tokenizer):
        return list(documents)
    joined: list[Document] = []
    run: list[str] = []
    for document in documents:
        if isinstance(document, str):
            run.append(document)
            continue
        joined += ["\n\n".join(run)] if run else []
        run = []
        joined.append(document)
    return [*joined, "\n\n".join(run)] if run else joined


def _ids_of(document: Document, reader: Reader) -> Any:
    if isinstance(document, str):
        options = {} if reader.start is None else {"add_special_tokens": False}
        return reader.tokenizer(document, verbose=False, **options)["input_ids"]
    if isinstance(document, Chat):
        return reader.tokenizer(_rendered(document, reader.tokenizer), verbose=False, add_special_tokens=False)[
            "input_ids"
        ]
    return document.ids


def _rendered(chat: Chat, tokenizer: Any) -> str:
    """The text of a conversation by the model's chat template."""
    import jinja2

    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{chat.place}: is a conversation, and the tokenizer has no chat template to write it with; put the "
            "model's chat_template.jinja into its folder, or give a text"
        )
    options = {} if chat.tools is None else {"tools": chat.tools}
    try:
        return str(tokenizer.apply_chat_template(chat.messages, tokenize=False, date_string=TEMPLATE_DATE, **options))
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{chat.place}: the model's chat template does not take this conversation: {reason}") from error


def _spelled(token: int, tokenizer: Any) -> str:
    """The token's string in the tokenizer's vocabulary, if it is known."""
    try:
        word = tokenizer.convert_ids_to_tokens(token)
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
        word = None
    return "(unknown to the tokenizer)" if word is None else repr(word)
