"""Calibration on what the model writes, and on nothing else: `--calib own`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import logits, recipe

import mxrot
from mxrot.calibration import generated_windows
from mxrot.errors import ConfigError, DataError
from mxrot.models import FolderSource
from mxrot.models.tokenizer import load_tokenizer
from mxrot.quantizing.loading import load_original
from mxrot.report.texts import text_lines
from mxrot.text import Windows, load_text
from mxrot.tokenizing import calibrate, fitting_windows
from mxrot.transforms import generator_for

SMALL: dict[str, Any] = {"samples": 4, "seq_len": 32, "device": "cpu", "seed": 3}
TEMPLATE = "{% for m in messages %}{{ '<' + m.role + ':' + m.content + '>' }}{% endfor %}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny", vocab_size=260)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return str(path)


def test_own_text_alone_is_the_windows_that_the_model_writes(source: Path, tmp_path: Path) -> None:
    """Quantized by its name, or given the same windows as tensors: the same model."""
    run = mxrot.quantize(source, "mr-gptq", tmp_path / "out", calib="own", **SMALL)
    assert run["windows"] == (4, 32) and run["data"]["generated"] == 4 and run["data"]["windows"] == 0
    original = load_original(FolderSource(source), torch.float32, torch.device("cpu"))
    written = generated_windows(original, 4, 32, generator_for(3, "windows for calibration"))
    given = mxrot.quantize(source, "mr-gptq", calib=written, **SMALL)
    assert torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), logits(given))


def test_a_mixture_has_its_share_of_each(source: Path, text: str) -> None:
    found = calibrate(source, recipe("mr-gptq"), [text, "own@3"], 8, 32)
    assert found.windows is not None and found.windows.shape == (2, 32)
    assert found.recipe.calibration.own == 6 and found.recipe.calibration.written(2) == 6
    assert found.description is not None and found.description["generated"] == 6
    assert [table["windows"] for table in found.description["texts"]] == [2, 6]
    assert text_lines(found.description["texts"])[1] == "text own: 6 windows of 32, written by the model"


def test_what_a_recipe_has_written_for_each_window_of_the_text_comes_besides(source: Path, text: str) -> None:
    both = calibrate(source, recipe("mxrot"), [text, "own"], 8, 32).recipe.calibration
    assert (both.samples, both.own, both.written(both.samples)) == (4, 4, 8)
    alone = calibrate(source, recipe("mxrot"), "own", 8, 32).recipe.calibration
    assert (alone.samples, alone.own, alone.written(0)) == (0, 8, 8)


@pytest.mark.parametrize("name", ["mxrot", "mxrot-tuned", "duquant-lwc"])
def test_recipes_take_it(source: Path, name: str) -> None:
    changes: dict[str, Any] = {"tuning__steps": 2, "tuning__held_out": 0.3} if name != "mxrot" else {}
    changes |= {"tuning__generated": 0.5} if name == "mxrot-tuned" else {}
    model = mxrot.quantize(source, recipe(name, **changes), calib="own", **SMALL)
    assert logits(model).isfinite().all()


def test_a_model_cannot_be_measured_on_it(source: Path) -> None:
    with pytest.raises(DataError, match=r"^own: is what a model writes while it is quantized, to calibrate on"):
        mxrot.evaluate(source, text="own")
    with pytest.raises(ConfigError, match=r"^own: the model writes text only while it is quantized"):
        fitting_windows(source, "own", 32)


def test_rotations_are_trained_on_a_text_that_is_there(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"spinquant trains rotations on text.*rotation\.steps = 0$"):
        mxrot.quantize(source, recipe("spinquant"), calib="own", **SMALL)


def test_no_windows_at_all(source: Path) -> None:
    with pytest.raises(ConfigError, match="samples must be positive"):
        recipe("mr-gptq", calibration__samples=0)
    assert recipe("mr-gptq", calibration__samples=0, calibration__own=1).calibration.written(0) == 1
    with pytest.raises(ConfigError, match="own must not be negative"):
        recipe("mr-gptq", calibration__own=-1)


def test_a_file_of_that_name_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text("Mine.")
    monkeypatch.chdir(tmp_path)
    assert load_text("./own", "calibration").content == "Mine."
    assert load_text("mine=own@2", "calibration").rendered == "written by the model"
    assert isinstance(load_text("own", "calibration").digest, str)


@pytest.mark.parametrize("has_template", [True, False])
def test_the_record_says_whether_there_are_conversations(tmp_path: Path, has_template: bool) -> None:
    folder = write_tiny_model(tmp_path / "tiny", vocab_size=260)
    if has_template:
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder)
    chosen = recipe("mr-gptq", calibration__chats=0.5)
    run = mxrot.quantize(folder, chosen, tmp_path / "out", calib="own", **SMALL)
    assert run["data"]["chat_template"] is has_template
    plain = mxrot.quantize(folder, "mr-gptq", calib="own", **SMALL)
    same = torch.equal(logits(mxrot.load(tmp_path / "out", device="cpu")), logits(plain))
    assert same is not has_template


def test_windows_yet_to_be_written_are_counted(source: Path) -> None:
    found = Windows(load_text("own", "calibration"), torch.empty(0, 32, dtype=torch.int64), 0, 5, 0, False, 5)
    assert found.to_write == 5 and found.as_table()["windows"] == 5
