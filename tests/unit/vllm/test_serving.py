"""The command that serves a checkpoint, on machines that are described and not there."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.folders import recipe, write
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.errors import ConfigError
from mxrot.kernels import dispatch
from mxrot.kernels.crossovers import Crossovers
from mxrot.vllm import serving
from mxrot.vllm.facts import Facts
from mxrot.vllm.serving import Machine, Server, Wish, server_for

HOPPER = Machine("0.32.0", (), None, (80 * 10**9,) * 2, (9, 0))
LAPTOP = Machine(None, (), None, (), None)


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by recipe."""
    root = tmp_path_factory.mktemp("served")
    changes: dict[str, dict[str, Any]] = {"hadamard": {}, "rtn": {}, "block": {"transform__sharing": "block"}}
    for name, changed in changes.items():
        write(source, root / name, recipe("duquant++" if name == "block" else name, **changed))
    return {name: root / name for name in changes}


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels choose as on a device that was measured."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(dispatch, "crossovers_of", lambda device: Crossovers(packed=64, kept=16))
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)


def served(folder: Path, machine: Machine = HOPPER, **wish: Any) -> Server:
    return server_for(folder, Facts.written(folder), Wish(**wish), machine)


def refused(folder: Path, machine: Machine = HOPPER, **wish: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        served(folder, machine, **wish)
    return str(caught.value)


def test_the_plugin_serves_what_it_runs_in_the_type_of_the_checkpoint(folders: dict[str, Path]) -> None:
    found = served(folders["block"], more=("--port", "8001"))
    assert found.words[:5] == (sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folders["block"]))
    options = dict(zip(found.words[5::2], found.words[6::2], strict=True))
    assert options == {
        "--served-model-name": "block",
        "--dtype": "float16",  # the tiny model's
        "--tensor-parallel-size": "1",
        "--max-model-len": "512",
        "--port": "8001",
    }
    assert found.words[-2:] == ("--port", "8001") and found.missing is None
    assert shlex.split(found.line) == list(found.words)


def test_it_says_what_computes_what(folders: dict[str, Path]) -> None:
    lines = "\n".join(served(folders["block"]).lines)
    assert "weights mxfp4, inputs mxfp4 by rule even" in lines
    assert "  1 to 64 rows: matrix units (up to 64 rows)\n  65 or more rows: fp8 (more than 64 rows)" in lines
    assert "1 or more rows: plain" in "\n".join(served(folders["block"], LAPTOP).lines)


def test_a_head_is_served_by_the_plugin_alone(source: Path, tmp_path: Path) -> None:
    """The tiny model is in float16, which the kernel of the head does not take."""
    write(source, tmp_path / "head", recipe("rtn", head__format="mxint8"))
    lines = served(tmp_path / "head").lines
    assert lines[-2:] == (
        "the head: weights mxint8 even, inputs in 16 bit, no transform",
        "  dequantized in each step, because its kernel takes bfloat16 only: -- --dtype bfloat16",
    )
    coarse = {"head__format": "mxfp4", "head__inputs": "mxfp4"}
    write(source, tmp_path / "W4A4", recipe("rtn", **coarse))
    assert served(tmp_path / "W4A4").lines[-1] == "the head: weights mxfp4 even, inputs mxfp4 even, no transform"
    assert "install mxrot where vLLM runs" in refused(tmp_path / "head", stock=True)


def test_stock_is_left_to_compressed_tensors_in_bfloat16(folders: dict[str, Path]) -> None:
    found = served(folders["rtn"], stock=True)
    assert found.words[-2:] == ("--quantization", "compressed-tensors") and "bfloat16" in found.words
    for capability, computes in (((9, 0), "W4A8, Humming"), ((8, 0), "W4A16, Marlin"), ((0, 0), "unclear")):
        other = served(folders["rtn"], replace(HOPPER, capability=capability), stock=True)
        assert any(computes in line for line in other.lines)


@pytest.mark.parametrize(
    ("name", "machine", "wish", "message"),
    [
        ("block", HOPPER, {"stock": True}, "one matrix a block"),
        ("hadamard", HOPPER, {"stock": True}, "export .* --to vllm -o OUT"),
        ("rtn", replace(HOPPER, gpu_bytes=(), capability=None), {"stock": True}, "no MXFP4 product for a CPU"),
        ("block", replace(HOPPER, plugin_stop="no plugin"), {}, "no plugin; --stock"),
        ("rtn", HOPPER, {"tensor_parallel": 3}, "can be shared by 1"),
        ("rtn", HOPPER, {"program": "ollama"}, "expected one of auto, vllm, transformers"),
        ("rtn", LAPTOP, {"stock": True}, "--stock: needs vLLM"),
        ("rtn", HOPPER, {"program": "transformers", "max_len": 64}, "--max-len: needs vLLM"),
        ("rtn", replace(HOPPER, gpu_bytes=(10**4,)), {}, "want more of them"),
    ],
)
def test_what_is_refused(
    name: str, machine: Machine, wish: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(ConfigError, match=message):
        served(folders[name], machine, **wish)


@pytest.mark.parametrize("word", ["--trust-remote-code", "--trust_remote_code", "--trust-rem", "--trust-remote-code=1"])
@pytest.mark.parametrize("machine", [HOPPER, LAPTOP])
def test_code_of_a_model_is_never_trusted(word: str, machine: Machine, folders: dict[str, Path]) -> None:
    assert "would have to be trusted" in refused(folders["rtn"], machine, more=("--port", "1", word))
    assert "--trust" not in served(folders["rtn"], machine).line


def test_a_file_of_options_is_not_passed_on(folders: dict[str, Path]) -> None:
    for word in ("--config", "--config=all.yaml", "--conf"):
        assert "a file of options" in refused(folders["rtn"], more=(word,))
    assert served(folders["rtn"], more=("--compilation-config", "3")).words[-1] == "3"


def test_without_vllm_the_server_of_transformers_runs(folders: dict[str, Path]) -> None:
    found = served(folders["block"], LAPTOP, more=("--host", "0.0.0.0"))
    expected = (sys.executable, "-m", "transformers.cli.transformers", "serve", str(folders["block"]))
    assert found.words == (*expected, "--host", "0.0.0.0") and found.missing is None
    lacking = served(folders["block"], replace(LAPTOP, lacks=("fastapi", "openai")))
    assert lacking.missing is not None and "fastapi and openai: pip install 'transformers[serving]'" in lacking.missing
    unknown = served(folders["block"], replace(LAPTOP, autoloads=False)).missing
    assert unknown is not None and "install mxrot as a package" in unknown
    assert served(folders["block"], LAPTOP, program="vllm").missing == "vLLM is not installed here"


def test_as_few_gpus_as_hold_the_weights(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(path.stat().st_size for path in folders["rtn"].glob("*.safetensors"))
    machine = replace(HOPPER, gpu_bytes=(weights, weights))
    tensor_parallel = serving._tensor_parallel
    assert tensor_parallel(folders["rtn"], (1, 2, 4), Wish(), replace(machine, gpu_bytes=(2 * weights,))) == 1
    assert tensor_parallel(folders["rtn"], (1, 2, 4), Wish(), machine) == 2
    assert tensor_parallel(folders["rtn"], (1, 2, 4), Wish(tensor_parallel=1), machine) == 1
    with pytest.raises(ConfigError, match="there are 2 GPUs"):
        tensor_parallel(folders["rtn"], (1, 2, 4), Wish(tensor_parallel=4), machine)


def test_the_plugin_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "entry_points", lambda **asked: ["one"])
    assert serving._plugin_stop() is None
    monkeypatch.setenv("VLLM_PLUGINS", "other,mxrot")
    assert serving._plugin_stop() is None
    monkeypatch.setenv("VLLM_PLUGINS", "")
    assert "switches mxrot's plugin off" in str(serving._plugin_stop())
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(serving, "entry_points", lambda **asked: [])
    assert "not installed as a package" in str(serving._plugin_stop())


@pytest.mark.parametrize("value", ["0", "1", None])
def test_a_switch_of_torch_keeps_transformers_from_mxrot(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "entry_points", lambda **asked: ["one"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    if value is not None:
        monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", value)
    assert Machine.here().autoloads is (value != "0")


@pytest.fixture
def laptop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: LAPTOP))


@pytest.mark.usefixtures("laptop")
def test_the_command_starts_what_a_dry_run_prints(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: started.append(words))
    arguments = ["serve", str(folders["rtn"]), "--", "--port", "8001"]
    dry = CliRunner().invoke(app, [*arguments[:2], "--dry-run", *arguments[2:]])
    assert (dry.exit_code, started) == (0, [])
    real = CliRunner().invoke(app, arguments)
    assert real.exit_code == 0 and real.stdout == dry.stdout
    assert shlex.split(dry.stdout.splitlines()[-1]) == list(started[0]) and started[0][-2:] == ("--port", "8001")


def test_a_server_that_is_not_there_is_an_error_and_no_checkpoint_too(
    folders: dict[str, Path], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Machine, "here", staticmethod(lambda: replace(LAPTOP, lacks=("uvicorn",))))
    monkeypatch.setattr(os, "execv", None)
    for folder, message in ((folders["rtn"], "needs uvicorn"), (source, "not a checkpoint")):
        result = CliRunner().invoke(app, ["serve", str(folder)])
        assert result.exit_code == 2 and message in result.stderr
