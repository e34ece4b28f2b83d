"""Estimated memory beside the tensors that are alive while a small model is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.live_bytes import LiveBytes
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe

from mxrot.models import build_skeleton, find_family, read_config
from mxrot.pipeline import quantize
from mxrot.planning import memory
from mxrot.planning.memory import Run, estimate_memory
from mxrot.planning.shape import ModelShape
from mxrot.recipe import Recipe
from mxrot.tuning import Keeper


class Nowhere:
    """A store that forgets."""

    keeper: Keeper = None  # type: ignore[assignment]

    def load(self, index: int) -> None:
        return None

    def save(self, *_: Any) -> None: ...

    def save_rest(self, *_: Any) -> None: ...


def run_of(folder: Path, chosen: Recipe, windows: int, seq_len: int, device: str = "cpu", **options: Any) -> Run:
    config = read_config(folder)
    shape = ModelShape.of(build_skeleton(config), find_family(config, "here"), chosen.ignore)
    return Run(shape, chosen, device, torch.float16, windows, seq_len, **options)


WIDE = {"hidden_size": 256, "intermediate_size": 768, "head_dim": 64}
MANY = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "num_hidden_layers": 3}


@pytest.mark.parametrize("sizes", [WIDE, MANY], ids=["weights", "tokens"])
@pytest.mark.parametrize(
    "chosen",
    [
        recipe("rtn"),
        recipe("hadamard"),
        recipe("smoothquant"),
        recipe("duquant++", transform__steps=4),
        recipe("duquant++-gptq", transform__steps=4),
        recipe("mxrot", calibration__generated=0.0),
        recipe("mxrot", calibration__generated=0.0, rounding__target="original"),
        recipe("mxrot", calibration__generated=0.0, rounding__target="own"),
    ],
    ids=lambda chosen: f"{chosen.name} {getattr(chosen.rounding, 'target', '')}",
)
def test_the_peak_is_that_of_the_tensors_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: Recipe, sizes: dict[str, int]
) -> None:
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    folder = write_tiny_model(tmp_path / "tiny", **sizes)
    windows = None if chosen.is_data_free else random_windows(*((2, 64) if sizes is WIDE else (24, 256)))
    with LiveBytes() as alive:
        quantize(folder, chosen, windows=windows, store=Nowhere())
    count, length = (0, 2) if windows is None else windows.shape
    peak = estimate_memory(run_of(folder, chosen, count, length)).peak
    print(chosen.name, alive.peak / 1e6, peak.total / 1e6, peak.total/alive.peak, peak.name)
    assert peak.total == pytest.approx(alive.peak, rel=0.15)
