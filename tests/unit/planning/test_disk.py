"""What is on the disk while a run goes on, and what was counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe, write

from mxrot.planning import needed_on_disk


def test_the_state_of_tuning_is_as_large_as_counted(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", torch.bfloat16)
    changes: dict[str, Any] = {"tuning__steps": 2, "tuning__checks": 2, "tuning__exponent_rate": 1e-3}
    generated = {"calibration__generated": 0.0, "tuning__generated": 0.25, "transform__open": 0.0}
    chosen = recipe("mxrot", rounding__method="rtn", tuning__scope="network", **changes, **generated)

    def stop(done: float, total: int, what: str) -> None:
        if what == "done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", chosen, windows=random_windows(12, 32), progress=stop)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out.partial").iterdir()}
    kept = 2 * sizes["tuning.safetensors"] + sizes["windows-tuning.safetensors"]
    weights = sum(size for name, size in sizes.items() if name.startswith("model-"))
    counted = needed_on_disk(source, chosen, (12, 32))
    # What is not counted are the names in headers, which are as large as all else in so small a model.
    names = 60_000
    assert kept + weights - names < counted < kept + weights


def test_nothing_is_counted_of_what_is_no_model(tmp_path: Path) -> None:
    assert needed_on_disk(tmp_path, recipe("rtn"), (0, 0)) == 0.0
