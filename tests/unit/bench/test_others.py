"""Products of others beside ours, with plain code in the place of theirs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import absent_others, bench_kernels, others
from mxrot.bench.others import Other
from mxrot.formats import BlockScales, QTensor, get_format
from mxrot.kernels.plain import PackedRows, plain_rotate_quantize_packed

CPU = torch.device("cpu")
FORMAT = get_format("mxfp4")
FP4 = "vllm.model_executor.layers.quantization.utils.marlin_utils_fp4"


def values(codes: Tensor, scales: Tensor) -> Tensor:
    return QTensor.dequantize_packed(codes, BlockScales(scales.view(torch.uint8), FORMAT.scale), FORMAT)


@pytest.fixture
def marlin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A package vllm whose Marlin turns the codes over, as the real one puts them in an order of its own."""
    names = FP4.split(".")
    modules = {".".join(names[: place + 1]): ModuleType(names[place]) for place in range(len(names))}
    for name, module in modules.items():
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, module)
    found: Any = modules[FP4]

    def prepare(layer: Any) -> None:
        assert layer.weight.shape == (layer.output_size_per_partition, layer.input_size_per_partition // 2)
        assert layer.params_dtype == torch.bfloat16
        layer.weight = torch.nn.Parameter(layer.weight.flip(0), requires_grad=False)
        layer.workspace = "a workspace"

    def apply(x: Tensor, weight: Tensor, scales: Tensor, whole: None, workspace: str, n: int, k: int) -> Tensor:
        assert workspace == "a workspace" and x.shape[1] == k and len(weight) == n
        return (x.float() @ values(weight.flip(0), scales).T).to(x.dtype)

    found.prepare_fp4_layer_for_marlin, found.apply_fp4_marlin_linear = prepare, apply
    monkeypatch.setattr(Other, "absent", lambda self, device: None if self.package == "vllm" else "not here")
    return found


def rows_of(told: Callable[[str], None] = lambda line: None) -> list[Any]:
    return [row for row in bench_kernels(CPU, [(64, 96)], [4], told) if row.kernel.startswith("W4A16")]


@pytest.mark.usefixtures("marlin")
def test_marlin_is_measured_beside_the_others() -> None:
    (row,) = rows_of()
    assert (row.kernel, row.shape, row.holds) == ("W4A16, Marlin", (4, 64, 96), True)
    assert row.seconds is not None and 0 < row.error < 2.0**-7


def test_a_wrong_product_has_no_speed(marlin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = marlin.apply_fp4_marlin_linear
    monkeypatch.setattr(marlin, "apply_fp4_marlin_linear", lambda *given: 1.1 * right(*given))
    (row,) = rows_of()
    assert row.seconds is None and not row.holds


@pytest.mark.parametrize("broken", ["prepare_fp4_layer_for_marlin", "apply_fp4_marlin_linear"])
def test_what_fails_is_told_and_ours_are_measured(broken: str, marlin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(marlin, broken, fail)
    said: list[str] = []
    assert rows_of(said.append) == []
    (line,) = [line for line in said if line.startswith("W4A16")]
    assert "not measured: RuntimeError: no kernel image" in line


def test_humming_is_asked_for_the_rows_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class HummingLayer:
        def __init__(self, **given: Any) -> None:
            assert (given["shape_n"], given["shape_k"], given["torch_dtype"]) == (64, 96, torch.bfloat16)

        def load_from_tensors(self, tensors: dict[str, Tensor]) -> None:
            self.weight = values(tensors["weight"].view(torch.uint8), tensors["weight_scale"])

        def transform(self) -> None:
            self.weight = self.weight.T.contiguous()

        def __call__(self, x: Tensor, compute_config: str, tuning_config: str) -> Tensor:
            asked.append((json.loads(compute_config)["gemm_type"], json.loads(tuning_config)))
            return (x.float() @ self.weight).to(x.dtype)

    class HummingLayerMethod:
        @staticmethod
        def get_default_tuning_configs(layer: HummingLayer) -> list[Any]:
            return [[1, 16, "a"], [17, 64, "b"], [65, 9999, "c"]]

    modules = {"humming": ModuleType("humming"), "humming.layer": ModuleType("layer")}
    vars(modules["humming.layer"]).update(HummingLayer=HummingLayer, HummingLayerMethod=HummingLayerMethod)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    weight = plain_rotate_quantize_packed(torch.randn(64, 96), None, FORMAT, FORMAT.rule())
    product = others._humming(weight, [4, 100])
    x = torch.randn(4, 96).to(torch.bfloat16)
    expected = (x.float() @ values(weight.codes, weight.scales).T).to(torch.bfloat16)
    assert torch.equal(product(x), expected)
    assert asked == [("dense", [[1, 16, "a"], [65, 9999, "c"]])]


def test_what_is_absent_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: None)
    expected = {"W4A16, Marlin": "vllm is not installed", "W4A16, Humming": "humming is not installed"}
    assert absent_others(CPU) == expected
    monkeypatch.undo()
    path = tmp_path / "kernels.json"
    options = ["--shape", "64x96", "--rows", "4", "--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "kernels", *options])
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "Marlin" in line]
    assert "W4A16, Marlin is not measured: " in line and "W4A16, Humming is not measured: " in line
    assert set(json.loads(path.read_text())["absent"]) == set(expected)


def test_a_gpu_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(others.importlib.util, "find_spec", lambda name: ModuleSpec(name, None))
    assert set(absent_others(CPU).values()) == {"it wants a GPU, and this is cpu"}
    assert absent_others(torch.device("cuda")) == {}


def test_nothing_is_prepared_of_what_is_absent() -> None:
    weight = PackedRows(torch.zeros(64, 48, dtype=torch.uint8), torch.zeros(64, 3, dtype=torch.uint8))
    assert others.prepared_others([weight], [1], lambda line: None) == {}
