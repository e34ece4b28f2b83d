"""Memory, descriptors and room on a disk that run out: one line that says what did not fit and what to do."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases.commands import refused
from tests.tiny_model import write_tiny_model

LIMITS = sys.platform == "linux"
WIDE = {"hidden_size": 2048, "intermediate_size": 4096, "head_dim": 512, "num_hidden_layers": 1}
"""One tensor of it takes 67 MB in float64, so that memory ends in its block, and threads have their stacks before."""
MB = 10**6


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What commands came to under limits of this system, by what ran out."""
    folder = tmp_path_factory.mktemp("limited")
    model = str(write_tiny_model(folder / "model", **WIDE))
    quantize = ["quantize", model, "-r", "hadamard", "-o"]
    commands = {
        "memory": [[*quantize, str(folder / "a")], "AS", 650 * MB],
        "little memory": [[*quantize, str(folder / "b")], "AS", 40 * MB],
        "memory of eval": [["eval", model, "--windows", "1"], "AS", 200 * MB],
        "descriptors": [[*quantize, str(folder / "c")], "NOFILE", 4],
        "descriptors of eval": [["eval", model, "--windows", "1"], "NOFILE", 4],
    }
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    script = Path(__file__).with_name("limited.py")
    found = subprocess.run(
        [sys.executable, script, folder / "commands.json"], capture_output=True, text=True, check=True, timeout=120
    )
    return dict(zip(commands, map(tuple, json.loads(found.stdout.splitlines()[-1])), strict=True))


@pytest.mark.case("G7")
@pytest.mark.skipif(not LIMITS, reason="limits of Linux")
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("memory", r"model\.layers\.\d: out of memory \([\d.]+ MB more wanted\); take fewer or shorter windows"),
        ("little memory", "out of memory"),
        ("memory of eval", "out of memory"),
        ("descriptors", "too many open files; raise the limit"),
        ("descriptors of eval", "too many open files; raise the limit"),
    ],
)
def test_a_limit_of_the_system_is_one_line(limited: dict[str, tuple[int, str]], what: str, said: str) -> None:
    code, written = limited[what]
    assert code == 1, written
    errors = [line for line in written.splitlines() if line.startswith("mxrot: error: ")]
    assert len(errors) == 1 and re.search(said, errors[0]) and "Traceback" not in written, written


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.case("G7")
@pytest.mark.parametrize(
    ("raises", "said"),
    [
        (lambda *_: torch.empty(1 << 58), "out of memory"),
        (lambda *_: bytearray(1 << 62), "out of memory"),
        (lambda *_: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")), "GPU memory"),
        (lambda *_: _raise(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "a")), "too many open files"),
        (lambda *_: _raise(OSError(errno.ENFILE, os.strerror(errno.ENFILE), "a")), "too many open files"),
        (lambda *_: _raise(RuntimeError("can't start new thread")), "no thread can start"),
    ],
    ids=["torch", "python", "gpu", "descriptors", "descriptors of all", "threads"],
)
def test_what_runs_out_in_the_middle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raises: Callable[..., Any], said: str
) -> None:
    monkeypatch.setattr(torch.Tensor, "argmax", raises)
    monkeypatch.setattr(torch.linalg, "inv", raises)
    line = refused("quantize", model, "-r", "hadamard", "-o", tmp_path / "out", exit_code=1)
    assert said in line and "model.layers.0" in line


def _raise(error: Exception) -> None:
    raise error
