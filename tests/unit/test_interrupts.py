import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny_model import write_tiny_model

from mxrot.interrupts import interrupt_waits
from mxrot.models import WeightFiles


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_waits_for_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupt_waits():
        interrupt()
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_in_place_of_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), interrupt_waits():
        interrupt()
        raise ValueError("could not determine the shape of object")
    with pytest.raises(ValueError, match="really"), interrupt_waits():
        raise ValueError("really")


def test_somebody_elses_handler_is_left_alone() -> None:
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with interrupt_waits():
            interrupt()
            assert seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_are_not_concerned() -> None:
    done = []

    def work() -> None:
        with interrupt_waits():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


def test_reading_a_tensor_is_not_torn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What safetensors makes of an interrupt inside of it."""
    folder = write_tiny_model(tmp_path)
    save_file({"w": torch.ones(3)}, folder / "model.safetensors", metadata={"format": "pt"})

    class Torn:
        def __init__(self, *arguments: object, **keywords: object) -> None: ...

        def __enter__(self) -> "Torn":
            return self

        def __exit__(self, *error: object) -> None: ...

        def get_tensor(self, name: str) -> torch.Tensor:
            interrupt()
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")

    files = WeightFiles(folder)
    monkeypatch.setattr("mxrot.models.weights.safe_open", Torn)
    with pytest.raises(KeyboardInterrupt):
        files.read("w")
