"""Runs killed at random moments lose nothing, and are resumed to the same bytes: some here, sixty at night."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and signals of Linux")
ROOT = Path(__file__).parents[2]


def printed(script: str, folder: Path, *options: str) -> str:
    """What `python -m tests.faults.SCRIPT` prints; its exit code must be 0."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MXROT_CACHE": str(folder / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    command = [sys.executable, "-m", f"tests.faults.{script}", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


def test_some_kills(tmp_path: Path) -> None:
    found = printed("kills", tmp_path, "--kills", "4", "--apart", "0", "--recipes", "rtn")
    assert re.search(r"kills: [4-9] ", found) and "wrong: 0" in found


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_sixty_kills(tmp_path: Path) -> None:
    """By KILL, TERM, INT and HUP, over the whole life of plain, calibrated, generated-text and tuned runs."""
    found = printed("kills", tmp_path, "--kills", "60")
    same, resumed = map(int, re.findall(r"same bytes: (\d+) of (\d+)", found)[0])
    assert 60 <= same == resumed and all(name in found for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP"))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_twenty_kills_of_one_of_two_processes(tmp_path: Path) -> None:
    found = printed("rank_kills", tmp_path, "--kills", "20")
    assert "resumed to the same bytes: 20" in found
