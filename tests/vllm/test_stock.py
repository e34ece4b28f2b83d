"""What stock vLLM does with a checkpoint, as far as its Python code goes on a CPU; `mxrot export` says the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tests.unit.checkpoint.folders import TOKENS, all_tensors
from tests.unit.checkpoint.folders import logits as own_logits
from tests.vllm import plain_vllm
from tests.vllm.plain_vllm import PlainKernel, configure, load, logits
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW4A4Mxfp4
from vllm.model_executor.layers.quantization.compressed_tensors.transform.linear import (
    CompressedTensorsLinearTransformMethod,
)
from vllm.model_executor.model_loader import weight_utils

import mxrot
from mxrot.layers import QuantLinear
from mxrot.layers.product import applied_matrices
from mxrot.vllm.verdict import check_for_vllm

Checkpoints = Callable[[str], Path]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parts_of(name: str) -> list[str]:
    """The linears of a checkpoint that make up one of vLLM's, by full names."""
    parent, _, last = name.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(last, (last,))]


def linears_of(model: Any) -> dict[str, Any]:
    """vLLM's quantized linears by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "scheme")}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(scope="module")
def site(exported: Checkpoints) -> tuple[Path, Any]:
    """A checkpoint with one matrix a site, exported, and vLLM's model of it in bfloat16."""
    folder = exported("site")
    return folder, load(configure(folder, "bfloat16"))


def test_scheme_and_transform_of_each_linear(site: tuple[Path, Any]) -> None:
    _, model = site
    assert isinstance(model.model.layers[0].self_attn.qkv_proj.quant_config, CompressedTensorsConfig)
    found = linears_of(model)
    assert len(found) == 2 * 4
    for linear in found.values():
        assert isinstance(linear.quant_method, CompressedTensorsLinearTransformMethod)
        assert isinstance(linear.scheme, CompressedTensorsW4A4Mxfp4)
    assert not hasattr(model.lm_head, "scheme")


def test_the_scheme_follows_from_the_weights_alone(exported: Checkpoints) -> None:
    table = json.loads((exported("weights-only") / "config.json").read_text())["quantization_config"]
    assert table["config_groups"]["group_0"]["input_activations"] is None
    config = CompressedTensorsConfig.from_config(table)
    scheme = config._get_scheme_from_parts(config.target_scheme_map["Linear"]["weights"], None)
    assert isinstance(scheme, CompressedTensorsW4A4Mxfp4)


def test_codes_and_scales_land_in_their_rows(site: tuple[Path, Any]) -> None:
    folder, model = site
    stored = all_tensors(folder)
    for name, linear in linears_of(model).items():
        parts = parts_of(name)
        assert torch.equal(linear.weight, torch.cat([stored[f"{part}.weight_packed"] for part in parts]))
        assert torch.equal(linear.weight_scale, torch.cat([stored[f"{part}.weight_scale"] for part in parts]))


def test_the_transform_is_the_one_that_weights_were_folded_against(site: tuple[Path, Any]) -> None:
    folder, model = site
    own = mxrot.load(folder)
    for name, linear in linears_of(model).items():
        ours = own.get_submodule(parts_of(name)[0])
        partitions = linear.quant_method.input_transform.weight.partitions
        assert len(partitions) == len(parts_of(name))
        for applied in partitions.values():
            assert torch.equal(applied, applied_matrices(ours.transform.weight)[0])
            assert not torch.equal(applied, applied.T)
        x = torch.randn(64, ours.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        rounded = ours.transform(x).to(torch.bfloat16)
        # The same sums of 32 products, rounded once; in another order where a value lies between two.
        assert relative_error(linear.quant_method.input_transform(x), rounded) < 1e-3


@pytest.mark.parametrize("quantizes_inputs", [True, False])
def test_linears_are_ours_on_the_rounded_input(
    site: tuple[Path, Any], quantizes_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative error at most 1e-3 in bfloat16, given the transformed input as vLLM rounds it."""
    monkeypatch.setattr(PlainKernel, "quantizes_inputs", quantizes_inputs)
    folder, model = site
    own = mxrot.load(folder)
    for name, linear in linears_of(model).items():
        parts = [own.get_submodule(part) for part in parts_of(name)]
        x = torch.randn(64, parts[0].in_features, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        transformed = linear.quant_method.input_transform(x)
        assert relative_error(linear.quant_method.apply(linear, x), without_transform(parts, transformed)) < 1e-3


def without_transform(parts: list[QuantLinear], x: Tensor) -> Tensor:
    """The products of these linears with an input that is transformed already."""
    found = []
    for part in parts:
        activations = part.activations if PlainKernel.quantizes_inputs else None
        inputs = x.float() if activations is None else activations(x)
        found.append((inputs @ part.dequantized_weight().T).to(x.dtype))
    return torch.cat(found, dim=-1)


def test_logits_without_a_transform_are_ours(checkpoint: Checkpoints) -> None:
    folder = checkpoint("plain")
    config = configure(folder, "float32")
    assert torch.equal(logits(load(config), config, TOKENS), own_logits(mxrot.load(folder)))


def test_logits_with_transforms_and_unquantized_activations(
    site: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, as W4A16 hardware: no further from ours in bfloat16 than that is from ours in float32, times two."""
    monkeypatch.setattr(PlainKernel, "quantizes_inputs", False)
    folder, model = site
    ours = []
    for dtype in (torch.bfloat16, torch.float32):
        own = mxrot.load(folder, dtype=dtype)
        for module in own.modules():
            if isinstance(module, QuantLinear):
                module.activations = None
        ours.append(own_logits(own).float())
    inherent = relative_error(ours[0], ours[1])
    assert inherent < 0.02
    assert relative_error(logits(model, configure(folder, "bfloat16"), TOKENS), ours[1]) < 2 * inherent


RUNS = [
    "plain",
    "site",
    "weights-only",
    "ignores-down",
    "plain-bias",
    "one-for-all-blocks",
    "mistral",
    "qwen3",
    "plain-phi3",
]


@pytest.mark.parametrize("kind", RUNS)
def test_what_the_check_lets_through_runs(kind: str, checkpoint: Checkpoints, exported: Checkpoints) -> None:
    assert check_for_vllm(checkpoint(kind)).stock.stops == ()
    config = configure(exported(kind), "auto")
    assert (config.model_config.quantization, config.model_config.dtype) == ("compressed-tensors", torch.bfloat16)
    model = load(config)
    assert torch.isfinite(logits(model, config, TOKENS)).all()
    if kind == "ignores-down":
        assert isinstance(model.model.layers[0].mlp.down_proj.quant_method, UnquantizedLinearMethod)


STOPS = {"block": AssertionError, "bias": AssertionError, "qwen2": AssertionError, "phi3": KeyError}


@pytest.mark.parametrize("kind", STOPS)
def test_what_the_check_stops_fails(kind: str, checkpoint: Checkpoints, exported: Checkpoints) -> None:
    assert check_for_vllm(checkpoint(kind)).stock.stops
    config = configure(exported(kind), "bfloat16")
    with pytest.raises(STOPS[kind]):
        logits(load(config), config, TOKENS)


OWN = ["site", "block", "blocks-of-16", "weights-only", "mixture", "other-formats", "whole-rows", "tensor-scale"]


@pytest.mark.parametrize("kind", OWN)
def test_mxrots_own_form_is_refused_before_weights_are_read(
    kind: str, checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_utils, "safe_open", None)
    runs = kind in ("site", "weights-only")
    assert check_for_vllm(checkpoint(kind)).stock.needs_export is runs
    assert bool(check_for_vllm(checkpoint(kind)).stock.stops) is not runs
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        load(configure(checkpoint(kind), "bfloat16"))


def test_a_part_of_a_site_that_is_not_quantized_stops_both(checkpoint: Checkpoints, tmp_path: Path) -> None:
    from tests.unit.checkpoint.folders import recipe, write

    source = checkpoint("site").parent / "source-site"
    write(source, tmp_path / "part", recipe("rtn", ignore=["k_proj"]))
    report = check_for_vllm(tmp_path / "part")
    assert "k_proj is not quantized" in report.stock.stops[0] and report.plugin.stops
    with pytest.raises(ValueError, match="shards"):
        load(configure(tmp_path / "part", "bfloat16"))


def test_transforms_refuse_two_devices(exported: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_for_vllm(exported("site")).stock.tensor_parallel == (1,)
    monkeypatch.setattr(plain_vllm.transform_module, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="tensor parallelism"):
        load(configure(exported("site"), "bfloat16"))
