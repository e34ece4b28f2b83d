"""Headers of safetensors files: what safetensors writes is read, and every claim that does not fit is found."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mxrot.errors import CheckpointError, FamilyError
from mxrot.models.headers import Header, read_header

TENSORS = {
    "a": torch.zeros(3, 4, dtype=torch.bfloat16),
    "b": torch.zeros(5, dtype=torch.uint8),
    "c": torch.zeros(2, 0),
    "d": torch.zeros((), dtype=torch.float64),
    "e": torch.zeros(4).to(torch.float8_e4m3fn),
}
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors", {"format": "pt"})
    return tmp_path / "x.safetensors"


def change_header(path: Path, change: Change) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    change(table)
    header = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def test_what_safetensors_writes(path: Path) -> None:
    header = read_header(path)
    assert isinstance(header, Header) and header.metadata == {"format": "pt"}
    assert {name: tensor.shape for name, tensor in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in TENSORS.items()
    }
    with safe_open(path, "pt") as file:
        assert {name: tensor.dtype for name, tensor in header.tensors.items()} == {
            name: file.get_slice(name).get_dtype()
            for name in file.keys()  # noqa: SIM118
        }


CHANGES: dict[str, tuple[Change, str]] = {
    "another type": (lambda t: t["a"].update(dtype="F32"), r"'a': F32 \[3, 4\] does not take 24 bytes"),
    "a type nobody knows": (lambda t: t["a"].update(dtype="BF15"), "'a' is of type 'BF15'"),
    "a type that is a number": (lambda t: t["a"].update(dtype=5), "'a' is of type 5"),
    "another shape": (lambda t: t["a"].update(shape=[3, 5]), "does not take"),
    "a negative shape": (lambda t: t["a"].update(shape=[-3, -4]), "'a' has no shape"),
    "a shape of 65 dimensions": (lambda t: t["a"].update(shape=[3, 4] + [1] * 63), "at most 64 dimensions"),
    "a shape beyond 64 bits": (lambda t: t["a"].update(shape=[1 << 63]), "'a' has no shape"),
    "places that swap": (lambda t: t["a"].update(data_offsets=t["a"]["data_offsets"][::-1]), "does not take"),
    "places shared": (lambda t: t["b"].update(data_offsets=[0, 5]), "starts at byte"),
    "places beyond the end": (lambda t: t.update(z={"dtype": "U8", "shape": [9], "data_offsets": [41, 50]}), "byte"),
    "a tensor gone": (lambda t: t.pop("b"), "starts at byte|takes? .* bytes"),
    "an entry that is a list": (lambda t: t.update(a=[]), "'a' has no dtype, shape and data_offsets"),
    "a key more": (lambda t: t["a"].update(colour=1), "'a' has no dtype, shape and data_offsets"),
    "metadata of numbers": (lambda t: t.update(__metadata__={"format": 1}), "__metadata__ is no table of texts"),
    "a long name": (lambda t: t.update({"x" * 5000: t.pop("a") | {"dtype": "F4"}}), "'xxx.*x\\.\\.\\.'"),
    "a number of 400 digits": (lambda t: t["a"].update(shape=[10**399]), "a number of 400 digits"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_a_claim_that_does_not_fit(path: Path, change: Change, message: str) -> None:
    change_header(path, change)
    with pytest.raises(FamilyError, match=message) as raised:
        read_header(path)
    assert isinstance(raised.value, CheckpointError) and len(str(raised.value)) < 1000


def test_every_file_cut_short_is_refused(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(FamilyError):
            read_header(path)


def test_a_flipped_bit_of_the_header_is_refused_or_changes_what_it_says(path: Path) -> None:
    """Never something that safetensors itself refuses, or reads otherwise."""
    data = path.read_bytes()
    for place in range(8 * (8 + struct.unpack("<Q", data[:8])[0])):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = read_header(path)
        except FamilyError:
            continue
        try:
            with safe_open(path, "pt") as file:
                assert set(file.keys()) == set(found.tensors)
        except SafetensorError as error:
            pytest.fail(f"bit {place}: {error}")


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FamilyError, match="pipe: is a named pipe; expected a regular file"):
        read_header(tmp_path / "pipe")
    with pytest.raises(FamilyError, match="is a folder"):
        read_header(tmp_path)
    with pytest.raises(FamilyError, match="is a device"):
        read_header(Path("/dev/zero"))


def test_a_pointer_of_git_lfs(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(FamilyError, match="git lfs pull"):
        read_header(tmp_path / "x")
