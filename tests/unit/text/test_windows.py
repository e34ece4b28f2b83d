from typing import Any

import pytest
import torch

from mxrot.errors import ConfigError
from mxrot.report import text_lines
from mxrot.text import Origin, Reader, Text, TokenWindows, read_windows

LEFT = "1 token at its end, too few for a window, left out"


class Letters:
    eos_token_id = ord(".")

    def __call__(self, text: str, verbose: bool, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_what_is_left_out_is_counted() -> None:
    found = read_windows(Text("t", "abcdefgh"), Reader(Letters()), 3)
    assert (found.tokens, found.whole, len(found.ids), found.left_out, found.ends) == (8, 2, 2, 2, False)
    found = read_windows(Text("t", "abcdefg."), Reader(Letters()), 3, 1)
    assert (found.whole, len(found.ids), found.left_out, found.ends, found.asked) == (2, 1, 2, True, 1)
    found = read_windows(Text("t", "abcde."), Reader(Letters()), 3)
    assert (found.left_out, found.ends) == (0, False)
    found = read_windows(Text("t", "abcdefgh"), Reader(Letters(), start=1), 4)
    assert (found.tokens, found.whole, found.left_out, found.ids[:, 0].tolist()) == (8, 2, 2, [1, 1])


def test_windows_that_are_given_stay() -> None:
    given = torch.arange(12).view(4, 3)
    found = read_windows(Text("t", TokenWindows(given)), Reader(Letters()), 99, 2, True)
    assert found.ids.tolist() == given[[0, 2]].tolist() and found.whole == 4 and found.left_out == 0
    with pytest.raises(ConfigError, match="begins with token 0; texts for this model begin with 7"):
        read_windows(Text("t", TokenWindows(given)), Reader(Letters(), start=7), 3)
    with pytest.raises(ConfigError, match=r"windows of shape \(4, 1\)"):
        read_windows(Text("t", TokenWindows(given[:, :1])), Reader(Letters()), 3)


def test_only_tokens_of_kept_windows_must_be_known() -> None:
    reader = Reader(Letters(), embedding_rows=ord("z"))
    assert len(read_windows(Text("t", "aabbzz"), reader, 2, 2).ids) == 2
    with pytest.raises(ConfigError, match=f"has id {ord('z')}"):
        read_windows(Text("t", "aabbzz"), reader, 2)


@pytest.mark.parametrize(
    ("content", "limit", "line"),
    [
        ("abcdef", None, "text t: 6 tokens, 2 windows of 3"),
        ("abcdef", 1, "text t: 6 tokens, 2 windows of 3; 1 taken"),
        ("abcd", 5, f"text t: 4 tokens, 1 window of 3; asked for 5, it has no more; {LEFT}"),
        ("abc.", None, f"text t: 4 tokens, 1 window of 3; {LEFT}, the end-of-text token among them"),
    ],
)
def test_lines(content: str, limit: int | None, line: str) -> None:
    assert text_lines([read_windows(Text("t", content), Reader(Letters()), 3, limit).as_table()]) == [line]


def test_a_line_names_rows_and_files_that_were_left_out() -> None:
    origin = Origin(9, "body", (2, 3, 4, 5, 6, 7), 3, ("a.pdf",))
    table = read_windows(Text("t", "abc", origin=origin), Reader(Letters()), 3).as_table()
    assert table["null_rows"] == 6 and table["first_null_rows"] == [2, 3, 4, 5, 6]
    assert text_lines([table])[0].endswith(
        "column body; 3 files; 1 file of other kinds left out (a.pdf); 6 rows of 9 are null and left out "
        "(2, 3, 4, 5, 6, ...)"
    )
