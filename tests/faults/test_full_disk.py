"""A disk that is full at one write or another loses nothing: some writes here, every one at night."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.faults.test_kills import printed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")


def test_full_at_some_writes(tmp_path: Path) -> None:
    assert "same bytes but for: 0" in printed("full_disk", tmp_path, "--recipes", "rtn", "--every", "17")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_full_at_every_write(tmp_path: Path) -> None:
    assert "same bytes but for: 0" in printed("full_disk", tmp_path)
