"""Channel maxima of the sites against hooks of the test's own."""

from __future__ import annotations

import math

import pytest
import torch
from tests.tiny_model import EXPERT_MODELS, random_windows, tiny_config, tiny_mixture
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mxrot.evaluation import SiteMaxima, site_maxima
from mxrot.models import find_family

FIRST_LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(architectures=["LlamaForCausalLM"])).eval()


def recorded_inputs(model: PreTrainedModel, windows: Tensor) -> dict[str, Tensor]:
    """Input [tokens, K] of every linear, by its name."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for window in windows:
            model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat([x.flatten(0, -2) for x in inputs]) for name, inputs in seen.items()}


def test_are_those_of_direct_hooks(model: LlamaForCausalLM) -> None:
    windows = random_windows(3, 16)
    expected = recorded_inputs(model, windows)
    found = site_maxima(model, find_family(model.config, "tiny"), windows)
    assert [site.site for site in found] == [f"model.layers.{i}.{name}" for i in (0, 1) for name in FIRST_LINEARS]
    for site in found:
        maxima = expected[site.site].abs().amax(dim=0)
        assert site.channels == len(maxima)
        assert site.largest == float(maxima.max())
        assert site.channel == int(maxima.argmax())
        assert site.median == float(maxima.median())
        assert site.ratio == site.largest / site.median > 1


def test_finds_the_channel_that_sticks_out(model: LlamaForCausalLM) -> None:
    model.model.layers[1].post_attention_layernorm.weight.data[37] = 500.0
    found = {site.site: site for site in site_maxima(model, find_family(model.config, "tiny"), random_windows(2, 16))}
    outlier = found["model.layers.1.mlp.gate_proj"]
    assert outlier.channel == 37
    assert outlier.ratio > 100


def test_leaves_no_hook_behind(model: LlamaForCausalLM) -> None:
    site_maxima(model, find_family(model.config, "tiny"), random_windows(1, 8))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_tells_its_progress_in_windows(model: LlamaForCausalLM) -> None:
    told: list[tuple[int, int, str]] = []
    site_maxima(
        model, find_family(model.config, "tiny"), random_windows(3, 8), 2, progress=lambda *news: told.append(news)
    )
    assert told == [(0, 3, "windows"), (2, 3, "windows")]


def test_a_site_without_input_has_an_infinite_ratio() -> None:
    assert math.isinf(SiteMaxima("site", 4, largest=1.0, channel=0, median=0.0).ratio)


@pytest.mark.parametrize("kind", EXPERT_MODELS)
def test_of_experts_the_one_that_sticks_out_most_is_shown(kind: str) -> None:
    """Whether all experts are in one tensor or apart; one that no token is sent to has no maxima."""
    windows = random_windows(3, 16)
    model = tiny_mixture(kind).requires_grad_(False)
    family = find_family(model.config, "tiny")
    found = {site.site: site for site in site_maxima(model, family, windows)}
    expected = recorded_inputs(model, windows)
    assert len(found) == 2 * 4
    for index in (0, 1):
        prefix = f"{family.block_prefix(index)}."
        _, _, of_experts, *downs = (prefix + site.linears[0] for site in family.sites_of(index))
        gate_up, names = found[of_experts], [name for name in downs if name in expected]
        assert len(names) >= 2 and downs[-1] not in names[: 4 * (index == 0)]
        inputs = [expected[name.rpartition(".")[0] + "." + family.experts.linears[0]] for name in names]
        assert gate_up.largest == float(torch.cat(inputs).abs().max())
        maxima = {name: expected[name].abs().amax(dim=0) for name in names}
        ratios = {name: float(x.max() / x.median()) for name, x in maxima.items()}
        (shown,) = [name for name in names if name in found]
        assert shown == max(ratios, key=lambda name: ratios[name])
        assert found[shown].ratio == pytest.approx(ratios[shown])
