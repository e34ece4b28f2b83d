"""Views of activations against arithmetic of the test's own on recorded inputs."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.evaluation import ActivationView, activation_views, weight_exponents
from mxrot.evaluation.activations import COLUMNS_SHOWN, FIRST_OCTAVE, _pooled, _Watcher
from mxrot.formats import fake_quantize
from mxrot.layers import QuantLinear, separate_experts
from mxrot.models import find_family
from mxrot.scheme import Scheme

WINDOWS = random_windows(3, 160, seed=5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = write_tiny_model(tmp_path_factory.mktemp("views") / "tiny")
    quantized = mxrot.quantize(folder, recipe("hadamard"))
    assert isinstance(quantized, PreTrainedModel)
    return quantized


def recorded(model: PreTrainedModel, name: str) -> Tensor:
    """Input of one linear on all windows, [3, 160, K]."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(input_ids=window[None])
    hook.remove()
    return torch.cat(seen)


def views_of(model: PreTrainedModel, transformed: bool) -> dict[str, ActivationView]:
    family = find_family(model.config, "tiny")
    separate_experts(model)
    scheme = Scheme.of(recipe("hadamard"), family, model)
    return activation_views(model, family, WINDOWS, scheme, transformed=transformed)


@pytest.mark.parametrize("transformed", [False, True])
def test_views_are_what_a_loop_finds(model: PreTrainedModel, transformed: bool) -> None:
    name = "model.layers.1.mlp.down_proj"
    found = views_of(model, transformed)[name]
    x = recorded(model, name).double()
    linear = model.get_submodule(name)
    assert isinstance(linear, QuantLinear) and linear.transform is not None
    if transformed:
        x = (x.unflatten(-1, (-1, 32)) @ linear.transform.matrices().double()).flatten(-2)
    assert found.channels == 96
    torch.testing.assert_close(found.magnitudes, x[0, :128].abs().float(), rtol=1e-5, atol=1e-6)
    assert found.largest == pytest.approx(float(x.abs().max()), rel=1e-5)
    torch.testing.assert_close(found.channel_maxima, x.abs().amax(dim=(0, 1)).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.token_maxima, x.abs().amax(dim=-1).flatten().float(), rtol=1e-5, atol=1e-6)
    shown = x[0, :128].abs()
    assert found.median == pytest.approx(float(shown[shown > 0].median()), rel=1e-5)
    blocks = [block for token in x.flatten(0, 1) for block in token.split(32)]
    crests = [float(block.abs().max() / block.square().mean().sqrt()) for block in blocks]
    assert found.crest == pytest.approx(sum(crests) / len(crests), rel=1e-5)
    counts = [0] * len(found.block_maxima)
    for block in blocks:
        counts[math.floor(4 * math.log2(block.abs().max())) - 4 * FIRST_OCTAVE] += 1
    moved = (found.block_maxima - torch.tensor(counts)).abs().sum()
    assert moved <= 4, "but for blocks on the edge of a bin"
    assert int(found.block_maxima.sum()) == len(blocks)
    rounded = fake_quantize(x.float(), linear.weights.format).double()
    errors = (rounded - x).norm(dim=-1) / x.norm(dim=-1)
    assert found.rounding_error == pytest.approx(float(errors.mean()), rel=1e-3)


def test_every_site_has_a_view_but_not_what_is_ignored(model: PreTrainedModel) -> None:
    family = find_family(model.config, "tiny")
    names = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    expected = [f"model.layers.{index}.{name}" for index in (0, 1) for name in names]
    assert list(activation_views(model, family, WINDOWS[:1], Scheme.of(recipe("rtn"), family, model))) == expected
    left = recipe("rtn", activations="none", ignore=["q_proj", "model.layers.0.mlp.down_proj"])
    ignored = activation_views(model, family, WINDOWS[:1], Scheme.of(left, family, model))
    changed = [name.replace("q_proj", "k_proj") for name in expected if name != "model.layers.0.mlp.down_proj"]
    assert list(ignored) == changed
    assert all(view.rounding_error is None for view in ignored.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_pooling_keeps_the_largest() -> None:
    wide = torch.rand(3, 4 * COLUMNS_SHOWN - 2)
    wide[1, 777] = 9.0
    shown = _pooled(wide)
    assert shown.shape == (3, COLUMNS_SHOWN)
    assert float(shown[1, 777 // 4]) == 9.0
    assert float(shown[2, -1]) == float(wide[2, 4 * (COLUMNS_SHOWN - 1) :].max())
    assert torch.equal(_pooled(wide[:, :COLUMNS_SHOWN]), wide[:, :COLUMNS_SHOWN])


def test_zeros_are_no_blocks_and_an_identity_changes_nothing() -> None:
    quantizer = recipe("rtn").activations
    assert quantizer is not None
    watcher = _Watcher(nn.Identity(), quantizer.quantizer())
    watcher.update(torch.zeros(1, 2, 64))
    empty = watcher.view()
    assert (empty.largest, empty.median, empty.rounding_error) == (0, 1, 0) and math.isnan(empty.crest)
    assert int(empty.block_maxima.sum()) == 0
    x = torch.zeros(1, 2, 64)
    x[0, 0, 3] = 2.0**-20
    watcher.update(x)
    assert int(watcher.view().block_maxima[4 * (-20 - FIRST_OCTAVE)]) == 1
    assert watcher.view().crest == pytest.approx(math.sqrt(32))


def test_exponents_are_those_in_the_file(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    mxrot.quantize(folder, recipe("rtn", ignore=["v_proj"]), tmp_path / "out")
    model = mxrot.load(tmp_path / "out", device="cpu")
    found = weight_exponents(model, find_family(model.config, "tiny"))
    expected: dict[str, list[int]] = {}
    sites = {"q_proj": "qkv", "k_proj": "qkv", "o_proj": "o", "gate_proj": "gate_up", "up_proj": "gate_up"}
    for name, value in model.state_dict().items():
        if name.endswith(".weight_scale"):
            site = sites.get(name.split(".")[-2], "down")
            counts = expected.setdefault(site, [0] * 256)
            for byte in value.flatten().tolist():
                counts[byte] += 1
    assert {site: counts.tolist() for site, counts in found.items()} == expected


def test_experts_have_views_of_the_tokens_sent_to_them(tmp_path: Path) -> None:
    """One of all tokens for gate and up, and none for an expert that gets no token."""
    folder = write_tiny_mixture(tmp_path / "tiny", "qwen3_moe")
    quantized = mxrot.quantize(folder, recipe("hadamard"), device="cpu")
    assert isinstance(quantized, PreTrainedModel)
    for model in (quantized, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)):
        views = views_of(model, transformed=model is quantized)
        place = "model.layers.0.mlp.experts"
        assert {name for name in views if place in name} == {
            f"{place}.0.gate_proj",
            *(f"{place}.{number}.down_proj" for number in range(3)),
        }
        assert views[f"{place}.0.gate_proj"].magnitudes.shape == (128, 64)
        assert views[f"{place}.0.down_proj"].channels == 96
    counts = weight_exponents(quantized, find_family(quantized.config, "tiny"))
    assert counts.keys() == {"qkv", "o", "gate_up", "down"}
    assert int(counts["down"].sum()) == 2 * 4 * 64 * 96 // 32
