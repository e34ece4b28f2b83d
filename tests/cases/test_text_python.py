"""Texts as Python has them, conversations, and several texts at once."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.ipc
import pytest
import torch
from tests.cases.commands import mxrot, refused
from tests.cases.odd_tokenizers import BOS, TEMPLATE, TEMPLATE_WITH_BOS, change_tokenizer
from tests.tiny_model import write_tiny_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import mxrot as package

ROWS = [f"The number {number} is followed by {number + 1}." for number in range(12)]
PROSE = "\n\n".join(ROWS)
CHATS = [
    [{"role": "user", "content": f"What follows {number}?"}, {"role": "assistant", "content": f"{number + 1} does."}]
    for number in range(12)
]
SMALL: dict[str, Any] = {"samples": 6, "seq_len": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("plain") / "tiny", vocab_size=300)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a chat template that writes the token that begins a text, which the tokenizer adds, too."""
    folder = write_tiny_model(tmp_path_factory.mktemp("chatty") / "tiny", vocab_size=300)
    return change_tokenizer(folder, TEMPLATE_WITH_BOS, bos=True)


def tokenizer_of(folder: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def score(folder: Path, text: Any, **options: Any) -> Any:
    """Perplexity and the counts, on the one text that is given."""
    found = package.evaluate(folder, text=text, seq_len=options.pop("seq_len", 32), device="cpu", **options)
    assert len(found) == 1
    return next(iter(found.values()))


def cut(ids: list[int], length: int = 32) -> torch.Tensor:
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


class Rows:
    """What `datasets.Dataset` is, as far as it matters."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Any:
        return iter(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [row[index] for row in self.rows] if isinstance(index, str) else self.rows[index]


@pytest.mark.case("E6")
def test_python_takes_what_python_has(plain: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    ids = tokenizer_of(plain)(PROSE)["input_ids"]
    (tmp_path / "prose.txt").write_text(PROSE)
    expected = score(plain, str(tmp_path / "prose.txt"))
    texts: dict[str, Any] = {
        "path": tmp_path / "prose.txt",
        "list of a path": [tmp_path / "prose.txt"],
        "the text itself": PROSE,
        "strings": list(ROWS),
        "a tuple of strings": tuple(ROWS),
        "rows": [{"text": row} for row in ROWS],
        "an iterator of rows": ({"text": row} for row in ROWS),
        "an iterator of strings": iter(ROWS),
        "token ids": ids,
        "lists of token ids": [ids[:50], ids[50:]],
        "tensors of token ids": [torch.tensor(ids[:50]), torch.tensor([ids[50:]])],
        "one tensor": torch.tensor(ids),
        "windows": cut(ids),
        "windows in numpy": cut(ids).numpy(),
        "windows in int32": cut(ids).to(torch.int32),
        "what a tokenizer returns": tokenizer_of(plain)(PROSE),
        "as tensors": tokenizer_of(plain)(PROSE, return_tensors="pt")["input_ids"][0],
        "a data set": Rows([{"text": row, "n": 1} for row in ROWS]),
        "a data set by split": {"mine": Rows([{"body": row} for row in ROWS])},
        "its column": Rows([{"text": row} for row in ROWS])["text"],
        "tokenized rows": [{"input_ids": ids, "attention_mask": [1] * len(ids)}],
        "padded rows": [{"input_ids": [*ids, 7, 7], "attention_mask": [1] * len(ids) + [0, 0]}],
        "batches of a loader": DataLoader(cut(ids), batch_size=2),  # type: ignore[arg-type]
        "inputs and targets": [(torch.tensor([ids]), torch.tensor([ids]))],
        "encodings": [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}],
        "a data frame": pandas.DataFrame({"text": [*ROWS, None], "n": 1}),
        "its series": pandas.DataFrame({"text": ROWS})["text"],
        "strings in numpy": numpy.array(ROWS),
        "an open file": io.StringIO(PROSE),
        "a table of arrow": pyarrow.table({"text": ROWS}),
        "a name": {"mine": str(tmp_path / "prose.txt")},
    }
    for kind, text in texts.items():
        assert score(plain, text) == expected, kind


@pytest.mark.case("E6")
def test_quantize_takes_the_same(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text(PROSE)
    ids = tokenizer_of(plain)(PROSE)["input_ids"]
    runs = [
        package.quantize(plain, "duquant++", tmp_path / f"out{number}", calib=calib, **SMALL)
        for number, calib in enumerate([str(tmp_path / "prose.txt"), ROWS, ids, Rows([{"text": row} for row in ROWS])])
    ]
    assert all(isinstance(run, dict) and run["fingerprint"] == runs[0]["fingerprint"] for run in runs)  # type: ignore[index]
    whole = package.quantize(plain, "duquant++", tmp_path / "windows", calib=cut(ids)[:3], device="cpu")
    assert isinstance(whole, dict) and whole["windows"] == (3, 32) and whole["data"]["seq_len"] == 32
    again = package.quantize(plain, "duquant++", calib=cut(ids)[:3].numpy(), device="cpu")
    assert torch.equal(*(model.get_input_embeddings().weight for model in (again, again)))  # type: ignore[union-attr]


@pytest.mark.case("E6")
def test_token_ids_need_no_tokenizer(plain: Path, tmp_path: Path) -> None:
    ids = tokenizer_of(plain)(PROSE)["input_ids"]
    folder = write_tiny_model(tmp_path / "tiny", vocab_size=300)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for text in (ids, cut(ids)):
        assert score(folder, text) == score(plain, text) == package.evaluate(model, text=text, seq_len=32)["given"]
        for source in (folder, model):
            assert package.quantize(source, "duquant++", calib=text, **SMALL) is not None
    with pytest.raises(TypeError, match="needs the tokenizer"):
        package.evaluate(model, text=ROWS)
    with pytest.raises(TypeError, match="needs the tokenizer"):
        package.quantize(model, "duquant++", calib=ROWS)


@pytest.mark.case("E6")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"bytes", "bytes are not text"),
        (17, "a int is not a text"),
        ({"one sentence", "another one"}, "a set has no order"),
        ("", "a text without a name"),
        ([1.5, 2.5], "row 1 is not an object"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), r"token ids of shape \(2, 3, 4\)"),
        (torch.zeros(2, 8), "token ids are whole numbers, got float32"),
        ([], "no text is given|the text is empty"),
        ([None, None], "every row is null"),
        ([{"a": "x y", "b": "x y"}], "2 columns of text"),
        (["x y", "half \ud800"], "row 2: holds"),
        (["demo", "a whole sentence"], "a list of names and of texts"),
        (["nothing.txt", "hello"], "no such text file"),
    ],
)
def test_what_is_no_text_is_one_line(plain: Path, text: Any, message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        score(plain, text)
    assert type(raised.value).__module__ == "mxrot.errors" and "\n" not in str(raised.value)


SHAREGPT = {"user": "human", "assistant": "gpt"}


@pytest.mark.case("E6")
@pytest.mark.parametrize("kind", ["messages", "sharegpt", "alpaca", "bare", "python", "array"])
def test_conversations_go_through_the_chat_template(chatty: Path, tmp_path: Path, kind: str) -> None:
    tokenizer = tokenizer_of(chatty)
    ids: list[int] = []
    for chat in CHATS:
        ids += tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == len(CHATS)
    rows: list[Any] = [{"messages": chat, "id": 3} for chat in CHATS]
    if kind == "sharegpt":
        rows = [{"conversations": [{"from": SHAREGPT[m["role"]], "value": m["content"]} for m in c]} for c in CHATS]
    elif kind == "alpaca":
        rows = [{"instruction": c[0]["content"], "input": "", "output": c[1]["content"]} for c in CHATS]
    elif kind == "bare":
        rows = list(CHATS)
    if kind == "python":
        assert score(chatty, rows) == score(chatty, cut(ids))
        return
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(rows) if kind == "array" else "".join(json.dumps(row) + "\n" for row in rows))
    assert score(chatty, str(path)) == score(chatty, cut(ids))
    assert "read as chat template" in mxrot("eval", chatty, "--text", path, "--seq-len", 32).stdout


@pytest.mark.case("E6")
def test_an_input_of_alpaca_and_a_system_prompt_are_read(chatty: Path, tmp_path: Path) -> None:
    row = {"system": "Be brief.", "instruction": "Translate.", "input": "grün", "output": "green " * 20}
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Translate.\n\ngrün"},
        {"role": "assistant", "content": "green " * 20},
    ]
    assert score(chatty, [row]) == score(chatty, [{"messages": chat}])


@pytest.mark.case("E6")
def test_conversations_that_cannot_be_read_are_named(plain: Path, chatty: Path, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    said = refused("quantize", plain, "-o", tmp_path / "out", "-r", "duquant++", "--calib", path)
    assert "chats.jsonl: line 1" in said and "no chat template" in said
    for rows, message in (
        ([{"messages": [{"role": "user"}]}], "message 1: content is null"),
        ([{"messages": [{"content": "x", "role": None}]}], "message 1: has no role"),
        ([{"messages": "text"}, {"messages": 5}], "line 2, column 'messages': holds int"),
        ([{"conversations": [{"from": "aunt", "value": "x"}]}], "from 'aunt' is not one of human"),
        ([{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}], "only text can be read"),
        ([{"instruction": "x", "output": None}], "'output' holds null"),
    ):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert message in refused("eval", chatty, "--text", path)


@pytest.mark.case("E6")
def test_a_template_that_refuses_is_one_line(plain: Path, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "strict", vocab_size=300)
    change_tokenizer(folder, "{% if messages[0].role == 'user' %}{{ raise_exception('no users') }}{% endif %}x")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": CHATS[0]}))
    assert "row 1, column 'messages': the model's chat template does not take this conversation: no users" in refused(
        "eval", folder, "--text", path
    )


@pytest.mark.case("E6")
def test_each_document_begins_once(chatty: Path, tmp_path: Path) -> None:
    """Where the tokenizer adds a token: to a file once, however many rows it has; to each of several documents."""
    tokenizer = tokenizer_of(chatty)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert score(chatty, str(tmp_path / "rows.jsonl")) == score(chatty, cut(tokenizer(PROSE)["input_ids"]))
    apart = [token for row in ROWS for token in tokenizer(row)["input_ids"]]
    assert apart.count(tokenizer.convert_tokens_to_ids(BOS)) == len(ROWS)
    assert score(chatty, ROWS) == score(chatty, cut(apart))
    (tmp_path / "folder").mkdir()
    for number, row in enumerate(ROWS):
        (tmp_path / "folder" / f"{number:02}.txt").write_text(row)
    assert score(chatty, tmp_path / "folder") == score(chatty, cut(apart))


@pytest.mark.case("E6")
def test_a_template_without_a_beginning_gets_none(tmp_path: Path) -> None:
    folder = change_tokenizer(write_tiny_model(tmp_path / "tiny", vocab_size=300), TEMPLATE, bos=True)
    tokenizer = tokenizer_of(folder)
    ids: list[int] = []
    for chat in CHATS:
        ids += tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    assert tokenizer.bos_token_id not in ids
    assert score(folder, [{"messages": chat} for chat in CHATS]) == score(folder, cut(ids))


@pytest.mark.case("E6")
def test_several_texts_share_the_windows_by_weight(plain: Path, tmp_path: Path) -> None:
    for name, letter in (("a", "a"), ("b", "b")):
        (tmp_path / f"{name}.txt").write_text(f"{letter} word " * 200)
    texts = ("--calib", f"{tmp_path / 'a.txt'}@3", "--calib", f"second={tmp_path / 'b.txt'}")
    command = ("quantize", plain, "-r", "duquant++", *texts, "--samples", 8, "--seq-len", 32, "--device", "cpu")
    result = mxrot(*command, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    named = [(text["name"], text["weight"], text["windows"]) for text in run["data"]["texts"]]
    assert named == [("a", 3.0, 6), ("second", 1.0, 2)]
    assert run["data"]["windows"] == 8 and run["data"]["text"] == "a + second"
    again = package.quantize(
        plain, "duquant++", tmp_path / "again", calib=[f"{tmp_path / 'a.txt'}@3", f"second={tmp_path / 'b.txt'}"],
        samples=8, seq_len=32, device="cpu",
    )  # fmt: skip
    assert isinstance(again, dict) and again["fingerprint"] == run["fingerprint"]
    heavy = ("--calib", f"{tmp_path / 'a.txt'}@99", *texts[2:], "--samples", 2)
    assert "its share is none of 2 windows" in refused(*command[:4], *heavy, "-o", tmp_path / "none")
    assert "a weight (@3) is for calibration" in refused("eval", plain, "--text", f"{tmp_path / 'a.txt'}@3")
    assert "two texts have the name 'a'" in refused(*command[:4], *texts[:2] * 2)


def save_to_disk(folder: Path, rows: list[dict[str, Any]], files: int = 2) -> Path:
    """What `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{files:05}.arrow" for number in range(files)]
    for number, name in enumerate(names):
        table = pyarrow.Table.from_pylist(rows[number * len(rows) // files : (number + 1) * len(rows) // files])
        with pyarrow.ipc.new_stream(str(folder / name), table.schema) as out:
            out.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.case("E6")
def test_data_sets_on_disk(plain: Path, tmp_path: Path) -> None:
    expected = score(plain, ROWS)
    saved = save_to_disk(tmp_path / "saved", [{"text": row} for row in ROWS])
    assert score(plain, str(saved)) == expected
    save_to_disk(tmp_path / "both" / "test", [{"text": row} for row in ROWS])
    save_to_disk(tmp_path / "both" / "train", [{"text": "something else " * 20}])
    (tmp_path / "both" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    assert score(plain, str(tmp_path / "both")) == expected
    (saved / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: is missing" in refused("eval", plain, "--text", saved)


@pytest.mark.case("E6")
def test_data_sets_of_the_hub(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**options: Any) -> Any:
        asked.append(options)
        if options["path"] == "owner/nothing":
            raise FileNotFoundError("Dataset 'owner/nothing' doesn't exist on the Hub")
        rows = Rows([{"text": row} for row in ROWS])
        return rows if "split" in options else {"train": Rows([{"text": "x " * 99}]), "validation": rows}

    fake = types.ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    expected = score(plain, ROWS)
    for spec in ("owner/name", "owner/name:config", "owner/name:config:validation[:9]", "mine=owner/name::test"):
        assert score(plain, spec) == expected
    assert asked == [
        {"path": "owner/name"},
        {"path": "owner/name", "name": "config"},
        {"path": "owner/name", "name": "config", "split": "validation[:9]"},
        {"path": "owner/name", "split": "test"},
    ]
    assert "owner/nothing: no such text file, and the hub did not give it" in refused(
        "eval", plain, "--text", "owner/nothing"
    )
