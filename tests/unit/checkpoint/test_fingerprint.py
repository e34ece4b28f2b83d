"""Models are told apart by every byte, and files are read again only when they may have changed."""

from __future__ import annotations

import json
import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from tests.tiny_model import write_tiny_model

from mxrot.checkpoint import fingerprint
from mxrot.checkpoint.fingerprint import FORMAT, differences, hash_files, hash_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "tiny")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that were really read."""
    names: list[str] = []
    original = fingerprint.sha256_of

    def spy(path: Path, *rest: object) -> str:
        names.append(path.name)
        return original(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprint, "sha256_of", spy)
    return names


def test_a_copy_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    hashes, _ = hash_model(folder)
    assert hashes == hash_model(tmp_path / "copy")[0]
    assert hashes == {name: sha256((folder / name).read_bytes()).hexdigest() for name in hashes}
    assert hashes.keys() == {"config.json", "model.safetensors"}


def test_models_are_told_apart(folder: Path, tmp_path: Path) -> None:
    seen = {str(hash_model(folder)[0])}
    seen.add(str(hash_model(write_tiny_model(tmp_path / "seed", seed=1))[0]))
    seen.add(str(hash_model(write_tiny_model(tmp_path / "type", torch.bfloat16))[0]))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    seen.add(str(hash_model(folder)[0]))
    assert len(seen) == 4


@pytest.mark.parametrize("place", [0.01, 0.3, 0.5, 0.77, 0.99])
def test_every_byte_counts(folder: Path, place: float) -> None:
    """Also far from the start of a tensor, and with the file's times set back."""
    path = folder / "model.safetensors"
    before, stamps = hash_model(folder)
    times = path.stat()
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header + int(place * (len(data) - header))] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    now, _ = hash_model(folder, stamps)
    assert {name for name in now if now[name] != before[name]} == {"model.safetensors"}


def test_what_has_not_changed_is_not_read_again(folder: Path, hashed: list[str]) -> None:
    first, stamps = hash_model(folder)
    assert sorted(hashed) == ["config.json", "model.safetensors"]
    hashed.clear()
    again, kept = hash_model(folder, json.loads(json.dumps(stamps)))
    assert (again, kept, hashed) == (first, stamps, [])
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    changed, _ = hash_model(folder, stamps)
    assert hashed == ["config.json"] and changed["config.json"] != first["config.json"]


def test_progress_is_told_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_SECONDS_BETWEEN", 0.0)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 27)
    told: list[tuple[float, int]] = []
    hash_files(tmp_path, [tmp_path / "large"], progress=lambda done, total, what: told.append((done, total)))
    shares = [done for done, _ in told]
    assert shares == sorted(shares) and {total for _, total in told} == {1}
    assert any(0 < share < 1 for share in shares)


def test_what_differs_is_named() -> None:
    one = {"format": FORMAT, "model": {"a": "1", "b": "2"}, "side_files": {}, "seed": 0}
    other = {"format": FORMAT, "model": {"a": "1", "b": "3", "c": "4"}, "side_files": {"LICENSE": "5"}, "seed": 0}
    assert differences(one, one) == []
    assert differences(one, other) == ["model (b, c)", "side files (LICENSE)"]
    assert differences({"seed": 0}, one) == ["version of mxrot"]
