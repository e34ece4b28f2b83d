"""What a plan says of training rotations, beside the tensors alive while it runs and the state that it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.live_bytes import LiveBytes
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import recipe, write
from tests.unit.planning.shapes import DEMO, LLAMA_3_8B, run_of
from tests.unit.planning.test_memory import MANY, WIDE, Nowhere

from mxrot.models import read_config
from mxrot.planning import estimate_memory, memory, needed_on_disk
from mxrot.planning.training import training_pieces, training_stages
from mxrot.quantizing.run import quantize
from mxrot.tuning.rotated_network import ROOM, Pieces

CHOSEN = recipe("spinquant", rotation__steps=2, rounding__method="rtn")


class Forgets(Nowhere):
    """Neither blocks nor rotations are kept."""

    rotation_checkpoint = None


@pytest.mark.parametrize("room", [4e9, 2e7], ids=["all at once", "once more"])
@pytest.mark.parametrize(("sizes", "shape"), [(WIDE, (8, 64)), (MANY, (24, 256))], ids=["wide", "many"])
def test_the_peak_is_that_of_the_tensors_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], shape: tuple[int, int], room: float
) -> None:
    monkeypatch.setitem(memory.PROCESS_BYTES, "cpu", 0.0)
    monkeypatch.setattr(memory, "KEPT_SHARE", 0.0)
    monkeypatch.setitem(ROOM, "cpu", room)
    folder = write_tiny_model(tmp_path / "tiny", **{**sizes, "num_hidden_layers": 3})
    run = run_of(read_config(folder), CHOSEN, *shape)
    assert training_pieces(run).recompute == (room < 1e9)

    def stop(done: float, total: int, what: str) -> None:
        if what.startswith("training rotations") and done == total:
            raise KeyboardInterrupt

    with LiveBytes() as alive, pytest.raises(KeyboardInterrupt):
        quantize(folder, CHOSEN, windows=random_windows(*shape), store=Forgets(), progress=stop)
    (stage,) = training_stages(run)
    assert stage in estimate_memory(run).stages
    assert stage.total == pytest.approx(alive.peak, rel=0.2)


def test_the_state_is_as_large_as_counted(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "tiny", torch.bfloat16)

    def stop(done: float, total: int, what: str) -> None:
        if what == "done":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", CHOSEN, windows=random_windows(8, 24), progress=stop)
    size = (tmp_path / "out.partial/rotations.safetensors").stat().st_size
    drawn = recipe("spinquant", rotation__steps=0, rounding__method="rtn")
    counted = needed_on_disk(source, CHOSEN, (8, 24)) - needed_on_disk(source, drawn, (8, 24))
    assert 2 * size - 2000 < counted <= 2 * size  # names in the header, and two losses


def test_a_gpu_takes_all_windows_of_a_small_model_at_once() -> None:
    def pieces(config: Any) -> Pieces:
        return training_pieces(run_of(config, recipe("spinquant"), 112, 2048, torch.bfloat16, "cuda"))

    assert pieces(DEMO).windows == 8
    assert pieces(LLAMA_3_8B) == Pieces(4, recompute=True)
    few = run_of(DEMO, recipe("spinquant"), 3, 128)
    assert training_pieces(few) == Pieces(3, recompute=False)


def test_what_is_not_trained_takes_nothing() -> None:
    run = run_of(DEMO, recipe("quarot"), 112, 2048, device="cuda")
    assert training_stages(run) == []
