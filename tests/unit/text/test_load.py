import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from mxrot.errors import ConfigError, DataError
from mxrot.text import Text, load_text, token_windows


class Letters:
    """A tokenizer that knows the code points."""

    begin = ""
    """What it adds to every text."""

    def __call__(self, text: str, verbose: bool, add_special_tokens: bool = True) -> dict[str, Any]:
        assert not verbose
        return {"input_ids": [ord(letter) for letter in (self.begin if add_special_tokens else "") + text]}


def windows_of(text: str, seq_len: int, limit: int | None = None, spread: bool = False) -> list[str]:
    got = token_windows(Text("t", text), Letters(), seq_len, limit, spread)
    assert got.dtype == torch.int64 and got.shape[1] == seq_len
    return ["".join(map(chr, row)) for row in got.tolist()]


def test_windows_do_not_overlap_and_the_tail_is_dropped() -> None:
    assert windows_of("abcdefgh", 3) == ["abc", "def"]
    assert windows_of("abcdef", 3) == ["abc", "def"]


def test_a_token_that_every_window_starts_with() -> None:
    tokenizer = Letters()
    tokenizer.begin = "^"
    text = Text("t", "abcdefgh")
    windows = token_windows(text, tokenizer, 3, None, start=ord("<"))
    assert ["".join(map(chr, row)) for row in windows.tolist()] == ["<ab", "<cd", "<ef", "<gh"]
    spread = token_windows(text, tokenizer, 3, 2, True, ord("<"))
    assert ["".join(map(chr, row)) for row in spread.tolist()] == ["<ab", "<ef"]
    assert token_windows(text, tokenizer, 3, None).tolist()[0] == [ord(letter) for letter in "^ab"]
    with pytest.raises(DataError, match="8 tokens do not fill one window of 10"):
        token_windows(text, tokenizer, 10, None, start=1)


def test_a_limit_keeps_the_first_windows_or_spreads_them() -> None:
    text = "aabbccddeeffgg"
    assert windows_of(text, 2, 3) == ["aa", "bb", "cc"]
    assert windows_of(text, 2, 3, spread=True) == ["aa", "cc", "ee"]
    assert windows_of(text, 2, 6, spread=True) == ["aa", "bb", "cc", "dd", "ee", "ff"]
    for limit in (7, 8, None):
        assert windows_of(text, 2, limit, spread=True) == ["aa", "bb", "cc", "dd", "ee", "ff", "gg"]


@pytest.mark.parametrize("count", range(1, 20))
def test_spread_windows_are_distinct_and_even(count: int) -> None:
    text = "".join(chr(i) * 2 for i in range(19))
    kept = [ord(window[0]) for window in windows_of(text, 2, count, spread=True)]
    gaps = [b - a for a, b in zip(kept, [*kept[1:], 19], strict=True)]
    assert kept[0] == 0 and len(kept) == count
    assert max(gaps) - min(gaps) <= 1


def test_a_text_that_fills_no_window() -> None:
    with pytest.raises(DataError, match=r"^t: 3 tokens do not fill one window of 4; give a longer text or "):
        windows_of("abc", 4)


@pytest.mark.parametrize(("seq_len", "limit"), [(1, None), (0, None), (2, 0), (2, -1)])
def test_windows_that_cannot_be(seq_len: int, limit: int | None) -> None:
    with pytest.raises(ConfigError, match="must be"):
        windows_of("abcdef", seq_len, limit)


def test_the_demo_texts_share_no_paragraph() -> None:
    calibration, evaluation = load_text("demo", "calibration"), load_text("demo", "evaluation")
    assert calibration.name == evaluation.name == "demo"
    # Word for word: the manual repeats some paragraphs with another indentation.
    parts = [[" ".join(p.split()) for p in text.content.split("\n\n")] for text in (calibration, evaluation)]
    assert all(len(part) == len(set(part)) > 100 for part in parts)
    assert not set(parts[0]) & set(parts[1])
    assert len(calibration.content) > len(evaluation.content) > 50_000
    assert load_text("demo", "calibration").digest == calibration.digest != evaluation.digest


def test_the_digest_is_of_the_bytes() -> None:
    assert Text("t", "grün").digest == sha256("grün".encode()).hexdigest()


# Files


def test_a_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    for name in ("wiki.test.raw", "notes.txt", "noending"):
        (tmp_path / name).write_text("  = Ä =\n\n text\n", encoding="utf-8")
        text = load_text(str(tmp_path / name), "evaluation")
        assert text.content == "  = Ä =\n\n text\n" and text.name == Path(name).stem


def test_a_name_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "wiki.test.raw"
    file.write_text("text")
    assert load_text(f"wikitext2={file}", "evaluation") == Text("wikitext2", "text")
    assert load_text("mine=demo", "evaluation").name == "mine"


def test_an_equals_sign_in_a_path_is_part_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "lang=en"
    folder.mkdir()
    (folder / "part=0.txt").write_text("text")
    assert load_text(str(folder / "part=0.txt"), "evaluation") == Text("part=0", "text")
    assert load_text(f"english={folder / 'part=0.txt'}", "evaluation") == Text("english", "text")


def test_records_of_jsonl_are_joined_by_blank_lines(tmp_path: Path) -> None:
    """Also where a string holds what Unicode calls a line break."""
    texts = ["one\ntwo", "", "three\u2028four\x85five\x0c"]
    lines = [json.dumps({"text": text, "id": 1}, ensure_ascii=False) for text in texts]
    file = tmp_path / "c4.jsonl"
    for ending in ("\n", "\r\n"):
        file.write_bytes((ending.join(lines) + ending + ending).encode())
        assert load_text(str(file), "calibration").content == "\n\n".join(texts)


def test_records_of_parquet_are_joined_by_blank_lines(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    file = tmp_path / "c4.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", "two"], "id": [1, 2]}), file)
    assert load_text(str(file), "calibration") == Text("c4", "one\n\ntwo")
    for other in ({"body": ["one", "two"]}, {"text": ["one", None, "two"]}):
        parquet.write_table(pyarrow.table(other), file)
        assert load_text(str(file), "calibration") == Text("c4", "one\n\ntwo")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), file)
    with pytest.raises(DataError, match=r"c4\.parquet: row 1, column 'text': holds int; expected text"):
        load_text(str(file), "calibration")


@pytest.mark.parametrize("content", ["", " \n\n \t"], ids=["nothing", "blank"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name}: the text is empty$"):
        load_text(str(tmp_path / name), "calibration")


def test_a_missing_file_lists_the_known_names(tmp_path: Path) -> None:
    for spec in (str(tmp_path / "wiki.raw"), f"wiki={tmp_path / 'wiki.raw'}"):
        with pytest.raises(DataError, match=r"no such text file \(known names: demo, own, wikitext2, c4\)$"):
            load_text(spec, "calibration")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "unfinished', r"line 2 is not JSON: "),
        ('{"body": "other"}', r'line 2 is not an object with a string "text"$'),
        ('["text"]', r'line 2 is not an object with a string "text"$'),
        ("3", r'line 2 is not an object with a string "text"$'),
    ],
)
def test_a_bad_line_of_jsonl(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "c4.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=rf"c4\.jsonl: cannot be read as \.jsonl: {message}") as caught:
        load_text(str(file), "calibration")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["latin1.txt", "latin1.jsonl"])
def test_bytes_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "gr\xfcn"}')
    with pytest.raises(DataError, match=rf"{name}: cannot be read as .*utf-8"):
        load_text(str(tmp_path / name), "calibration")
