"""One output, two runs; and folders of other people beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cases.commands import mxrot, refused
from tests.cases.folders import contents
from tests.tiny_model import write_tiny_model

import mxrot as package
from mxrot.errors import CheckpointError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=1)


def during(model: Path, output: Path, act: Callable[[], Any], at: str = "model.layers.1") -> Any:
    """Quantize `model` into `output`, and `act` once while that is at work."""
    acted: list[Any] = []

    def told(done: float, total: int, what: str) -> None:
        if what == at and not acted:
            acted.append(True)
            act()

    package.quantize(model, "rtn", output, progress=told)
    assert acted


def spellings(output: Path, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "link").symlink_to(output, target_is_directory=True)
    (tmp_path / "above").symlink_to(output.parent, target_is_directory=True)
    (tmp_path / "deeper").mkdir()
    return {
        "itself": output,
        "relative": Path(os.path.relpath(output)),
        "dots": tmp_path / "deeper" / ".." / output.name,
        "link": tmp_path / "link",
        "link above": tmp_path / "above" / output.name,
    }


@pytest.mark.case("A1")
@pytest.mark.parametrize("option", [None, "--resume", "--force"])
def test_a_second_run_into_one_output_is_refused(model: Path, other: Path, tmp_path: Path, option: str | None) -> None:
    output = tmp_path / "out"
    options = [option] if option else []

    def second() -> None:
        for name, path in spellings(output, tmp_path).items():
            line = refused("quantize", other, "-r", "rtn", "-o", path, *options)
            assert "is writing there; wait for it, or give another folder" in line, name
            assert str(os.getpid()) in line, name

    during(model, output, second)
    run = package.quantize(model, "rtn", tmp_path / "straight")
    assert isinstance(run, dict)
    assert contents(output) == contents(tmp_path / "straight")
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(("lock", "partial"))]


@pytest.mark.case("A1")
def test_export_into_it_is_refused_too(model: Path, other: Path, tmp_path: Path) -> None:
    package.quantize(other, "rtn", tmp_path / "finished")
    output = tmp_path / "out"
    line: list[str] = []
    words = ("export", tmp_path / "finished", "--to", "vllm", "-o", output, "--force")
    during(model, output, lambda: line.append(refused(*words)))
    assert "is writing there" in line[0]
    assert mxrot(*words).exit_code == 0


@pytest.mark.case("A1")
def test_a_shard_that_something_else_wrote_is_found(model: Path, tmp_path: Path) -> None:
    """Whatever wrote there, and however: what is put in place is what this run has written."""
    output = tmp_path / "out"

    def damage() -> None:
        shard = output.with_name("out.partial") / "model-00002-of-00003.safetensors"
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)

    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: is not what this run has written"):
        during(model, output, damage)
    assert not output.exists()


@pytest.mark.case("A2")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("command", ["quantize", "export"])
@pytest.mark.parametrize("kind", ["folder", "checkpoint", "file", "link", "dangling"])
def test_a_partial_of_somebody_else_is_never_touched(
    model: Path, tmp_path: Path, kind: str, command: str, force: bool
) -> None:
    mine, output = tmp_path / "out.partial", tmp_path / "out"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").write_text("years of work")
    if kind == "folder":
        mine.mkdir()
        (mine / "thesis.tex").write_text("years of work")
    elif kind == "checkpoint":
        package.quantize(model, "rtn", mine)
    elif kind == "file":
        mine.write_text("years of work")
    else:
        mine.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nothing"))
    words: list[str | Path] = ["quantize", model, "-r", "rtn"]
    if command == "export":
        package.quantize(model, "rtn", tmp_path / "finished")
        words = ["export", tmp_path / "finished"]
    before = contents(tmp_path)
    line = refused(*words, "-o", output, *(["--force"] if force else []))
    assert "out.partial: is needed" in line and "move it away" in line
    assert contents(tmp_path) == before


@pytest.mark.case("A2")
@pytest.mark.parametrize("command", ["quantize", "export"])
def test_a_backup_of_somebody_else_is_never_touched(model: Path, tmp_path: Path, command: str) -> None:
    output = tmp_path / "out"
    package.quantize(model, "hadamard", output)
    words: list[str | Path] = ["quantize", model, "-r", "rtn"]
    if command == "export":
        package.quantize(model, "rtn", tmp_path / "finished")
        words = ["export", tmp_path / "finished"]
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.tex").write_text("years of work")
    before = contents(output)
    result = mxrot(*words, "-o", output, "--force")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out.replaced") == {"thesis.tex": b"years of work"}
    assert contents(output) != before and not (tmp_path / "out.replaced-1").exists()
