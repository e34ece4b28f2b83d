"""Tokens that a model does not have, prompts without any, and texts that do not come out even."""

from __future__ import annotations

import json
import re
from hashlib import sha256
from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.cases.odd_tokenizers import change_tokenizer
from tests.tiny_model import write_tiny_model

import mxrot as package

if __import__("sys").version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WORDS = "the quick brown fox jumps over the lazy dog; " * 30


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedding of fewer rows than the tokenizer has tokens: the space is the first that is beyond it."""
    return write_tiny_model(tmp_path_factory.mktemp("small") / "tiny", vocab_size=128)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny", vocab_size=300)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS)
    return path


@pytest.mark.case("E3")
@pytest.mark.parametrize("command", ["quantize", "eval", "against", "compare", "inspect", "generate", "report"])
def test_a_token_beyond_the_embedding_is_one_line(small: Path, words: Path, tmp_path: Path, command: str) -> None:
    options = ("--seq-len", 32)
    if command == "report":
        pytest.importorskip("matplotlib")
        assert mxrot("quantize", small, "-r", "rtn", "-o", tmp_path / "out").exit_code == 0
    commands = {
        "quantize": ("quantize", small, "-r", "duquant++", "-o", tmp_path / "out", "--calib", words, *options),
        "eval": ("eval", small, "--text", words, *options),
        "against": ("eval", small, "--against", small, "--text", words, *options),
        "compare": ("compare", small, "--recipes", "duquant++", "--calib", words, "--text", words, *options),
        "inspect": ("inspect", small, "--text", words, *options),
        "generate": ("generate", small, "the quick"),
        "report": ("report", tmp_path / "out", "--text", words, "-o", tmp_path / "page.html", *options),
    }
    said = refused(*commands[command])
    where = "the prompt" if command == "generate" else "words"
    assert said.startswith(f"{where}: token 'Ġ' has id ") and "the model's embedding has 128 rows" in said
    assert int(re.findall(r"has id (\d+)", said)[0]) >= 128
    if command == "quantize":
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.case("E3")
def test_a_token_of_a_task_that_is_beyond_the_embedding_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tests.unit.evaluation.task_folder import write_task_folder

    folder = change_tokenizer(write_tiny_model(tmp_path / "tiny", vocab_size=128, eos_token_id=1), bos=True)
    data = write_task_folder(tmp_path / "tasks")
    said = refused("eval", folder, "--tasks", "piqa", "--task-data", data)
    assert said.startswith("piqa: token ") and "the model's embedding has 128 rows" in said


@pytest.mark.case("E3")
@pytest.mark.parametrize("ids", [[1, 2, 300] * 30, [1, -100, 2] * 30, [5, 10**12] * 40])
def test_ids_that_were_given_are_checked(model: Path, ids: list[int]) -> None:
    wrong = next(token for token in ids if not 0 <= token < 300)
    for call in (
        lambda: package.evaluate(model, text=ids, seq_len=16),
        lambda: package.quantize(model, "duquant++", calib=ids, seq_len=16, samples=2),
    ):
        with pytest.raises(Exception, match=f"has id {wrong}, and the model's embedding has 300 rows") as raised:
            call()
        assert type(raised.value).__module__ == "mxrot.errors"


@pytest.mark.case("E8")
def test_an_empty_prompt_is_one_line(model: Path) -> None:
    assert "the prompt is empty" in refused("generate", model, "")
    assert mxrot("generate", model, " ", "--max-tokens", 2, "--device", "cpu").exit_code == 0


@pytest.mark.case("E8")
def test_an_empty_prompt_is_the_token_that_begins_a_text(tmp_path: Path) -> None:
    folder = change_tokenizer(write_tiny_model(tmp_path / "tiny", vocab_size=300), bos=True)
    result = mxrot("generate", folder, "", "--max-tokens", 2, "--device", "cpu")
    assert result.exit_code == 0, result.output


@pytest.mark.case("E8")
def test_prompts_and_answers_have_the_positions_of_the_model(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny", vocab_size=300, max_position_embeddings=16)
    assert "the prompt has 20 tokens, and the model 16 positions" in refused("generate", folder, "x" * 20)
    result = mxrot("generate", folder, "x" * 10, "--max-tokens", 50, "--device", "cpu")
    assert result.exit_code == 0
    assert "6 new tokens instead of 50: the model has 16 positions, and the prompt takes 10" in result.stderr
    assert "\\udcff" in refused("generate", folder, "\udcff").lower()


@pytest.mark.case("D3")
def test_the_recorded_calibration_is_the_one_that_happened(model: Path, words: Path, tmp_path: Path) -> None:
    command = ("quantize", model, "-r", "duquant++-gptq", "--calib", words, "--seq-len", 64, "--device", "cpu")
    for samples, happened in ((4, 4), (500, len(WORDS) // 64)):
        out = tmp_path / f"out{samples}"
        assert mxrot(*command, "--samples", samples, "-o", out).exit_code == 0
        run = json.loads((out / "run.json").read_text())
        for recorded in ((out / "recipe.toml").read_text(), run["recipe"]):
            calibration = tomllib.loads(recorded)["calibration"]
            assert (calibration["samples"], calibration["seq_len"]) == (happened, 64)
        card = (out / "README.md").read_text()
        assert f"samples = {happened}\n" in card and "seq_len = 64\n" in card
        digest = sha256(words.read_bytes()).hexdigest()
        assert f"calibrated on {happened} windows of 64 tokens of `words` (SHA-256 `{digest}`)" in card
        data = run["data"]
        assert (data["windows_asked"], data["windows"], data["seq_len"]) == (samples, happened, 64)
        assert run["windows"] == [happened, 64] and data["generated"] == 0
        assert mxrot(*command, "--samples", samples, "-o", out, "--resume").exit_code == 0


@pytest.mark.case("D3")
def test_a_recipe_that_needs_no_text_is_said_to_have_seen_none(model: Path, tmp_path: Path) -> None:
    options = ("--samples", 4, "--seq-len", 64, "--device", "cpu")
    assert mxrot("quantize", model, "-r", "hadamard", *options, "-o", tmp_path / "out").exit_code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made without any text" in card and "calibrated on" not in card
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"] is None


@pytest.mark.case("D3")
def test_windows_that_the_model_writes_are_counted(model: Path, words: Path, tmp_path: Path) -> None:
    changes = ("--set", "calibration.generated=0.5", "--samples", 4, "--seq-len", 16)
    options = ("-r", "duquant++", "--calib", words, *changes, "--device", "cpu")
    assert mxrot("quantize", model, *options, "-o", tmp_path / "out").exit_code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["windows"] == [6, 16]
    assert (run["data"]["windows"], run["data"]["generated"]) == (4, 2)
    assert " and 2 that the original wrote; on others" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.case("G16")
def test_what_fills_no_window_is_said(model: Path, words: Path, tmp_path: Path) -> None:
    tokens = len(WORDS)
    left = tokens % 64
    found = tmp_path / "found.json"
    result = mxrot("eval", model, "--text", words, "--seq-len", 64, "--json", found)
    expected = f"text words: {tokens:,} tokens, {tokens // 64} windows of 64"
    assert f"{expected}; {left} tokens at its end, too few for a window, left out" in result.stdout
    table = json.loads(found.read_text())["texts"]["words"]
    assert (table["tokens"], table["windows"], table["tokens_left_out"]) == (tokens, tokens // 64, left)
    options = ("-r", "duquant++", "--calib", words, "--seq-len", 64, "--samples", 500, "-o", tmp_path / "out")
    result = mxrot("quantize", model, *options, "--device", "cpu")
    assert expected in result.stdout and f"{left} tokens at its end" in result.stdout
    assert "asked for 500, it has no more" in result.stdout
    recorded = json.loads((tmp_path / "out" / "run.json").read_text())["data"]["texts"][0]
    assert (recorded["tokens_left_out"], recorded["windows_asked"], recorded["windows"]) == (left, 500, tokens // 64)


@pytest.mark.case("G16")
def test_an_end_token_that_is_left_out_is_said(words: Path, tmp_path: Path) -> None:
    folder = change_tokenizer(write_tiny_model(tmp_path / "tiny", vocab_size=300), bos=True, eos=True)
    result = mxrot("eval", folder, "--text", words, "--seq-len", 64)
    left = (len(WORDS) + 2) % 64
    assert (
        f"{left} tokens at its end, too few for a window, left out, the end-of-text token among them" in result.stdout
    )
