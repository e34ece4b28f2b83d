"""All problems at once, and the first of them from `quantize`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import tiny_config, write_tiny_model
from tests.unit.checkpoint.folders import recipe

from mxrot.calibration import spreading
from mxrot.calibration.spreading import Room
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import ConfigError, FamilyError
from mxrot.layers import build_apart
from mxrot.models import FAMILIES
from mxrot.quantizing.problems import find_problems, memory_problem
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe


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


def writing_of(chosen: Recipe) -> WritingSizes:
    family = FAMILIES["llama"]
    return WritingSizes.of(build_apart(tiny_config()), family, chosen.calibration, (4, 32), torch.float16)


def test_memory_is_a_problem_only_where_the_whole_original_runs() -> None:
    """To write text it may be spread over main memory; to be tuned to, or measured by, it may not."""
    plain, tuned = recipe("mxrot"), recipe("mxrot-tuned", tuning__generated=0.0)
    needed = writing_of(plain).weights
    for chosen, free, host, is_problem in (
        (plain, needed, 10 * needed, False),
        (plain, needed, needed / 10, True),
        (plain, 2 * needed, 0.0, False),
        (tuned, needed, 10 * needed, True),
        (tuned, 2 * needed, 0.0, False),
        (recipe("mxrot", choice__candidates=["transform.open=0.0"]), needed, 10 * needed, True),
        (recipe("mxrot", calibration__generated=0.0), 0.0, 0.0, False),
        (recipe("rtn", calibration__generated=1.0), 0.0, 0.0, False),
    ):
        room = Room(("cuda:0",), (free,), host)
        problem = memory_problem(chosen, writing_of(chosen), "cuda", room)
        assert (problem is not None) == is_problem, (chosen.name, free, host)
        assert memory_problem(chosen, writing_of(chosen), "cuda", None) is None


def test_writing_is_named_as_a_remedy_only_where_it_helps() -> None:
    chosen = recipe("mxrot-tuned", tuning__generated=0.0)
    needed = writing_of(chosen).weights
    for host, remedies in ((10 * needed, 'set tuning.scope = "block"'), (0.0, "set calibration.generated = 0 and tun")):
        problem = memory_problem(chosen, writing_of(chosen), "cuda", Room(("cuda:0",), (needed,), host))
        assert problem is not None and remedies in str(problem)
        assert ("calibration" in str(problem)) == (host == 0.0)


def test_a_spread_model_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe("mxrot")
    needed = writing_of(chosen).weights
    monkeypatch.setattr(spreading, "find_spec", lambda name: None)
    for free, is_problem in ((2 * needed, False), (needed, True)):
        problem = memory_problem(chosen, writing_of(chosen), "cuda", Room(("cuda:0",), (free,), 10 * needed))
        assert (problem is not None) == is_problem
