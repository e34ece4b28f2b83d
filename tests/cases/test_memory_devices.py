"""What computes: devices that cannot, and which kernels are chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases.commands import mxrot, refused
from tests.tiny_model import write_tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mxrot.kernels import crossovers, dispatch
from mxrot.kernels.crossovers import Crossovers, crossovers_of, file_of_crossovers

GPU = torch.device("cuda")


class SinglePrecision(TorchFunctionMode):
    """While open, this machine computes as MPS does: everything but float64."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.case("F17")
@pytest.mark.parametrize("words", [("quantize", "-r", "rtn"), ("eval",), ("generate", "hello")])
def test_a_device_without_float64(model: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    command, *rest = words
    output = ["-o", tmp_path / "out"] if command == "quantize" else []
    with SinglePrecision():
        line = refused(command, model, *rest, "--device", "cpu", *output)
    assert line.startswith("--device cpu: not usable here: it does not compute in float64 (")


@pytest.mark.case("F17")
@pytest.mark.parametrize("device", ["meta", "mps", "xpu", "cuda:77", ""])
def test_a_device_that_has_no_answers(model: Path, tmp_path: Path, device: str) -> None:
    line = refused("quantize", model, "-r", "rtn", "-o", tmp_path / "out", "--device", device)
    assert line.startswith(f"--device {device}: not usable here: ")


@pytest.mark.case("F17")
def test_a_device_without_float64_in_python(model: Path) -> None:
    import mxrot as package
    from mxrot.errors import ConfigError

    with SinglePrecision(), pytest.raises(ConfigError, match="does not compute in float64"):
        package.quantize(model, "rtn", device="cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """A GPU for which somebody has measured something, as far as choosing goes."""
    monkeypatch.setenv("MXROT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "one")
    monkeypatch.setattr(crossovers, "MEASURED", {(9, 0): Crossovers(4, 2)})
    crossovers_of.cache_clear()
    yield monkeypatch
    crossovers_of.cache_clear()


@pytest.mark.case("F18")
@pytest.mark.parametrize("text", ["", "{", '{"one": 3}', '{"one": {"packed": 1e999}}', "\x00"])
@pytest.mark.filterwarnings("ignore:.*crossovers")
def test_a_damaged_file_of_crossovers_stops_nothing(gpu: pytest.MonkeyPatch, text: str) -> None:
    """What a linear asks at each call is answered; measured again, the file is whole."""
    gpu.setattr(dispatch, "has_triton", lambda: True)
    gpu.setattr(dispatch, "takes_block_scales", lambda device: False)
    file_of_crossovers().parent.mkdir()
    file_of_crossovers().write_text(text)
    codes = torch.zeros(32, 16, dtype=torch.uint8)
    weight = dispatch.PackedWeight(codes, codes[:, :1])
    assert "do not" not in dispatch.choose_path(1, weight, GPU).reason
    crossovers.remember(GPU, Crossovers(8, 8))
    assert json.loads(file_of_crossovers().read_text()) == {"one": {"packed": 8, "kept": 8}}
    assert crossovers_of(GPU) == Crossovers(8, 8)


@pytest.mark.case("F19")
def test_the_choice_of_kernels_is_recorded(model: Path, tmp_path: Path) -> None:
    from mxrot.kernels.choices import kernel_choices

    assert mxrot("quantize", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu").exit_code == 0
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["kernels"] == run["fingerprint"]["kernels"] == kernel_choices("cpu") != {}
    words = ["--windows", "1", "--seq-len", "64", "--device", "cpu", "--json", tmp_path / "eval.json"]
    assert mxrot("eval", tmp_path / "out", *words).exit_code == 0
    assert json.loads((tmp_path / "eval.json").read_text())["kernels"] == run["kernels"]


@pytest.mark.case("F19")
def test_what_is_recorded_on_a_gpu(gpu: pytest.MonkeyPatch) -> None:
    from mxrot.kernels.choices import kernel_choices

    found = kernel_choices("cuda")["crossovers"]
    assert found == {"packed": 4, "kept": 2, "from": "compute capability 9.0"}
    crossovers.remember(GPU, Crossovers(8, 8))
    assert kernel_choices("cuda")["crossovers"] == {"packed": 8, "kept": 8, "from": "this device"}


@pytest.mark.case("F19")
def test_a_run_with_other_kernels_is_not_resumed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mxrot.checkpoint import fingerprint

    words = ["quantize", model, "-r", "rtn", "-o", tmp_path / "out", "--device", "cpu"]
    with monkeypatch.context() as full:
        full.setattr(
            "mxrot.checkpoint.partial.PartialCheckpoint.save_rest",
            lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")),
        )
        assert mxrot(*words, "--resume").exit_code == 1
    monkeypatch.setattr(fingerprint, "kernel_choices", lambda device: {"instructions": "none"})
    assert "kernels (float32_products, instructions)" in refused(*words, "--resume")
