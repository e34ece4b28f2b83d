"""Main memory does not grow with the number of blocks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.tiny_model import write_tiny_model

import mxrot

BLOCKS = 8
WIDE = {"hidden_size": 512, "intermediate_size": 1536, "head_dim": 128, "num_hidden_layers": BLOCKS}
BLOCK_BYTES = 2 * (512 * (512 + 2 * 256 + 512) + 3 * 512 * 1536)
"""Of one block in float16."""


def resident() -> int:
    """Bytes of main memory that this process holds for itself: no files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.case("G6")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("recipe", ["rtn"])
def test_main_memory_is_flat_in_the_number_of_blocks(tmp_path: Path, recipe: str) -> None:
    """Between two blocks nothing of the first is left, from the third on, when all has been allocated once."""
    model = write_tiny_model(tmp_path / "model", **WIDE)
    seen: dict[int, int] = {}

    def told(done: float, total: int, what: str) -> None:
        if total == BLOCKS and what.startswith("model.layers."):
            seen.setdefault(int(done), resident())

    mxrot.quantize(model, recipe, tmp_path / "out", device="cpu", progress=told)
    assert sorted(seen) == list(range(BLOCKS))
    assert max(seen[index] for index in range(3, BLOCKS)) - seen[2] < BLOCK_BYTES
