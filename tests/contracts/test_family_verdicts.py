"""What vLLM would do with a planned checkpoint, and what it does with the one that is written: one answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.contracts.test_families import TINY_FAMILIES, each
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, windows_for, write
from transformers import AutoModelForCausalLM

from mxrot.checkpoint.config import native_config
from mxrot.checkpoint.contents import install_linears
from mxrot.checkpoint.layout import read_layout
from mxrot.layers import build_apart
from mxrot.models import Family, read_config
from mxrot.recipe import load_recipe
from mxrot.scheme import Scheme
from mxrot.vllm.facts import Facts, of_model
from mxrot.vllm.verdict import ARCHITECTURES, FUSED, check_for_vllm, judge, plan_for_vllm

RECIPES = ("rtn", "hadamard", "mxrot", "mxrot-vllm")
RUN_BY_STOCK = {"rtn": True, "hadamard": True, "mxrot": False, "mxrot-vllm": True}


@each
@pytest.mark.parametrize("name", RECIPES)
def test_a_plan_is_told_what_its_checkpoint_is(family: Family, name: str) -> None:
    """The written side from its config alone: what `native_config` says, read back and installed."""
    chosen, config = load_recipe(name), config_of(family)
    planned = plan_for_vllm(build_apart(config), family, chosen)
    skeleton = build_apart(config)
    scheme = Scheme.of(chosen, family, skeleton)
    layout = read_layout(native_config(scheme, family, torch.bfloat16))
    read = layout.scheme(family, config.get_text_config().num_hidden_layers)
    install_linears(skeleton, family, read)
    assert judge(of_model(skeleton, family, read, layout.is_native)) == planned
    tried = family.architectures[0] in ARCHITECTURES
    if family.experts is not None or family.beside is not None or family.attention_in:
        assert planned.stock.stops and planned.plugin.stops
    elif name == "rtn":
        assert not planned.stock.stops and not planned.stock.needs_export and not planned.plugin.stops
    else:
        assert bool(planned.plugin.stops) != (tried or family.architectures[0] in FUSED)
        has_bias = any("bias" in stop for stop in planned.stock.stops)
        assert (planned.stock.stops == ()) == (tried and RUN_BY_STOCK[name] and not has_bias)


@pytest.mark.parametrize("family", ["llama", "phi3", "olmo2", "qwen2"])
def test_a_plan_is_told_what_a_folder_is(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of(TINY_FAMILIES[family])
    AutoModelForCausalLM.from_config(config).half().save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    for name in ("rtn", "hadamard"):
        chosen = recipe(name)
        skeleton = build_apart(read_config(tmp_path / "model"))
        planned = plan_for_vllm(skeleton, TINY_FAMILIES[family], chosen)
        write(tmp_path / "model", tmp_path / name, chosen, windows=windows_for(chosen))
        assert check_for_vllm(tmp_path / name) == planned
        planned_scheme = Facts.planned(skeleton, TINY_FAMILIES[family], chosen).scheme
        assert Facts.written(tmp_path / name).scheme == planned_scheme
