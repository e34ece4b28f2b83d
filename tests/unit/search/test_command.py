"""`mxrot search` from the shell: its files, what it prints, and what it says of wrong options."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.recipe import load_recipe
from mxrot.report import drawing


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("source") / "tiny")
    (folder / "words.txt").write_text("".join(f"the number {number} follows {number - 1}; " for number in range(140)))
    return folder


def call(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["search", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_files_and_what_is_printed(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recipe, table, plot = tmp_path / "mine.toml", tmp_path / "mine.json", tmp_path / "mine.png"
    text = ("--text", model / "words.txt", "--windows", "2", "--seq-len", "24", "--work", tmp_path / "work")
    files = ("-o", recipe, "--json", table, "--plot", plot)
    code, shown, _ = call(model, "-r", "hadamard", "--bits", "5", "--choices", "mxfp4,mxfp8_e4m3", *text, *files)
    assert code == 0
    found = json.loads(table.read_text())
    rows = {row["label"]: row for row in found["rows"]}
    assert list(rows) == ["nothing raised", "mixture, as searched", "mixture, as quantized", "all in mxfp8_e4m3"]
    assert rows["mixture, as searched"]["bits_per_weight"] <= 5.0
    assert {"measurements", "raised", "recipe_toml", "texts", "versions", "kernels", "device", "seed"} <= found.keys()
    for one in found["measurements"]:
        assert one["kl"] == pytest.approx(sum(one["by_window"]) / 2) and len(one["by_window"]) == 2
    stages = {one["stage"] for one in found["measurements"]}
    assert {"nothing raised", "a kind", "a block", "everything", "candidate"} <= stages
    written = load_recipe(recipe)
    assert (
        written.to_toml() == found["recipe_toml"] and written.override and written.name.startswith("hadamard-mixture-")
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "W4A4" not in shown + recipe.read_text()
    assert re.search(r"mixture, as quantized +4\.\d{3} ", shown) and "raised: " in shown
    assert f"next: mxrot quantize {model} --recipe {recipe} -o {tmp_path / 'mine'}" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bits", "4"), "--bits 4: recipe mxrot takes 4.250 with nothing raised"),
        (("--bits", "-1"), "--bits -1: expected bits, such as 4.5"),
        (("--inputs-only", "--input-bits", "5"), "--input-bits: with --inputs-only, --bits is the limit of inputs"),
        (("--choices", "mxfp3"), "--choices mxfp3: unknown format 'mxfp3'"),
        (("-o", "mine.json"), "--output mine.json: the recipe is a TOML file"),
        (("-r", "mxrot-tuned"), "recipe mxrot-tuned: search raises what is rounded once"),
        (("--plot", "mine.gif"), "--plot mine.gif: expected a name that ends in .png or .svg"),
    ],
)
def test_one_line_for_what_is_wrong(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path))
    code, _, errors = call(model, "--text", model / "words.txt", "--calib", model / "words.txt", *arguments)
    assert code == 2 and len(errors.splitlines()) == 1 and said in errors
    assert not (tmp_path / "mixture.toml").exists()


def test_without_matplotlib_plot_is_refused_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing.importlib.util, "find_spec", lambda name: None)
    code, _, errors = call(model, "--plot", tmp_path / "mine.png")
    assert code == 2 and "--plot needs the package matplotlib: pip install 'mxrot[report]'" in errors
    assert importlib.util.find_spec("matplotlib") is None
