"""What a tokenizer consists of is in the output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cases.commands import mxrot
from tests.cases.folders import contents
from tests.tiny_model import write_tiny_model
from transformers import AutoTokenizer

PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
CHAT = [{"role": "user", "content": "hello"}]
PIECES = {
    "tekken.json": "{}",
    "tokenizer.model.v3": "pieces",
    "spiece.model": "pieces",
    "sentencepiece.bpe.model": "pieces",
    "source.spm": "pieces",
    "qwen.tiktoken": "YQ== 0",
    "bpe.codes": "a b",
    "vocab.txt": "a",
    "merges.txt": "a b",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "LICENSE": "one",
    "license.md": "two",
    "Notice.txt": "three",
    "COPYING": "four",
}
LEFT = {
    "tokenization_own.py": "raise SystemExit",
    "tokenizer.py": "raise SystemExit",
    "vocab.pkl": "no",
    "README.md": "its own",
    "notes.txt": "no",
}


def words_of(model: Path, output: Path) -> tuple[str | Path, ...]:
    return ("quantize", model, "-r", "rtn", "-o", output)


@pytest.mark.case("E7")
def test_ids_and_templates_are_the_same(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<tool>", "hello world"])
    tokenizer.chat_template = {"default": PLAIN, "tools": "tools: " + PLAIN}
    tokenizer.save_pretrained(source)
    table = json.loads((source / "tokenizer.json").read_text())
    added = [entry for entry in table["added_tokens"] if entry["content"] == "<tool>"]
    assert added and (source / "additional_chat_templates" / "tools.jinja").is_file()
    result = mxrot(*words_of(source, tmp_path / "out"))
    assert result.exit_code == 0, result.output
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    said = "hello world <tool> ä"
    assert again(said)["input_ids"] == tokenizer(said)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    for name in ("default", "tools"):
        wanted = tokenizer.apply_chat_template(CHAT, tokenize=False, chat_template=name)
        assert again.apply_chat_template(CHAT, tokenize=False, chat_template=name) == wanted
    listed = json.loads((tmp_path / "out" / "run.json").read_text())["files"]
    assert "additional_chat_templates/tools.jinja" in listed


@pytest.mark.case("E7")
def test_a_tokenizer_without_its_fast_file(tmp_path: Path) -> None:
    """Words and merges apart, and added tokens in a file of their own."""
    source = write_tiny_model(tmp_path / "tiny")
    table = json.loads((source / "tokenizer.json").read_text())
    (source / "vocab.json").write_text(json.dumps(table["model"]["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n")
    (source / "added_tokens.json").write_text(json.dumps({"<tool>": 256}))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    (source / "tokenizer.json").unlink()
    tokenizer = AutoTokenizer.from_pretrained(source)
    assert mxrot(*words_of(source, tmp_path / "out")).exit_code == 0
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "added_tokens.json").is_file()
    assert again("a <tool> b")["input_ids"] == tokenizer("a <tool> b")["input_ids"]


@pytest.mark.case("E7")
def test_the_pieces_of_every_tokenizer_are_copied_and_nothing_that_runs(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    plain = mxrot(*words_of(source, tmp_path / "plain"))
    assert plain.exit_code == 0, plain.output
    for name, text in (PIECES | LEFT).items():
        (source / name).write_text(text)
    assert mxrot(*words_of(source, tmp_path / "out")).exit_code == 0
    found = contents(tmp_path / "out")
    assert found.keys() - contents(tmp_path / "plain").keys() == PIECES.keys()
    assert {name: found[name].decode() for name in PIECES} == PIECES
    told = json.loads((tmp_path / "out" / "run.json").read_text())["not_copied"]
    assert told == sorted(LEFT.keys() - {"README.md"})


@pytest.mark.case("E7")
def test_export_takes_them_along(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text(PLAIN)
    (source / "chat_template.jinja").write_text(PLAIN)
    assert mxrot(*words_of(source, tmp_path / "out")).exit_code == 0
    result = mxrot("export", tmp_path / "out", "-o", tmp_path / "exported")
    assert result.exit_code == 0, result.output
    shutil.rmtree(source)
    found = contents(tmp_path / "exported")
    assert found["additional_chat_templates/tools.jinja"].decode() == PLAIN
    assert found.keys() == contents(tmp_path / "out").keys()
