"""docs/text.md: every text that it names is read, its commands and its Python run."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path

import pyarrow
import pytest
from pyarrow import ipc, parquet
from tests.cases.odd_tokenizers import TEMPLATE, change_tokenizer
from tests.tiny_model import write_tiny_model
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.text import Chat, load_text
from mxrot.text.files import SUFFIXES

PAGE = (Path(__file__).parent.parent / "docs" / "text.md").read_text(encoding="utf-8")
ROWS = [f"The number {number} is followed by {number + 1}, and that by {number + 2}." for number in range(40)]
EXAMPLE = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)
OF_THE_HUB = ("wikitext2", "Salesforce/", "allenai/")
SHAPES = re.compile(r"^\| `?(messages|ShareGPT|Alpaca)`? \| `(.*)` \|$", re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the examples are."""
    monkeypatch.chdir(tmp_path)
    change_tokenizer(write_tiny_model(tmp_path / "MODEL", vocab_size=300, max_position_embeddings=4096), TEMPLATE)
    table = pyarrow.table({"text": ROWS})
    lines = "".join(json.dumps({"text": row}) + "\n" for row in ROWS)
    files = {
        "wiki.txt": "\n\n".join(ROWS),
        "rows.jsonl": lines,
        "rows.json": json.dumps([{"text": row} for row in ROWS]),
        "rows.csv": "id;text\n" + "".join(f"1;{row}\n" for row in ROWS),
        "rows.tsv": "text\n" + "\n".join(ROWS),
        "chats.jsonl": "".join(json.dumps({"messages": [{"role": "user", "content": row}]}) + "\n" for row in ROWS),
        "tokens.jsonl": json.dumps({"input_ids": [5] * 99}),
        "books.csv": "title,body\n" + "".join(f'a title,"{row}"\n' for row in ROWS),
        "texts/a.md": ROWS[0],
        "texts/b/c.jsonl": lines,
        "saved/state.json": json.dumps({"_data_files": [{"filename": "data.arrow"}]}),
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    (tmp_path / "wiki.txt.gz").write_bytes(gzip.compress(files["wiki.txt"].encode()))
    parquet.write_table(table, tmp_path / "rows.parquet")
    with ipc.new_stream(str(tmp_path / "saved" / "data.arrow"), table.schema) as out:
        out.write_table(table)
    with ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as out:
        out.write_table(table)
    return tmp_path


def test_every_example_is_read(folder: Path) -> None:
    examples = [name for name in EXAMPLE.findall(PAGE) if not name.startswith(OF_THE_HUB) and name != "messages"]
    assert len(examples) == 16
    for example in examples:
        load_text(example, "calibration")
    same = [load_text(name, "calibration").content for name in examples if name.startswith(("rows.", "wiki", "books"))]
    assert len(same) == 10 and set(same) == {"\n\n".join(ROWS)}


def test_every_suffix_is_named() -> None:
    assert [suffix for suffix in SUFFIXES if not re.search(rf"\{suffix}\b", PAGE)] == []


def test_shapes_of_conversations(folder: Path) -> None:
    rows = dict(SHAPES.findall(PAGE))
    assert len(rows) == 3
    for shape, row in rows.items():
        (folder / "row.jsonl").write_text(row)
        documents = load_text("row.jsonl", "calibration").documents
        assert len(documents) == 1 and isinstance(documents[0], Chat), shape
        assert [message["role"] for message in documents[0].messages] == ["user", "assistant"]


def test_commands_run(folder: Path) -> None:
    commands = re.findall(r"^ {4}(mxrot [^\n]*)$", PAGE, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        words = shlex.split(command)[1:]
        words += [] if "--seq-len" in words else ["--seq-len", "32"]
        words += ["-r", "duquant++", "--device", "cpu"] if words[0] == "quantize" else []
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{command}\n{result.output}"
    taken = {text["name"]: text["windows"] for text in json.loads(Path("mixed/run.json").read_text())["data"]["texts"]}
    assert taken == {"wiki": 6, "chats": 2}


def test_python_runs(folder: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    exec(compile(code, "docs/text.md", "exec"), {})
