"""Conversations in the formats of data sets: `messages`, ShareGPT's `conversations`, Alpaca's instructions.

All become messages for a chat template: {"role", "content"}.
"""

from __future__ import annotations

from typing import Any

from mxrot.errors import DataError

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""ShareGPT's names of speakers, and the roles of templates."""

ANSWERS = ("output", "response")
"""The keys of the answer in an Alpaca row."""


def looks_like_messages(value: Any) -> bool:
    """True for a list of messages, in any of the formats."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], dict):
        return False
    return {"role", "from"} & value[0].keys() != set()


def messages_of(value: Any, where: str, system: Any = None) -> list[dict[str, Any]]:
    """Messages with roles and contents. `system` is put before them. DataError with `where` if they are no messages."""
    if not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: expected a list of messages, got {_kind(value)}")
    messages = [_message(item, f"{where}, message {number}") for number, item in enumerate(value, start=1)]
    if messages and isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def alpaca_messages(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The instruction, followed by its input after a blank line, and the answer."""
    answer = next(row[name] for name in ANSWERS if name in row)
    values = {"instruction": row["instruction"], "input": row.get("input"), "output": answer}
    for name, value in values.items():
        if not isinstance(value, str) and not (value is None and name == "input"):
            raise DataError(f"{where}: {name!r} holds {_kind(value)}; expected text")
    asked = values["instruction"] + (f"\n\n{values['input']}" if values["input"] else "")
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages_of(turns, where, row.get("system"))


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"{where}: expected an object with role and content, got {_kind(item)}")
    # Tables fill missing keys with null, but templates check whether a key exists.
    given = {key: value for key, value in item.items() if value is not None}
    if "role" not in given and "from" in given:
        speaker = given.pop("from")
        if speaker not in _ROLES:
            raise DataError(f"{where}: from {speaker!r} is not one of {', '.join(_ROLES)}")
        given = {"role": _ROLES[speaker], "content": given.pop("value", None), **given}
    if not isinstance(given.get("role"), str):
        raise DataError(f"{where}: has no role")
    content = given.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, where)
    elif content is None and "tool_calls" in given:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {_kind(content)}; expected text")
    return given | {"content": content}


def _joined_parts(parts: list[Any], where: str) -> str:
    """The text of contents in parts, as in the OpenAI API."""
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise DataError(f"{where}: a part of its content is {kind}; only text can be read")
    return "".join(part["text"] for part in parts)


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
