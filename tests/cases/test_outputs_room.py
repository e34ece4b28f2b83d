"""Room on the disk: counted before the work, and by plan."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model
from transformers import LlamaConfig

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
