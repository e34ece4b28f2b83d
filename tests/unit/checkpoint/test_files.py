"""Files appear whole; tensors have the bytes that safetensors writes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from mxrot.checkpoint.exchange import exchange
from mxrot.checkpoint.files import Written, file_in, seen, whole_file, write_bytes, write_tensors
from mxrot.checkpoint.named_file import write_named

TYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.float8_e5m2, torch.float8_e4m3fn, torch.float8_e8m0fnu),
    *(torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32, torch.uint32, torch.float32),
    *(torch.float64, torch.int64, torch.uint64),
]


def test_the_bytes_of_safetensors(tmp_path: Path) -> None:
    """Of every type, in the order of theirs; names that JSON escapes; nothing, one number, and what is not in order."""
    tensors = {f"x{index}": torch.arange(3).to(dtype) for index, dtype in enumerate(TYPES)}
    tensors |= {"empty": torch.zeros(0, 2), 'ä"\n\x7f/': torch.zeros(()), "turned": torch.randn(4, 5).t()}
    tensors["part"] = torch.randn(6, 6)[1:3, ::2]
    expected = save({name: value.contiguous() for name, value in tensors.items()}, metadata={"format": "pt"})
    written = write_tensors(tmp_path / "file", tensors)
    assert (tmp_path / "file").read_bytes() == expected
    assert written == Written(len(expected), hashlib.sha256(expected).hexdigest()) == seen(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("count", range(9))
def test_headers_of_every_length(tmp_path: Path, count: int) -> None:
    tensors = {"x" * (count + 1): torch.ones(1)}
    write_tensors(tmp_path / "file", tensors)
    assert (tmp_path / "file").read_bytes() == save(tensors, metadata={"format": "pt"})


def test_no_tensors(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {})
    assert (tmp_path / "file").read_bytes() == save({}, metadata={"format": "pt"})


def test_tensors_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes from a device is never there as a whole."""
    alive: list[int] = []
    cpu = torch.Tensor.cpu

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        assert (tmp_path / "file.tmp").stat().st_size >= sum(alive[:-1])
        alive.append(tensor.nbytes)
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    write_tensors(tmp_path / "file", {f"x{index}": torch.zeros(1 << 16) for index in range(4)})
    assert len(alive) == 4


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "file", 3) as sink:
        sink.write(b"new")
        1 / 0  # noqa: B018
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("run.json", "run.json"),
        ("a/b.jinja", "a/b.jinja"),
        ("../b", "b"),
        ("/etc/b", "b"),
        ("a/../../b", "b"),
        ("./b", "b"),
    ],
)
def test_files_of_a_list_are_in_the_folder(name: str, expected: str) -> None:
    assert file_in(Path("folder"), name) == Path("folder") / expected


def test_folders_change_places(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    assert exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "name").read_text() == "other" and (tmp_path / "other" / "name").read_text() == "one"
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "one", tmp_path / "nothing")


def test_a_named_file_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    target.parent.mkdir()
    target.write_bytes(b"old")
    target.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(target)
    (tmp_path / "link.tmp").write_bytes(b"somebody's")
    write_named(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new" and target.stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "link.tmp").read_bytes() == b"somebody's"
    write_named(tmp_path / "fresh", b"new")
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o666 & ~umask
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "fresh", "link", "link.tmp"]
    with pytest.raises(IsADirectoryError):
        write_named(tmp_path / "deep", b"new")


def test_a_pipe_stays_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_named(tmp_path / "pipe", b"table")
        assert os.read(reader, 100) == b"table"
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_standard_output_takes_a_file(tmp_path: Path) -> None:
    program = "from pathlib import Path; from mxrot.checkpoint.named_file import write_named as w; "
    program += "w(Path('/dev/stdout'), b'table')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout == b"table"
