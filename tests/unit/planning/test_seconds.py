"""Time is counted work over measured rates."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config, tiny_mixture
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import LLAMA_3_8B, run_of

from mxrot.planning import Rates, TimeEstimate, estimate_seconds, measure_rates, rates

ONES = Rates(**{item.name: 1.0 for item in fields(Rates)})
FAST = Rates(**{item.name: 1e15 for item in fields(Rates)})


def seconds(name: str, measured: Rates = ONES, config: Any = LLAMA_3_8B, windows: int = 128) -> TimeEstimate:
    return estimate_seconds(run_of(config, recipe(name), windows, 2048, device="cuda"), measured, 0.5)


def test_terms_of_a_recipe() -> None:
    assert set(seconds("rtn").terms) == {"rounding", "files", "starting"}
    assert set(seconds("duquant++-gptq").terms) == {
        *("passes over the calibration text", "statistics of the inputs", "transforms"),
        *("factors of the Hessians", "rounding", "files", "starting", "states to main memory and back"),
    }
    chosen = run_of(LLAMA_3_8B, recipe("mxrot", permutation="none"), 128, 2048, device="cuda")
    found = set(estimate_seconds(chosen, ONES, 0.5).terms)
    assert found - set(seconds("duquant++-gptq").terms) == {"writing calibration text", "choices by site"}
    assert set(seconds("mxrot-tuned").terms) - set(seconds("mxrot").terms) == {
        *("tuning", "writing text to tune on"),
    }
    refitted = estimate_seconds(run_of(LLAMA_3_8B, recipe("mxrot", refit__damping=0.01), 128, 2048), ONES, 0.5)
    assert set(refitted.terms) - set(seconds("mxrot").terms) == {"refits of transforms"}
    assert set(seconds("quarot").terms) - set(seconds("duquant++-gptq").terms) == {"rotations"}
    permuted = recipe("rtn", permutation__ffn="correlated")
    found = estimate_seconds(run_of(LLAMA_3_8B, permuted, 128, 2048, device="cuda"), ONES, 0.5)
    assert {"order of channels", "passes over the calibration text"} <= set(found.terms) - set(seconds("rtn").terms)
    assert seconds("mxrot").total == sum(seconds("mxrot").terms.values())


def test_products_of_the_passes_are_those_of_the_linears_and_attention() -> None:
    """duquant++: one pass as the block was, for smoothing, and one with each site quantized."""
    only = replace(FAST, product=1.0)
    found = seconds("duquant++", only).terms["passes over the calibration text"]
    tokens, block = 128 * 2048, 4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336
    attention = 2 * 2 * tokens * 2048 * 4096
    assert found == pytest.approx(32 * 2 * (2 * tokens * block + attention), rel=1e-6)


def test_a_factor_for_each_site_and_two_where_there_is_a_target() -> None:
    only = replace(FAST, factor=1.0)
    one = 32 * (3 * 4096**3 + 14336**3)
    assert seconds("duquant++-gptq", only).terms["factors of the Hessians"] == pytest.approx(one, rel=1e-6)
    assert seconds("mxrot", only).terms["factors of the Hessians"] == pytest.approx(2 * one, rel=1e-6)


def test_choices_take_a_factor_for_each_option_and_kind_of_text() -> None:
    """Infinity stands for no regression, and needs none."""
    only = replace(FAST, factor=1.0)
    one = 32 * (3 * 4096**3 + 14336**3)
    options = {"rounding__target_dampings": (1.0, 3.0, math.inf), "rounding__dampings": (0.1, 0.3, 1.0)}
    for generated, kinds in ((1.0, 2), (0.0, 1)):
        chosen = recipe("mxrot", calibration__generated=generated, **options)
        found = estimate_seconds(run_of(LLAMA_3_8B, chosen, 128, 2048, device="cuda"), only, 0.0)
        assert found.terms["choices by site"] == pytest.approx(kinds * (2 + 3) * one, rel=1e-4)


def test_first_tokens_that_the_model_draws_take_longer() -> None:
    """Twice 16 tokens more of each sequence of 256, or of every other one."""
    only = replace(FAST, product=1.0)
    found = [
        estimate_seconds(run_of(LLAMA_3_8B, recipe("mxrot", calibration__first=first), 128, 2048), only, 0.0)
        for first in ("uniform", "both", "model")
    ]
    none, some, all_of_it = (estimate.terms["writing calibration text"] for estimate in found)
    assert some / none == pytest.approx(1 + 16 / 256, rel=1e-6)
    assert all_of_it / none == pytest.approx(1 + 32 / 256, rel=1e-6)


def test_work_grows_with_blocks_and_with_text() -> None:
    longer = type(LLAMA_3_8B)(**LLAMA_3_8B.to_dict() | {"num_hidden_layers": 64})
    for name in ("passes over the calibration text", "statistics of the inputs", "rounding"):
        once = seconds("mxrot").terms[name]
        assert seconds("mxrot", config=longer).terms[name] == pytest.approx(2 * once)
    passes = [seconds("mxrot", windows=count).terms["passes over the calibration text"] for count in (64, 128)]
    assert 1.9 < passes[1] / passes[0] < 2.3


@pytest.mark.parametrize("name", ["rtn", "duquant++", "mxrot", "duquant"])
def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    found = measure_rates(torch.device("cpu"), torch.float32, recipe(name))
    assert all(math.isfinite(value) and value > 0 for value in asdict(found).values())
    config = tiny_config(architectures=["LlamaForCausalLM"])
    estimate = estimate_seconds(run_of(config, recipe(name), 2, 32), found, 0.0)
    assert 0 < estimate.total < 600


def test_two_widths_tell_what_columns_and_what_products_take() -> None:
    widths = (2048, 12288)
    taken = [width / 1e6 + width**3 / 3e13 for width in widths]
    found = rates.factor_rates(widths, taken)
    assert found == pytest.approx({"factor": 3e13, "columns": 1e6})
    for upset in ((1e-3, 1e-4), (1e-4, 1e3)):
        assert all(0 < rate < math.inf for rate in rates.factor_rates(widths, upset).values())


def test_states_go_to_main_memory_where_a_gpu_does_not_keep_them() -> None:
    """Those of one model or of two, seven times for each of 32 blocks."""
    name = "states to main memory and back"
    assert name not in seconds("rtn").terms and name not in seconds("duquant++-gptq", windows=16).terms
    for recipe_name, states in (("duquant++-gptq", 128), ("mxrot", 2 * 2 * 128)):
        expected = 7 * 32 * states * 2048 * 4096 * 2 / 2.5e10
        assert seconds(recipe_name).terms[name] == pytest.approx(expected)


def test_each_expert_takes_small_operations_of_its_own() -> None:
    only = replace(FAST, operations=1.0)
    of_one = seconds("mxrot", only).terms
    config = tiny_mixture("qwen3_moe", num_experts=64, num_experts_per_tok=8).config
    of_many, blocks = seconds("mxrot", only, config).terms, config.num_hidden_layers
    assert of_many["rounding"] / blocks > 2 * 64 * 1100 > 10 * of_one["rounding"] / 32
    assert of_many["order of channels"] / blocks > 64 * 1500
