"""Models of Mamba blocks and attention: their experts as transformers holds them and apart, names, and what is kept."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import config_of
from tests.float64 import InFloat64
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from transformers import AutoModelForCausalLM, Lfm2MoeConfig, PreTrainedModel

import mxrot
from mxrot.errors import FamilyError
from mxrot.evaluation.perplexity import states_of
from mxrot.layers import separate_experts
from mxrot.models import FAMILIES, FolderSource, find_family
from mxrot.quantizing.loading import load_original

IDS = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(1))
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h": ("nemotron_h", {}),
    "nemotron_h, all channels": ("nemotron_h", {"moe_latent_size": None}),
    "granitemoehybrid": ("granitemoehybrid", {}),
    "lfm2_moe": ("lfm2_moe", {}),
}
each = pytest.mark.parametrize(("name", "changes"), EXPERTS.values(), ids=EXPERTS)


def tiny(name: str, changes: dict[str, Any]) -> PreTrainedModel:
    """Weights that are so large that experts have a say."""
    torch.manual_seed(0)
    config = config_of(FAMILIES[name], **changes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 5
    spread_gains(model, find_family(config, "here"))
    return model


@each
def test_experts_apart_compute_what_transformers_computes(name: str, changes: dict[str, Any]) -> None:
    """In float64; with another expert something else."""
    model = tiny(name, changes).double()
    apart = deepcopy(model)
    separate_experts(apart)
    model.set_experts_implementation("eager")
    with InFloat64():
        expected = model(IDS).logits
        found = apart(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    family = find_family(model.config, "here")
    down = next(site for site in family.sites_of(1) if site.name == "down_0").linears[0]
    apart.get_submodule(f"{family.block_prefix(1)}.{down}").weight.data *= 1.5
    with InFloat64():
        changed = apart(IDS).logits
    assert not torch.allclose(changed, expected, rtol=1e-4, atol=1e-5)


@each
def test_both_layouts_on_disk_are_read(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """As the models are published, and as transformers has them."""
    model = tiny(name, changes)
    for folder, published in (("published", True), ("fused", False)):
        model.save_pretrained(tmp_path / folder, save_original_format=published)
    stored = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("published", "fused")]
    assert stored[0] != stored[1]
    one, other = (FolderSource(tmp_path / folder) for folder in ("published", "fused"))
    tensors, same = one.block(1), other.block(1)
    assert tensors.keys() == same.keys() and all(torch.equal(tensors[key], same[key]) for key in tensors)
    loaded = load_original(one, torch.float32, torch.device("cpu"))
    assert torch.equal(loaded(IDS).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "fused")(IDS).logits)


def test_the_sites_of_experts_in_fewer_channels() -> None:
    """The linear before them reads what the expert of all tokens reads, and they read what it gives."""
    family = find_family(config_of(FAMILIES["nemotron_h"]), "here")
    sites = {site.name: site for site in family.sites_of(1)}
    assert list(sites) == ["up", "expert_up", "down_0", "down_1", "down_2", "down_3", "widen", "shared_down"]
    assert sites["up"].linears == ("mixer.fc1_latent_proj", "mixer.shared_experts.up_proj")
    assert sites["expert_up"].producer == "mixer.fc1_latent_proj"
    assert [name for name, site in sites.items() if site.is_of_experts] == list(sites)[1:6]
    assert [name for name, site in sites.items() if site.writes_residual] == ["widen", "shared_down"]


def test_a_model_without_experts_has_none() -> None:
    """What is not done with experts is done with it."""
    for name, changes in {
        "nemotron_h": {"layer_types": ["linear_attention", "mlp"]},
        "granitemoehybrid": {"num_local_experts": 0},
    }.items():
        assert find_family(config_of(FAMILIES[name], **changes), "here").experts is None
        assert find_family(config_of(FAMILIES[name]), "here").experts is not None


def test_a_config_that_does_not_say_which_blocks_attend_is_refused() -> None:
    config = Lfm2MoeConfig(architectures=["Lfm2MoeForCausalLM"])
    with pytest.raises(FamilyError, match=r"^here: config\.json has no layer_types, which a model of family lfm2_moe"):
        find_family(config, "here")


def test_what_predicts_tokens_further_ahead_is_left_out(tmp_path: Path) -> None:
    """As Nemotron 3 is published: names of transformers' older code, and mtp.* beside them."""
    tiny("nemotron_h", {}).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("backbone.layers.1.mixer.experts.0.") for name in tensors)
    extra = {"mtp.layers.0.eh_proj.weight": torch.zeros(4, 4)}
    save_file(tensors | extra, tmp_path / "model.safetensors", {"format": "pt"})
    source = FolderSource(tmp_path)
    assert source.passed_over.endswith(": 1 tensors that predict tokens further ahead (mtp)")
    assert "mixer.experts.0.up_proj.weight" in source.block(1)


@pytest.mark.parametrize("name", ["bamba", "nemotron_h", "lfm2"])
def test_a_text_in_pieces_gives_the_same_beside_a_quantized_cache(tmp_path: Path, name: str) -> None:
    """Positions and states go on from piece to piece."""
    tiny(name, {}).half().save_pretrained(tmp_path / "in")
    write_tokenizer(tmp_path / "in")
    cache = {"cache__keys": "int4_row_asym", "cache__values": "int4_row_asym", "cache__transform": "none"}
    write(tmp_path / "in", tmp_path / "out", recipe("rtn", **cache), windows=None)
    model = mxrot.load(tmp_path / "out", device="cpu").double()
    with torch.no_grad():
        whole, pieces = states_of(model, IDS), states_of(model, IDS, 16)
        apart = torch.cat([states_of(model, part) for part in IDS.split(16, dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(apart, whole, rtol=1e-2, atol=1e-2)
