"""gpt-oss: experts as transformers holds them and apart, sinks, and bounds that count."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.errors import ConfigError
from mxrot.layers import separate_experts
from mxrot.models import FAMILIES, FolderSource, find_family
from mxrot.quantizing.loading import load_original

IDS = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))


def tiny(limit: float = 0.05) -> PreTrainedModel:
    torch.manual_seed(0)
    config = config_of(FAMILIES["gpt_oss"], swiglu_limit=limit)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    spread_gains(model, find_family(config, "here"))
    for name, parameter in model.named_parameters():
        if name.endswith(("_proj_bias", "router.bias")):
            parameter.uniform_(-0.1, 0.1)
    return model


def test_experts_apart_compute_what_transformers_computes() -> None:
    """In float64, where bounds are reached; other bounds and other biases give something else."""
    model = tiny().double()
    apart = deepcopy(model)
    separate_experts(apart)
    model.set_experts_implementation("eager")
    expected = model(IDS).logits
    torch.testing.assert_close(apart(IDS).logits, expected, rtol=1e-12, atol=1e-12)
    experts = apart.model.layers[0].mlp.experts
    experts[0].together.limit = 7.0  # one module for all
    assert not torch.allclose(apart(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    experts[0].together.limit = 0.05
    for expert in experts:
        expert.up_proj.bias += 0.01
    assert not torch.allclose(apart(IDS).logits, expected, rtol=1e-12, atol=1e-12)


def test_the_two_layouts_are_one_and_the_other(tmp_path: Path) -> None:
    """gate has the even columns and up the odd ones."""
    model = tiny()
    model.save_pretrained(tmp_path)
    source = FolderSource(tmp_path)
    block, fused = source.block(1), model.model.layers[1].mlp.experts
    inside = "mlp.experts.3."
    assert torch.equal(block[f"{inside}gate_proj.weight"], fused.gate_up_proj[3, :, ::2].T)
    assert torch.equal(block[f"{inside}up_proj.bias"], fused.gate_up_proj_bias[3, 1::2])
    assert torch.equal(block[f"{inside}down_proj.weight"], fused.down_proj[3].T)
    assert torch.equal(block[f"{inside}down_proj.bias"], fused.down_proj_bias[3])
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in block.values())
    loaded = load_original(source, torch.float32, torch.device("cpu"))
    assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits)


@pytest.mark.parametrize("skip", [[], ["down"]])
def test_no_scale_passes_its_bounds(tmp_path: Path, skip: list[str]) -> None:
    tiny().half().save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    chosen = recipe("duquant++", smoothing__skip=skip)
    if not skip:
        with pytest.raises(ConfigError, match="'down_0' of family gpt_oss has nothing before it that can take"):
            write(tmp_path / "in", tmp_path / "out", chosen, windows=IDS)
        return
    write(tmp_path / "in", tmp_path / "out", chosen, windows=IDS)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(loaded(IDS).logits, other(IDS).logits)
