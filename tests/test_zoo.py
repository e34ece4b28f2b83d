"""`benchmarks/zoo.py` on a folder of small configs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.test_benchmarks import imported
from tests.tiny_model import tiny_config


@pytest.fixture(scope="module")
def zoo() -> Any:
    return imported("zoo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One config that is taken, one of no known family."""
    found = tmp_path / "configs"
    found.mkdir()
    tiny_config(architectures=["LlamaForCausalLM"]).to_json_file(found / "small llama.json")
    (found / "bloom.json").write_text(json.dumps({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}))
    return found


def test_configs_are_taken_or_refused_with_a_reason(
    zoo: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert zoo.main([str(folder), "--recipe", "rtn", "--out", str(tmp_path / "out.json")]) == 0
    taken, refused, counts = capsys.readouterr().out.splitlines()
    assert taken.split()[:4] == ["taken", "small", "llama", "LlamaForCausalLM"] and "bits a weight" in taken
    assert refused.split()[:3] == ["refused", "bloom", "BloomForCausalLM"] and "is of no known family" in refused
    assert counts == "taken 1, refused 1, wrong 0"
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["counts"] == {"taken": 1, "refused": 1, "wrong": 0} and found["recipe"] == "rtn"
    rows = {row["name"]: row for row in found["configs"]}
    assert rows["small llama"]["parameters"] > 0 and rows["bloom"]["reason"].startswith("bloom: architecture Bloom")


def test_a_traceback_is_wrong(
    zoo: Any, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(zoo, "make_plan", broken)
    assert zoo.main([str(folder)]) == 1
    *lines, counts = capsys.readouterr().out.splitlines()
    assert all(line.startswith("wrong") and line.endswith("RuntimeError: a fault of ours") for line in lines)
    assert counts == "taken 0, refused 0, wrong 2"


def test_a_folder_without_configs_is_an_error(zoo: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        zoo.main([str(tmp_path)])
