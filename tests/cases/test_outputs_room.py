"""Room on the disk: counted before the work, and by plan."""

from __future__ import annotations

import json
import re
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model
from transformers import LlamaConfig

from mxrot.checkpoint.room import Room
from mxrot.errors import DiskFullError

Usage = namedtuple("Usage", "total used free")


@pytest.mark.case("G14")
def test_plan_counts_the_state_of_tuning(tmp_path: Path) -> None:
    """16 bytes a weight, and twice that while a new state is written beside the old one."""
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32}
    config = LlamaConfig(vocab_size=128, num_key_value_heads=8, architectures=["LlamaForCausalLM"], **shape)
    config.save_pretrained(tmp_path)
    weights = 2 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336)
    words = ("plan", tmp_path, "-r", "mxrot-tuned", "--device", "cpu", "--json", tmp_path / "plan.json")
    said = mxrot(*words).output
    disk = json.loads((tmp_path / "plan.json").read_text())["disk"]
    state = disk["terms"]["the state of tuning, twice while it is replaced"]
    assert 32 * weights <= state < 32.2 * weights  # and the transforms
    assert disk["total"] == sum(disk["terms"].values())
    assert "disk: " in said and "the state of tuning" in said


@pytest.mark.case("G14")
def test_a_disk_that_is_too_small_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000_000, 9_990_000, 10_000))
    line = refused("quantize", model, "-r", "rtn", "-o", tmp_path / "out", exit_code=1)
    assert "GB are to be written there, and 1e-05 GB are free; make room" in line
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


@pytest.mark.case("G14")
@pytest.mark.parametrize("free", [1_000, 60_000])
def test_a_disk_that_fills_up_is_seen_after_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Somebody else fills it. A block that fits is written first; the same bytes come out once there is room."""
    model = write_tiny_model(tmp_path / "tiny", num_hidden_layers=3)
    words = ("quantize", model, "-r", "rtn", "-o")
    partial = tmp_path / "out.partial"

    def usage(path: Path) -> Usage:
        is_full = (partial / "block-00000.json").exists()
        return Usage(10_000_000, 0, free if is_full else 10_000_000)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", usage)
        line = refused(*words, tmp_path / "out", exit_code=1)
        assert re.search(r"out: [\d.e-]+ GB are to be written there, and [\d.e-]+ GB are free; make room for", line)
        assert line.endswith(f"kept in {partial}; the same command with --resume continues from there")
        assert [path.name for path in sorted(partial.glob("block-*"))] == ["block-00000.json"]
        again = refused(*words, tmp_path / "out", "--resume", exit_code=1)
        assert "make room for" in again
    for extra in ((tmp_path / "out", "--resume"), (tmp_path / "straight",)):
        assert mxrot(*words, *extra).exit_code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "straight")


@pytest.mark.case("G14")
def test_a_block_that_does_not_fit_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody knows how much the whole takes, too."""
    room = Room(tmp_path / "out", tmp_path, tmp_path, needed_bytes=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 9_000, 1_000))
    room.check()
    room.check_for(1_000)
    with pytest.raises(DiskFullError, match=r"1\.1e-06 GB are to be written there, and 1e-06 GB are free"):
        room.check_for(1_100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 0))
    room.check_for(1_100)  # some file systems do not tell


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but run.json, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}
