"""Experts as modules with linears of their own, beside transformers' tensors of all experts."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny_model import EXPERT_MODELS, random_windows, tiny_mixture, write_tiny_mixture
from torch import nn
from transformers import AutoModelForCausalLM

from mxrot.errors import FamilyError
from mxrot.layers import build_apart, separate_experts
from mxrot.layers.experts import Experts
from mxrot.models import FAMILIES, FolderSource, WeightFiles, check_linears, find_family, read_config
from mxrot.models.families import EXPERTS
from mxrot.quantizing.loading import load_original

each = pytest.mark.parametrize("kind", EXPERT_MODELS)
TOKENS = random_windows(3, 20)


def of_block(folder: Path, index: int = 0) -> dict[str, torch.Tensor]:
    return FolderSource(folder).block(index)


@each
@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1, :1]], ids=["many", "one"])
def test_they_compute_what_transformers_computes(kind: str, tokens: torch.Tensor) -> None:
    """In float64, which only transformers' own loop over experts takes."""
    model = tiny_mixture(kind).double()
    apart = deepcopy(model)
    separate_experts(apart)
    assert not [module for module in apart.modules() if type(module).__name__ in EXPERTS]
    model.set_experts_implementation("eager")
    torch.testing.assert_close(apart(tokens).logits, model(tokens).logits, rtol=1e-12, atol=1e-12)


def test_tokens_meet_only_their_experts_times_their_shares() -> None:
    """Experts that multiply by 1, 10 and 100; the token order is kept, an expert without tokens is not called."""
    experts = Experts(nn.Linear(1, 1, bias=False) for _ in range(4))
    for number, expert in enumerate(experts):
        expert.weight.data.fill_(10.0**number)
    called: list[int] = []
    for number, expert in enumerate(experts):
        expert.register_forward_pre_hook(lambda _, arguments, number=number: called.append(number))
    chosen = torch.tensor([[2, 0], [0, 1], [1, 2]])
    shares = torch.tensor([[0.25, 0.75], [0.5, 0.5], [1.0, 0.0]])
    found = experts(torch.tensor([[1.0], [2.0], [3.0]]), chosen, shares)
    assert found.flatten().tolist() == [25.75, 11.0, 30.0]
    assert called == [0, 1, 2]
    assert experts(torch.zeros(0, 1), chosen[:0], shares[:0]).shape == (0, 1)


@each
def test_both_layouts_on_disk_give_the_same_tensors(tmp_path: Path, kind: str) -> None:
    one = of_block(write_tiny_mixture(tmp_path / "one", kind))
    fused = of_block(write_tiny_mixture(tmp_path / "fused", kind, fused=True))
    stored = WeightFiles(tmp_path / "fused").names
    assert "model.layers.0.mlp.experts.gate_up_proj" in stored and not [name for name in stored if ".experts.0" in name]
    assert one.keys() == fused.keys() and all(torch.equal(one[name], fused[name]) for name in one)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in fused.values())
    skeleton = build_apart(read_config(tmp_path / "one"))
    assert one.keys() == skeleton.get_submodule("model.layers.0").state_dict().keys()


@each
def test_the_original_is_loaded_as_transformers_has_it(tmp_path: Path, kind: str) -> None:
    folder = write_tiny_mixture(tmp_path / "tiny", kind)
    model = load_original(FolderSource(folder), torch.float32, torch.device("cpu"))
    assert [module for module in model.modules() if type(module).__name__ in EXPERTS]
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(model(TOKENS).logits, expected(TOKENS).logits)


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    folder = write_tiny_mixture(tmp_path / "tiny", "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FamilyError, match=r"got no model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight; is the"):
        load_original(FolderSource(folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [1]}, {"decoder_sparse_step": 2}], ids=str)
def test_dense_blocks_among_sparse_ones_have_sites_of_their_own(changes: dict[str, Any]) -> None:
    config = tiny_mixture("qwen3_moe", **changes).config
    model, family = build_apart(config), find_family(config, "here")
    check_linears(model, family, 32)
    dense, sparse = (1, 0) if "mlp_only_layers" in changes else (0, 1)
    assert [site.name for site in family.sites_of(dense)] == ["qkv", "o", "gate_up", "down"]
    assert family.sites_of(dense)[2].linears == ("mlp.gate_proj", "mlp.up_proj")
    assert [site.name for site in family.sites_of(sparse)][2:4] == ["gate_up", "down_0"]
    with pytest.raises(
        FamilyError, match=rf"^model\.layers\.{dense}: has no mlp\.experts\.0\.\w+, which all sparse blo"
    ):
        check_linears(model, find_family(tiny_mixture("qwen3_moe").config, "here"), 32)


@pytest.mark.parametrize(("experts", "each_token"), [(0, 2), (4, 5), (4, 0)])
@each
def test_impossible_numbers_of_experts_are_refused(kind: str, experts: int, each_token: int) -> None:
    config = tiny_mixture(kind).config
    names = FAMILIES[kind].experts
    assert names is not None
    setattr(config, names.count, experts)
    config.num_experts_per_tok = each_token
    with pytest.raises(
        FamilyError, match=rf"^config\.json: expected 1 to {experts} experts a token .*got {each_token}"
    ):
        find_family(config, "here")


@each
def test_sites_of_all_experts(kind: str) -> None:
    """One for gate and up, and one for down of each; together they are called by one name."""
    family = find_family(tiny_mixture(kind).config, "here")
    sites = family.sites_of(1)
    assert [site.name for site in sites] == ["qkv", "o", "gate_up", "down_0", "down_1", "down_2", "down_3"]
    assert [site.group for site in sites] == ["qkv", "o", "gate_up", *["down"] * 4]
    assert [len(site.linears) for site in sites] == [3, 1, 8, 1, 1, 1, 1]
    assert [site.is_of_experts for site in sites] == [False, False, *[True] * 5]
    assert family.group_of(f"model.layers.1.{sites[-1].linears[0]}") == (1, "down")
