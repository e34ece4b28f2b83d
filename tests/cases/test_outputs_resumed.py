"""Runs that ended early, at any moment, and runs that are asked for again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.cases.commands import mxrot, refused
from tests.cases.folders import contents
from tests.tiny_model import write_tiny_model

import mxrot as package
from mxrot.errors import CheckpointError
from mxrot.quantizing import written as writing
from mxrot.recipe import Recipe, load_recipe

TEXT = "The quick brown fox jumps over the lazy dog. " * 60
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def flip(path: Path, place: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def ended(model: Path, output: Path, recipe: str | Recipe, error: BaseException, at: str, **options: Any) -> None:
    """A run that ends with `error` when it comes to `at`."""

    def told(done: float, total: int, what: str) -> None:
        if what == at:
            raise error

    with pytest.raises(type(error)):
        package.quantize(model, recipe, output, progress=told, **options)


def quantized(model: Path, output: Path, recipe: str | Recipe = "rtn", **options: Any) -> dict[str, Any]:
    run = package.quantize(model, recipe, output, **options)
    assert isinstance(run, dict)
    return run


def moments(monkeypatch: pytest.MonkeyPatch, folder: Path, act: Callable[[], Any]) -> list[Path]:
    """What a process that is killed while it does `act` leaves in `folder`: copies from before everything that
    it removes or renames, and from the end."""
    copies: list[Path] = []

    def copy() -> None:
        copies.append(folder.with_name(f"{folder.name}-killed-{len(copies)}"))
        shutil.copytree(folder, copies[-1])

    def copying(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*words: Any, **options: Any) -> Any:
            copy()
            return call(*words, **options)

        return called

    with monkeypatch.context() as patched:
        for name in ("rename", "replace", "unlink", "rmdir"):
            patched.setattr(os, name, copying(getattr(os, name)))
        act()
    copy()
    return copies


@pytest.mark.case("A5", "G11")
@pytest.mark.parametrize("is_filled", [False, True], ids=["renamed", "filled"])
@pytest.mark.parametrize("force", [False, True])
def test_killed_at_the_end_it_is_complete_or_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool, is_filled: bool
) -> None:
    """Finished blocks are never done again: their times stay what they were. With --force there is an output always,
    where it can be renamed."""
    place = tmp_path / "place"
    place.mkdir()
    if force:
        quantized(model, place / "out", "hadamard")
    with monkeypatch.context() as moved:
        if is_filled:
            (place / "out").mkdir(exist_ok=True)
            moved.chdir(place / "out")
        ended(model, place / "out", "rtn", KeyboardInterrupt(), "done", force=force)
        blocks = {name: data for name, data in contents(place).items() if "block-" in name}
        assert len(blocks) == 2
        again = partial(quantized, model, place / "out", "rtn", resume=True, force=force)
        copies = moments(moved, place, again)
    expected = contents(place / "out")
    seconds = [json.loads(data)["report"]["seconds"] for data in blocks.values()]
    assert len(copies) > 12
    for copy in copies:
        assert is_filled or not force or (copy / "out" / "config.json").is_file()
        run = quantized(model, copy / "out", "rtn", resume=True, force=force)
        assert [block["seconds"] for block in run["blocks"]] == seconds
        assert contents(copy / "out") == expected
        # A copy has another number in the file system: what the rename had replaced is nobody's that is known there.
        assert {path.name for path in copy.iterdir()} <= {"out", *(["out.partial"] if force and not is_filled else [])}
    assert [path.name for path in place.iterdir()] == ["out"]


def change_embedding(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][200:] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES: dict[str, Callable[[Path], None]] = {
    "weights": change_embedding,
    "last byte, times set back": lambda folder: (flip(folder / "model.safetensors"), os.utime(folder, (0, 0)))[0],
    "generation config": lambda folder: (
        (folder / "generation_config.json").write_text('{"max_new_tokens": 7}') and None
    ),
    "tokenizer": lambda folder: flip(folder / "tokenizer_config.json", 1),
    "a licence more": lambda folder: (folder / "LICENSE").write_text("no") and None,
    "a licence less": lambda folder: (folder / "NOTICE").unlink(),
}


@pytest.mark.case("A6")
@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_source_that_has_changed_is_refused(
    model: Path, tmp_path: Path, change: Callable[[Path], None], is_finished: bool
) -> None:
    source = shutil.copytree(model, tmp_path / "tiny")
    (source / "NOTICE").write_text("notice")
    (source / "tokenizer_config.json").write_text("{ " + (source / "tokenizer_config.json").read_text().lstrip("{"))
    flip_back = (source / "model.safetensors").stat()
    if is_finished:
        quantized(source, tmp_path / "out")
    else:
        ended(source, tmp_path / "out", "rtn", KeyboardInterrupt(), "model.layers.1")
    change(source)
    os.utime(source / "model.safetensors", ns=(flip_back.st_atime_ns, flip_back.st_mtime_ns))
    before = contents(tmp_path)
    line = refused("quantize", source, "-r", "rtn", "-o", tmp_path / "out", "--resume")
    assert "a run with another" in line or "tokenizer" in line
    assert contents(tmp_path) == before


@pytest.mark.case("A7")
@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error"), MemoryError(), OSError(5, "Input/output error"), SystemExit(1)]
)
def test_after_any_error_finished_blocks_stay(model: Path, tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "out"
    ended(model, output, "rtn", error, "model.layers.1")
    assert (tmp_path / "out.partial" / "block-00000.json").is_file()
    line = refused("quantize", model, "-r", "rtn", "-o", output)
    assert (
        "out.partial: holds 1 finished block of an earlier run; continue with --resume, or start over with --force"
        in line
    )
    quantized(model, output, resume=True)
    quantized(model, tmp_path / "straight")
    assert contents(output) == contents(tmp_path / "straight")


@pytest.mark.case("A7")
def test_the_message_says_how_to_go_on(model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(model, tmp_path / "tiny")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    line = refused("quantize", source, "-r", "rtn", "-o", tmp_path / "out")
    assert "NaN" in line
    assert f"finished blocks are kept in {tmp_path / 'out.partial'}; the same command with --resume continues" in line


@pytest.mark.case("F11")
def test_the_text_is_not_written_again(
    model: Path, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = load_recipe("mxrot").changed({"calibration.generated": 0.5})
    options: dict[str, Any] = {"calib": str(text), "samples": 4, "seq_len": 64}
    written: list[int] = []
    original = writing.generated_windows

    def spy(*words: Any, **more: Any) -> Any:
        written.append(1)
        return original(*words, **more)

    monkeypatch.setattr(writing, "generated_windows", spy)
    ended(model, tmp_path / "out", chosen, KeyboardInterrupt(), "model.layers.1", **options)
    assert len(written) == 1
    quantized(model, tmp_path / "out", chosen, resume=True, **options)
    assert len(written) == 1
    quantized(model, tmp_path / "straight", chosen, **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")
    assert len(written) == 2


@pytest.mark.case("F11")
def test_written_text_that_was_changed_is_refused(model: Path, tmp_path: Path, text: Path) -> None:
    words = ("quantize", model, "-r", "mxrot", "-o", tmp_path / "out", "--calib", text, "--samples", "4")
    words += ("--seq-len", "64", "--set", "calibration.generated=0.5")
    chosen = load_recipe("mxrot").changed({"calibration.generated": 0.5})
    options: dict[str, Any] = {"calib": str(text), "samples": 4, "seq_len": 64}
    ended(model, tmp_path / "out", chosen, KeyboardInterrupt(), "model.layers.1", **options)
    kept = tmp_path / "out.partial" / "windows-calibration.safetensors"
    flip(kept, -8)
    assert "windows-calibration.safetensors: the text for calibration was changed" in refused(*words, "--resume")
    assert mxrot(*words, "--force").exit_code == 0


def tuned_run(model: Path, output: Path, text: Path) -> tuple[Recipe, dict[str, Any]]:
    """A run that was ended after it had tuned the whole network."""
    changes = {"rounding.method": "rtn", "tuning.scope": "network", "tuning.steps": 4, "tuning.checks": 2}
    chosen = load_recipe("mxrot-tuned").changed(changes | {"calibration.generated": 0.0, "tuning.generated": 0.0})
    options: dict[str, Any] = {"calib": str(text), "samples": 12, "seq_len": 64}
    ended(model, output, chosen, KeyboardInterrupt(), "done", **options)
    return chosen, options


@pytest.mark.case("G8")
def test_a_state_of_tuning_that_was_changed_is_refused(model: Path, tmp_path: Path, text: Path) -> None:
    output = tmp_path / "out"
    chosen, options = tuned_run(model, output, text)
    state = tmp_path / "out.partial" / "tuning.safetensors"
    good = state.read_bytes()
    for place in (-1, len(good) // 2):
        flip(state, place)
        with pytest.raises(CheckpointError, match="was changed"):
            quantized(model, output, chosen, resume=True, **options)
        state.write_bytes(good)
    tensors = load_file(state)
    del tensors["step"]
    save_file(tensors, state)
    with pytest.raises(CheckpointError, match=r"tuning.safetensors: the state of tuning was changed .* --force"):
        quantized(model, output, chosen, resume=True, **options)
    state.write_bytes(good)
    quantized(model, output, chosen, resume=True, **options)
    quantized(model, tmp_path / "straight", chosen, **options)
    assert contents(output) == contents(tmp_path / "straight")


@pytest.mark.case("G9")
@pytest.mark.parametrize("name", [SHARD, "tokenizer.json", "config.json", "recipe.toml"])
def test_a_flipped_bit_in_a_finished_output_is_found(model: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "out"
    quantized(model, output)
    expected = contents(output)
    flip(output / name)
    line = refused("quantize", model, "-r", "rtn", "-o", output, "--resume")
    assert f"{name}: was changed after it was written" in line
    assert mxrot("quantize", model, "-r", "rtn", "-o", output, "--resume", "--force").exit_code == 0
    assert contents(output) == expected


@pytest.mark.case("G10")
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"[]"])
def test_a_damaged_fingerprint_is_said(model: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    output = tmp_path / "out"
    ended(model, output, "rtn", KeyboardInterrupt(), "model.layers.1")
    path = tmp_path / "out.partial" / "fingerprint.json"
    path.write_bytes(damage(path.read_bytes()))
    before = contents(tmp_path)
    line = refused("quantize", model, "-r", "rtn", "-o", output, "--resume")
    assert "fingerprint.json: is damaged" in line and "start over with --force" in line
    assert contents(tmp_path) == before
    assert mxrot("quantize", model, "-r", "rtn", "-o", output, "--force").exit_code == 0
