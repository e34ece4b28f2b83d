"""Transforms of a quantized cache, fitted to a model: the function stays, and what follows sees what is quantized."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot import quantizing
from mxrot.errors import NumericsError
from mxrot.formats import CacheScheme, TensorQuantizer
from mxrot.layers import cache_scheme_of, restore_cache
from mxrot.models import FAMILIES, find_family
from mxrot.quantizing import cache as rooms
from mxrot.quantizing.cache import fit_cache
from mxrot.recipe import Recipe, load_recipe

WINDOWS = random_windows(6, 24)
TOKENS = random_windows(2, 20, seed=3)
MXFP4 = TensorQuantizer.of("mxfp4")
FITTED = {"cache.keys": "mxfp4", "cache.transform": "second_moment"}
STORED = CacheScheme(MXFP4, MXFP4, key_transform="stored", value_transform="stored")


def model_of(name: str, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(FAMILIES[name], **({"head_dim": 32} | changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values pass as they are."""
    monkeypatch.setattr(TensorQuantizer, "__call__", lambda _, x: x)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gemma2"])
def test_the_function_of_a_running_model_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, but for the matrices, which are float32 and inverted in float64."""
    changes = {"sliding_window": None} if name == "phi3" else {}
    model = model_of(name, **changes).double()
    family = find_family(model.config, name)
    ids = TOKENS % 50
    before = model(ids, use_cache=False).logits
    fit_cache(model, family, WINDOWS % 50, STORED)
    rounded = model(ids, use_cache=False).logits
    unquantized(monkeypatch)
    same = model(ids, use_cache=False).logits
    size = float(before.abs().max())
    exact = 1e-6 if model.config._attn_implementation == "eager" else 1e-9  # softmax is in float32 there
    assert torch.allclose(same, before, rtol=0, atol=exact * size)
    assert not torch.allclose(rounded, before, rtol=0, atol=1e-3 * size)
    for block in model.get_submodule(family.blocks):
        attention = block.get_submodule(family.attention)
        assert cache_scheme_of(attention) == STORED
        restore_cache(attention)
    assert torch.equal(model(ids, use_cache=False).logits, before)


def with_outliers(folder: Path) -> Path:
    """A model whose keys and values have channels of very different sizes, as those of some large models."""
    write_tiny_model(folder, dtype=torch.float32, head_dim=32, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    sizes = torch.logspace(-1, 1, 32)[torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    for block in model.model.layers:
        attention, turns = block.self_attn, sizes.repeat(2)
        turns = torch.cat([sizes[:16], sizes[:16]]).repeat(2)  # RoPE turns channels i and i + 16 together
        for linear, scale in ((attention.k_proj, turns), (attention.v_proj, sizes.repeat(2))):
            linear.weight.data *= 3 * scale[:, None]
            linear.bias.data.normal_().mul_(scale)
        attention.q_proj.weight.data /= turns.repeat(2)[:, None] / 3
        attention.q_proj.bias.data.normal_().div_(turns.repeat(2))
        attention.o_proj.weight.data /= sizes.repeat(4)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_outliers(tmp_path_factory.mktemp("source") / "tiny")


def only_cache(transform: str, **more: Any) -> Recipe:
    """Weights are in eight bits, so that they hardly count."""
    changes = {"weights.format": "mxint8", "activations": "none"}
    return load_recipe("rtn").changed(changes | {"cache.keys": "mxfp4", "cache.transform": transform} | more)


def logits_of(source: Path, recipe: Recipe, seed: int = 0) -> Tensor:
    model = quantizing.quantize(source, recipe, windows=WINDOWS, seed=seed).model
    assert model is not None
    return model(TOKENS, use_cache=False).logits


def test_a_fitted_transform_loses_less_than_a_hadamard_matrix_and_none(source: Path) -> None:
    expected = logits_of(source, only_cache("none").changed({"cache": "none"}))
    errors = [
        float((logits_of(source, only_cache(transform)) - expected).norm())
        for transform in ("second_moment", "hadamard", "none")
    ]
    assert errors[0] < 0.5 * min(errors[1:])


@pytest.mark.parametrize("transform", ["hadamard", "second_moment"])
def test_what_is_folded_is_the_function(source: Path, transform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With quantizers off the weights around the values, and their bias, change nothing."""
    model = quantizing.quantize(source, only_cache(transform), windows=WINDOWS).model
    assert model is not None
    plain = AutoModelForCausalLM.from_pretrained(source).requires_grad_(False)
    values = plain.model.layers[0].self_attn.v_proj.bias
    assert not torch.allclose(model.model.layers[0].self_attn.v_proj.bias, values, atol=0.1)
    unquantized(monkeypatch)
    found, expected = (one(TOKENS, use_cache=False).logits for one in (model, plain))
    assert float((found - expected).norm() / expected.norm()) < 0.02  # of eight bits


def test_rounding_sees_what_the_cache_makes_of_values(source: Path) -> None:
    """The inputs of o_proj, so its Hessian, so its codes."""
    chosen = load_recipe("rtn").changed({"rounding.method": "gptq", "cache.keys": "mxfp4"})
    plain = chosen.changed({"cache": "none"})
    models = [quantizing.quantize(source, one, windows=WINDOWS).model for one in (chosen, plain)]
    first, second = (model.model.layers[0].self_attn for model in models if model is not None)
    assert torch.equal(first.v_proj.weight_packed, second.v_proj.weight_packed)
    assert not torch.equal(first.o_proj.weight_packed, second.o_proj.weight_packed)


@pytest.mark.parametrize("smoothing", [False, True])
def test_an_interrupted_run_ends_in_the_same_bytes(source: Path, tmp_path: Path, smoothing: bool) -> None:
    """Also where the original runs beside, whose weights around the values are folded once more."""
    chosen = load_recipe("mxrot").changed({"calibration.generated": 0.0} | FITTED)
    if smoothing:
        chosen = chosen.changed({"smoothing.alpha": 0.5})
    write(source, tmp_path / "straight", chosen, windows=WINDOWS)

    def progress(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "out", chosen, windows=WINDOWS, progress=progress)
    write(source, tmp_path / "out", chosen, windows=WINDOWS, resume=True)
    assert without_run(digests(tmp_path / "out")) == without_run(digests(tmp_path / "straight"))


def test_values_that_are_turned_already_are_not_turned_again(source: Path) -> None:
    """By [rotation] value_heads: the Hadamard matrix of the cache is for keys alone then."""
    chosen = only_cache("hadamard", **{"rotation.value_heads": "hadamard"})
    assert not chosen.turns_values_for_cache and only_cache("hadamard").turns_values_for_cache
    without = chosen.changed({"cache": "none"})
    models = [quantizing.quantize(source, one).model for one in (chosen, without)]
    first, second = (model.model.layers[1].self_attn for model in models if model is not None)
    assert torch.equal(first.v_proj.weight_packed, second.v_proj.weight_packed)
    assert torch.equal(first.v_proj.bias, second.v_proj.bias)


@pytest.mark.parametrize("changes", [{"tuning.steps": 3}, {"tuning.steps": 3, "tuning.scope": "block"}])
def test_tuning_sees_the_cache(source: Path, changes: dict[str, Any]) -> None:
    """Its losses are those of a model whose cache is quantized."""
    chosen = load_recipe("mxrot").changed(
        {"calibration.generated": 0.0, "tuning.held_out": 0.3, "tuning.batch_windows": 2} | changes
    )
    found = []
    for one in (chosen, chosen.changed({"cache.keys": "mxfp4", "cache.values": "int2_g32_asym"})):
        result = quantizing.quantize(source, one, windows=WINDOWS)
        record = result.record
        checks = record.tuning if record.tuning is not None else record.blocks[0].tuning
        assert checks
        found.append(checks[0].held_out)
    assert found[1] > 1.05 * found[0]


@pytest.mark.parametrize("wrong", ["infinite", "not factorized"])
def test_moments_that_are_no_use_are_an_error_that_names_the_layer(
    source: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    def moments(*_: object) -> tuple[Tensor, Tensor, Tensor]:
        one = torch.eye(32, dtype=torch.float64).repeat(2, 1, 1)
        return one, one * (torch.inf if wrong == "infinite" else -1), one

    monkeypatch.setattr(rooms, "head_moments", moments)
    said = "its keys are so large" if wrong == "infinite" else 'factorized.*set cache.transform = "hadamard"'
    with pytest.raises(NumericsError, match=rf"^model\.layers\.0\.self_attn: .*{said}"):
        quantizing.quantize(source, only_cache("second_moment"), windows=WINDOWS)


def test_fitting_again_takes_the_place_of_what_was_there() -> None:
    model = model_of("llama")
    family = find_family(model.config, "llama")
    for scheme in (STORED, replace(STORED, value_transform="none"), replace(STORED, key_transform="hadamard")):
        fit_cache(model, family, WINDOWS % 50, scheme)
        names = [name for name in model.state_dict() if "transform" in name]
        assert len(names) == 2 * len(scheme.stored_names)


ON_A_GPU = {
    "mxrot-kv4": {},
    "quarot-int4-kv4": {},
    "spinquant-kv4": {"rotation.steps": 3, "rotation.batch_windows": 2},
    "mxrot-tuned": {"tuning.steps": 6, "tuning.generated": 0.0, "tuning.held_out": 0.3, "tuning.batch_windows": 2}
    | FITTED,
}


def exact_logits(folder: Path, device: str) -> torch.Tensor:
    """float64 [2, tokens, vocabulary]."""
    loaded = mxrot.load(folder, device=device, dtype=torch.float64)
    logits: torch.Tensor = loaded(TOKENS.to(device), use_cache=False).logits
    return logits.cpu()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    """Steps of tuning are recorded there, which nothing may wait in; what is written is what was made."""
    source = write_tiny_model(tmp_path / "source", torch.bfloat16, hidden_size=128, intermediate_size=128, head_dim=64)
    changes: dict[str, Any] = {"calibration.generated": 0.0} | ON_A_GPU[name]
    chosen = load_recipe(name).changed(changes)
    result = quantizing.quantize(source, chosen, windows=WINDOWS, device="cuda")
    losses = result.record.rotation_losses or [check.held_out for check in result.record.tuning or []]
    assert all(map(math.isfinite, losses)) and bool(losses) == (name in ("spinquant-kv4", "mxrot-tuned"))
    assert result.model is not None
    expected = result.model(TOKENS.cuda(), use_cache=False).logits
    write(source, tmp_path / "out", chosen, windows=WINDOWS, device="cuda")
    loaded = mxrot.load(tmp_path / "out", device="cuda")
    assert torch.equal(loaded(TOKENS.cuda(), use_cache=False).logits, expected)
    # In bfloat16 sums of another order move codes of this model: on a CPU alone logits are .16 to .19 from float64.
    fast, slow = (exact_logits(tmp_path / "out", device) for device in ("cuda", "cpu"))
    assert float((fast - slow).norm() / slow.norm()) < 1e-5
    options: Any = {"max_new_tokens": 8, "do_sample": False}
    tokens = loaded.generate(TOKENS.cuda(), **options)
    assert tokens.shape == (2, TOKENS.shape[1] + 8)
