"""Names and texts from outside, escaped so that Markdown shows them unchanged."""

from __future__ import annotations

import re


def plain_text(text: str) -> str:
    """The text as part of a paragraph or heading, on one line."""
    line = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
    escaped = re.sub(r"([\\`*\[\]<>|]|&(?=\w+;|#))", r"\\\1", line)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", re.sub(r"^(#|[+-](?= ))", r"\\\1", escaped))


def code(text: str) -> str:
    """The text as inline code, between enough backticks."""
    line = " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode()
    fence = "`" * (max(map(len, re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def code_block(text: str, language: str) -> str:
    """The text as a code block, which ends with a line break."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}{fence}"


def cell(text: str) -> str:
    """The text as a cell of a table."""
    return plain_text(text).replace("\\|", "|").replace("|", "\\|")
