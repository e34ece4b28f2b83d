"""A text: documents under one name, and their origin."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor

OWN_READ_AS = "written by the model"
"""The entry in a record for a text that the model writes while it is quantized."""
MOST_NAMED = 5
"""The most rows or files that a record names. Of the others it gives the number."""


@dataclass(frozen=True)
class Chat:
    """A conversation. The model's chat template turns it into text."""

    messages: list[dict[str, Any]]
    """Each with "role" and "content"."""
    place: str = field(default="", compare=False)
    """The row of the conversation, for error messages."""
    tools: list[Any] | None = None


@dataclass(frozen=True, eq=False)
class TokenIds:
    """A document of token ids, int64 [T]."""

    ids: Tensor


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """Windows that are used unchanged, int64 [W, T]."""

    ids: Tensor


@dataclass(frozen=True)
class Own:
    """A text that the quantized model will write itself."""


Document = str | Chat | TokenIds


@dataclass(frozen=True)
class Origin:
    """The rows and files of a text, and those that were left out."""

    rows: int | None = None
    column: str | None = None
    null_rows: tuple[int | str, ...] = ()
    """The numbers of the empty rows that were left out; for a folder, with the file before them."""
    files: int | None = None
    """The number of files of a folder."""
    other_files: tuple[str, ...] = ()
    """The names of files in the folder that are no text."""

    def as_table(self) -> dict[str, Any]:
        """The fields that are not empty. Of many null rows, their number and the first ones."""
        table: dict[str, Any] = {"rows": self.rows, "column": self.column, "files": self.files}
        if self.null_rows:
            table |= {"null_rows": len(self.null_rows), "first_null_rows": list(self.null_rows[:MOST_NAMED])}
        if self.other_files:
            table |= {"other_files": len(self.other_files), "first_other_files": list(self.other_files[:MOST_NAMED])}
        return {key: value for key, value in table.items() if value is not None}


@dataclass(frozen=True)
class Text:
    """A named text: one string, several documents, or windows of tokens."""

    name: str
    content: str | tuple[Document, ...] | TokenWindows | Own
    weight: float = field(default=1.0, compare=False)
    """Its weight in a mixture, relative to those of the other texts."""
    origin: Origin = field(default=Origin(), compare=False)

    @property
    def documents(self) -> tuple[Document, ...]:
        """The documents, which are tokenized separately. Empty if the text is windows, or yet to be written."""
        if isinstance(self.content, (TokenWindows, Own)):
            return ()
        return (self.content,) if isinstance(self.content, str) else self.content

    @property
    def is_empty(self) -> bool:
        """True if there is only white space."""
        if isinstance(self.content, TokenWindows):
            return self.content.ids.numel() == 0
        if isinstance(self.content, Own):
            return False
        return not any(_holds_something(document) for document in self.documents)

    @property
    def needs_tokenizer(self) -> bool:
        """True if anything is not token ids yet."""
        return not all(isinstance(document, TokenIds) for document in self.documents)

    @property
    def rendered(self) -> str:
        """How its documents become tokens, in words."""
        if isinstance(self.content, TokenWindows):
            return "windows of token ids"
        if isinstance(self.content, Own):
            return OWN_READ_AS
        kinds = {type(document): None for document in self.documents}
        return " and ".join(_RENDERED[kind] for kind in kinds) or _RENDERED[str]

    @property
    def digest(self) -> str:
        """SHA-256 of its UTF-8 bytes, or of the list of documents as JSON if there are several."""
        if isinstance(self.content, str):
            return sha256(self.content.encode()).hexdigest()
        if isinstance(self.content, TokenWindows):
            plain: Any = self.content.ids.tolist()
        elif isinstance(self.content, Own):
            plain = None
        else:
            plain = [_plain(document) for document in self.content]
        return sha256(json.dumps(plain, ensure_ascii=False, sort_keys=True, default=str).encode()).hexdigest()


_RENDERED: dict[type, str] = {str: "text", Chat: "chat template", TokenIds: "token ids"}


def _holds_something(document: Document) -> bool:
    if isinstance(document, str):
        return bool(document.strip())
    return bool(document.messages) if isinstance(document, Chat) else document.ids.numel() > 0


def _plain(document: Document) -> Any:
    if isinstance(document, str):
        return document
    if isinstance(document, Chat):
        return {"messages": document.messages, "tools": document.tools}
    return document.ids.tolist()
