"""Outputs that cannot be renamed, and what a model folder holds beside the model."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.cases.folders import contents
from tests.tiny_model import write_tiny_model

import mxrot as package

CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an ordinary output holds."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    package.quantize(model, "rtn", folder)
    return contents(folder)


@pytest.mark.case("A3")
@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV])
def test_a_folder_that_cannot_be_renamed_is_filled(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A mount point that the system does not tell of, and a folder of a lower layer of a container."""
    output = tmp_path / "out"
    output.mkdir()
    rename = os.rename

    def guarded(one: str | Path, other: str | Path) -> None:
        if output in (Path(one), Path(other)):
            raise OSError(number, os.strerror(number), str(one), None, str(other))
        rename(one, other)

    monkeypatch.setattr(os, "rename", guarded)
    result = mxrot("quantize", model, "-r", "rtn", "-o", output)
    assert result.exit_code == 0, result.output
    assert contents(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    package.load(output)


IN_A_MOUNT = """
set -e
mount -t tmpfs none "$1/out a"
mount --bind "$1/volume" "$1/out b"
cd /
"$2" -c '
import sys
from mxrot.cli import app
for name in "ab":
    for options in (("hadamard",), ("rtn", "--force"), ("rtn", "--resume")):
        words = ["quantize", sys.argv[1], "-o", f"{sys.argv[2]}/out {name}", "-r", *options]
        app(words, standalone_mode=False)
' "$3" "$1"
ls -A "$1" > "$4/beside"
cp -r "$1/out a" "$1/out b" "$4"
"""


@pytest.mark.case("A3")
@pytest.mark.skipif(not CAN_MOUNT, reason="this system lets nobody mount anything")
def test_a_mount_point_is_filled(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    """As with `docker -v $PWD/out:/out`; b shows a folder of the same file system in another place."""
    inner, outer = tmp_path / "inner", tmp_path / "outer"
    for folder in (inner / "out a", inner / "out b", inner / "volume", outer):
        folder.mkdir(parents=True)
    words = ["unshare", "-rm", "sh", "-c", IN_A_MOUNT, "sh", str(inner), sys.executable, str(model), str(outer)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(outer / "out a") == contents(outer / "out b") == expected
    assert (outer / "beside").read_text().split("\n") == ["out a", "out b", "volume", ""]


@pytest.mark.case("A3")
def test_a_folder_that_a_shell_stands_in_stays_that_folder(
    model: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    monkeypatch.chdir(output)
    number = os.stat(".").st_ino
    assert mxrot("quantize", model, "-r", "rtn", "-o", output).exit_code == 0
    assert os.stat(".").st_ino == number == output.stat().st_ino
    assert contents(output) == expected


@pytest.mark.case("A3")
def test_a_link_to_a_folder_stays_a_link(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "big").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "disk" / "big")
    (tmp_path / "later").symlink_to(tmp_path / "disk" / "new")
    for name, target in (("here", "big"), ("later", "new")):
        assert mxrot("quantize", model, "-r", "rtn", "-o", tmp_path / name).exit_code == 0
        assert (tmp_path / name).is_symlink()
        assert contents(tmp_path / "disk" / target) == expected
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["big", "new"]


@pytest.mark.case("A4")
def test_folders_beside_the_model_do_not_stop_a_run(model: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    source = shutil.copytree(model, tmp_path / "tiny")
    for name in ("LICENSES", "tokenizer", "vocab", "NOTICE", "old.model", "chat.jinja"):
        (source / name).mkdir()
        (source / name / "inside.txt").write_text("text")
    (source / "LICENSE.txt").write_text("do what you like")
    (source / "notes.txt").write_text("mine")
    assert mxrot("quantize", source, "-r", "rtn", "-o", tmp_path / "out").exit_code == 0
    assert contents(tmp_path / "out") == expected | {"LICENSE.txt": b"do what you like"}
    told = json.loads((tmp_path / "out" / "run.json").read_text())["not_copied"]
    assert told == ["LICENSES/", "NOTICE/", "chat.jinja/", "notes.txt", "old.model/", "tokenizer/", "vocab/"]


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


@pytest.mark.case("A4")
@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("LICENSE", lambda path: path.symlink_to("nothing"), "is a link to nothing"),
        ("tokenizer.model", _fifo, "is not a regular file"),
        ("NOTICE", _socket, "is not a regular file"),
        ("vocab.txt", lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
    ids=["link to nothing", "FIFO", "socket", "link to itself"],
)
def test_what_cannot_be_copied_is_named_before_the_work(
    model: Path, tmp_path: Path, name: str, make: Callable[[Path], None], said: str
) -> None:
    source = shutil.copytree(model, tmp_path / "tiny")
    make(source / name)
    line = refused("quantize", source, "-r", "rtn", "-o", tmp_path / "out")
    assert f"{name}: goes into the checkpoint" in line and said in line
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.case("A9")
@pytest.mark.parametrize("text", ["null", "[1, 2]", "{", '{"max_new_tokens": -5}', '{"cache_implementation": "mine"}'])
def test_a_generation_config_that_transformers_refuses_is_found_before_the_work(
    model: Path, tmp_path: Path, text: str
) -> None:
    source = shutil.copytree(model, tmp_path / "tiny")
    (source / "generation_config.json").write_text(text)
    line = refused("quantize", source, "-r", "rtn", "-o", tmp_path / "out")
    assert "generation_config.json" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.case("A3")
@pytest.mark.parametrize("name", ["a" * 250, "a" * 300, os.fsdecode(b"out-\xff"), "loop", "file", "file/deeper"])
@pytest.mark.parametrize("option", [None, "--resume", "--force"])
def test_a_name_that_can_be_no_output_is_refused_before_the_work(
    model: Path, tmp_path: Path, name: str, option: str | None
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("mine")
    line = refused("quantize", model, "-r", "rtn", "-o", tmp_path / name, *([option] if option else []))
    assert "give a folder" in line or "give another one" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop"]
