"""Files of text that people have: read as they are meant, or refused in one line that says what they are."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model

ROWS = [f"The number {number} is followed by {number + 1}, which is “larger”." for number in range(8)]
PROSE = "\n\n".join(ROWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", vocab_size=300)


def scored(model: Path, spec: object, tmp_path: Path) -> dict[str, float]:
    """What `mxrot eval` gives for one text."""
    result = mxrot("eval", model, "--text", str(spec), "--seq-len", 32, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    table = json.loads((tmp_path / "found.json").read_text())["perplexity"]
    assert len(table) == 1
    found: dict[str, float] = next(iter(table.values()))
    return found


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Of the same text in a plain file."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "plain.txt").write_text(PROSE, encoding="utf-8")
    return scored(model, folder / "plain.txt", folder)


def jsonl(rows: list[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def separated(rows: list[list[str]], separator: str) -> bytes:
    out = io.StringIO()
    csv.writer(out, delimiter=separator).writerows(rows)
    return out.getvalue().encode()


TEXTS: list[object] = [{"text": row} for row in ROWS]
MARK = b"\xef\xbb\xbf"


@pytest.mark.case("E1")
@pytest.mark.parametrize(
    ("name", "data"),
    {
        "marked.txt": MARK + PROSE.encode(),
        "two.txt": MARK + ROWS[0].encode() + b"\n\n" + MARK + "\n\n".join(ROWS[1:]).encode(),
        "marked.jsonl": MARK + jsonl(TEXTS),
        "inside.jsonl": jsonl([{"text": "\ufeff" + row} for row in ROWS]),
        "marked.json": MARK + json.dumps(TEXTS).encode(),
        "marked.csv": MARK + separated([["text"], *([row] for row in ROWS)], ","),
        "marked.txt.gz": gzip.compress(MARK + PROSE.encode()),
    }.items(),
)
def test_a_byte_order_mark_is_no_text(model, expected, tmp_path, name, data) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_bytes(data)
    assert scored(model, tmp_path / name, tmp_path) == expected


@pytest.mark.case("E2")
@pytest.mark.parametrize(
    ("name", "data"),
    {
        "array.json": json.dumps(TEXTS).encode(),
        "indented.json": json.dumps(TEXTS, indent=2).encode(),
        "strings.json": json.dumps(ROWS).encode(),
        "held.json": json.dumps({"version": 2, "data": TEXTS}).encode(),
        "lines.json": jsonl(TEXTS),
        "LINES.JSONL": jsonl(TEXTS),
        "lines.ndjson": jsonl(TEXTS),
        "strings.jsonl": jsonl(list(ROWS)),
        "comma.csv": separated([["id", "text"], *([str(i), row] for i, row in enumerate(ROWS))], ","),
        "other_name.csv": separated([["id", "body"], *([str(i), row] for i, row in enumerate(ROWS))], ","),
        "semicolon.csv": separated([["id", "text"], *([str(i), row] for i, row in enumerate(ROWS))], ";"),
        "tabs.TSV": separated([["text"], *([row] for row in ROWS)], "\t"),
    }.items(),
)
def test_rows_are_parsed(model, expected, tmp_path, name, data) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_bytes(data)
    assert scored(model, tmp_path / name, tmp_path) == expected


@pytest.mark.case("E2")
def test_a_column_may_be_named(model: Path, expected: dict[str, float], tmp_path: Path) -> None:
    rows = [["title", "body"], *(["some title", row] for row in ROWS)]
    path = tmp_path / "with a colon: a=b.csv"
    path.write_bytes(separated(rows, ","))
    message = refused("eval", model, "--text", path)
    assert "title, body" in message and f"{path}:title" in message
    for spec in (f"{path}:body", f"mine={path}:body"):
        assert scored(model, spec, tmp_path) == expected
    assert "no column 'boddy'" in refused("eval", model, "--text", f"{path}:boddy")


@pytest.mark.case("E2")
@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("notes.docx", b"PK\x03\x04 and more", "zip archive"),
        ("notes.org", b"* prose", r"unknown suffix .org; known are .txt "),
        ("paper.pdf", b"%PDF-1.7 ...", "is a PDF"),
        ("paper.txt", b"%PDF-1.7 ...", "is a PDF"),
        ("page.html", b"<!DOCTYPE html><html>", "is an HTML page"),
        ("failed.jsonl", b"\n<html><head>404</head>", "is an HTML page"),
        ("pointer.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        ("data.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "git-lfs pointer"),
        ("rows.json", b'{"a": 1}', "no column of text"),
        ("rows.json", b"17", "line 1 is not an object"),
        ("rows.json", b"[" * 100_000, "nested too deeply"),
        ("rows.csv", b"a,b\n1,2,3\n", "line 2 has 3 fields"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": "b"', "line 2 is not JSON"),
        ("picture.md", b"\x89PNG\r\n\x1a\n", "is a picture"),
        ("archive.tar", b"a" * 257 + b"ustar" + b"\0" * 300, "tar archive"),
    ],
)
def test_what_is_no_text_is_named(model, tmp_path, name, data, message) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_bytes(data)
    said = refused("eval", model, "--text", tmp_path / name)
    assert name in said and message in said


@pytest.mark.case("E2")
def test_a_lone_surrogate_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n\n{"text": "half \\ud83d of it"}\n')
    said = refused("eval", model, "--text", tmp_path / "rows.jsonl")
    assert "line 3" in said and "\\ud83d" in said


@pytest.mark.case("E2")
def test_folders_pipes_and_what_is_not_there(model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    assert "not a regular file" in refused("eval", model, "--text", tmp_path / "pipe.txt")
    (tmp_path / "empty").mkdir()
    assert "holds no file" in refused("eval", model, "--text", tmp_path / "empty")
    assert "is a model" in refused("eval", model, "--text", model)
    assert "no such text file" in refused("eval", model, "--text", tmp_path / "nothing.txt")
    assert "missing.pdf: no such text file" in refused("eval", model, "--text", "some/missing.pdf")
    assert "without a name" in refused("eval", model, "--text", "")
    assert "did you mean demo?" in refused("eval", model, "--text", "dmeo")
    assert "https://example.org/a.txt: is a web address" in refused(
        "eval", model, "--text", "https://example.org/a.txt"
    )
    assert "no such text file" in refused("eval", model, "--text", "x" * 5000)


@pytest.mark.case("E2")
def test_a_folder_is_its_files_in_order(model: Path, expected: dict[str, float], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "part").mkdir(parents=True)
    (folder / "a.txt").write_bytes(MARK + ROWS[0].encode())
    (folder / "b.jsonl").write_bytes(jsonl(TEXTS[1:4]))
    (folder / "part" / "c.csv.gz").write_bytes(gzip.compress(separated([["text"], *([row] for row in ROWS[4:])], ",")))
    (folder / ".hidden.txt").write_text("not this")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    assert scored(model, folder, tmp_path) == expected
    assert "picture.png" in mxrot("eval", model, "--text", folder, "--seq-len", 32).stdout


@pytest.mark.case("E4")
def test_parquet_of_any_text_column(model: Path, expected: dict[str, float], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"body": ROWS, "n": list(range(8)), "tags": [["a"]] * 8}), path)
    assert scored(model, path, tmp_path) == expected
    parquet.write_table(pyarrow.table({"title": ["t"] * 8, "body": ROWS}), path)
    said = refused("eval", model, "--text", path)
    assert "title, body" in said and "\n" not in said
    assert scored(model, f"{path}:body", tmp_path) == expected
    parquet.write_table(pyarrow.table({"n": [1, 2]}), path)
    assert "no column of text; its columns are n" in refused("eval", model, "--text", path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "cannot be read as .parquet" in refused("eval", model, "--text", path)


@pytest.mark.case("E4")
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv"])
def test_null_rows_are_left_out_and_named(model, expected, tmp_path, kind) -> None:  # type: ignore[no-untyped-def]
    rows: list[str | None] = [*ROWS[:2], None, *ROWS[2:], None]
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.table({"text": rows}), path)
    elif kind == "csv":
        path.write_bytes(separated([["id", "text"], *(["1", row or ""] for row in rows)], ","))
    else:
        objects: list[object] = [{"text": row} for row in rows]
        path.write_bytes(jsonl(objects) if kind == "jsonl" else json.dumps(objects).encode())
    assert scored(model, path, tmp_path) == expected
    first = 4 if kind == "csv" else 3  # its first line has the names
    shown = mxrot("eval", model, "--text", path, "--seq-len", 32).stdout
    assert f"2 rows of 10 are null and left out ({first}, {first + 7})" in shown


@pytest.mark.case("E5")
@pytest.mark.parametrize(
    ("name", "data"),
    {
        "text.txt.gz": gzip.compress(PROSE.encode()),
        "text.txt.bz2": bz2.compress(PROSE.encode()),
        "text.txt.xz": lzma.compress(PROSE.encode()),
        "rows.jsonl.gz": gzip.compress(jsonl(TEXTS)),
        "ROWS.JSON.GZ": gzip.compress(json.dumps(TEXTS).encode()),
        "hidden.txt": gzip.compress(PROSE.encode()),
        "utf16.txt": PROSE.encode("utf-16"),
        "utf16be.txt": b"\xfe\xff" + PROSE.encode("utf-16-be"),
        "utf32.txt": PROSE.encode("utf-32"),
        "utf16.csv": separated([["text"], *([row] for row in ROWS)], ",").decode().encode("utf-16"),
    }.items(),
)
def test_compressed_and_marked_files_are_read(model, expected, tmp_path, name, data) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / name).write_bytes(data)
    assert scored(model, tmp_path / name, tmp_path) == expected


@pytest.mark.case("E5")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("grün und blau, ".encode("latin-1") * 20, "not utf-8 (byte 0xfc in line 1); it looks like LATIN1"),
        ("“so” und so, ".encode("cp1252") * 20, "it looks like WINDOWS-1252; convert it with: iconv -f WINDOWS-1252"),
        ("plain words ".encode("utf-16-le") * 20, "it looks like UTF-16LE without a byte order mark"),
        ("日本語の文章".encode("shift_jis") * 20, "an older encoding of another script"),
        (bytes(range(256)) * 20, "looks like binary data"),
        (gzip.compress(os.urandom(2000))[:-9], "damaged gzip data"),
    ],
    ids=["latin1", "cp1252", "utf16", "shift_jis", "binary", "gzip"],
)
def test_other_bytes_are_named(model: Path, tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "odd.txt").write_bytes(data)
    assert message in refused("eval", model, "--text", tmp_path / "odd.txt")
