from __future__ import annotations

import pytest

from mxrot.checkpoint.markdown import cell, code, code_block, plain_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("SmolLM2-135M_v2", "SmolLM2-135M_v2"),
        ("two\nlines", "two lines"),
        ("[a](b)", r"\[a\](b)"),
        ("<b>&amp;", r"\<b\>\&amp;"),
        ("`x` *y* _z_ a|b \\", r"\`x\` \*y\* \_z\_ a\|b " + "\\\\"),
        ("# no heading", r"\# no heading"),
        ("\udcff", "\\\\udcff"),
    ],
)
def test_a_text_is_shown_as_it_is(text: str, expected: str) -> None:
    assert plain_text(text) == expected


def test_code_is_fenced_by_more_backticks_than_it_has() -> None:
    assert code("a") == "`a`" and code("a`b") == "``a`b``" and code("`a``") == "``` `a`` ```"
    assert code_block("x\n", "toml") == "```toml\nx\n```"
    assert code_block("```\n", "") == "````\n```\n````"


def test_cells() -> None:
    assert cell("a|b") == r"a\|b" and cell("---") == "---"
