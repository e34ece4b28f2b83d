"""All problems at once, and the first of them from `quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import recipe

from mxrot.errors import ConfigError, FamilyError
from mxrot.layers import build_apart
from mxrot.models import FAMILIES
from mxrot.quantizing.problems import find_problems, memory_problem
from mxrot.quantizing.run import quantize


def test_every_problem_is_found_and_quantize_raises_the_first(tmp_path: Path) -> None:
    odd = {"hidden_size": 80, "head_dim": 20, "num_hidden_layers": 2}
    chosen = recipe("duquant++", smoothing__skip=["mlp", "attention"])
    family = FAMILIES["llama"]
    problems = list(find_problems(build_apart(tiny_config(**odd)), family, chosen, "here"))
    texts = [str(problem) for problem in problems]
    assert ["'mlp'" in texts[0], "'attention'" in texts[1]] == [True, True]
    assert [text.split(":")[0] for text in texts[2:]] == [
        f"model.layers.{index}.{linear}"
        for index in range(2)
        for linear in (
            *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
            *("mlp.gate_proj", "mlp.up_proj"),
        )
    ]
    folder = write_tiny_model(tmp_path / "odd", **odd)
    with pytest.raises(ConfigError) as raised:
        quantize(folder, chosen, windows=torch.zeros(2, 8, dtype=torch.int64))
    assert str(raised.value) == texts[0]


def test_a_width_that_no_block_of_the_dual_transform_divides() -> None:
    """Multiples of 32 are taken, by smaller blocks than 128; others are named."""
    family = FAMILIES["llama"]
    assert not list(find_problems(build_apart(tiny_config(intermediate_size=160)), family, recipe("duquant"), "here"))
    found = list(find_problems(build_apart(tiny_config(intermediate_size=104)), family, recipe("duquant"), "here"))
    assert [str(problem) for problem in found] == [
        f"model.layers.{index}.mlp.down_proj: in_features 104 is not a multiple of the block size 32; list it "
        "under `ignore`"
        for index in range(2)
    ]


def test_a_site_without_a_place_for_smoothing_is_named_once() -> None:
    family = FAMILIES["phi3"]
    found = list(find_problems(build_apart(config_of(family)), family, recipe("smoothquant"), "here"))
    assert [problem.args[0].split("'")[1] for problem in found] == ["o", "down"]
    assert not list(find_problems(build_apart(config_of(family)), family, recipe("mxrot"), "here"))


def test_what_is_quantized_already() -> None:
    model = build_apart(tiny_config())
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    (problem,) = find_problems(model, FAMILIES["llama"], recipe("rtn"), "here")
    assert isinstance(problem, FamilyError) and str(problem).startswith("here: is quantized already")


def test_memory_is_a_problem_only_where_the_whole_original_runs() -> None:
    model, cuda = build_apart(tiny_config()), torch.device("cuda")
    needed = sum(parameter.numel() for parameter in model.parameters()) * 2
    for chosen, free, is_problem in (
        (recipe("mxrot"), needed, True),
        (recipe("mxrot"), needed + 1, False),
        (recipe("mxrot"), None, False),
        (recipe("mxrot", calibration__generated=0.0), 0, False),
        (recipe("rtn", calibration__generated=1.0), 0, False),
    ):
        assert (memory_problem(model, chosen, torch.float16, cuda, free) is not None) == is_problem
