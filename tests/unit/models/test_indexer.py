"""Attention to tokens that an indexer chooses, in blocks with an indexer and in those that take the choice before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts.test_families import spread_gains
from tests.contracts.tiny_configs import config_of
from tests.tiny_model import write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.calibration import first_executor
from mxrot.layers import shared_heads
from mxrot.layers.attention import unmasked
from mxrot.models import FAMILIES, Family, PassedOn, find_family
from mxrot.planning import Machine, OtherRates, make_plan
from mxrot.planning.rates import Rates

IDS = torch.randint(0, 50, (5, 40), generator=torch.Generator().manual_seed(0))
"""More tokens than the indexers of tiny models choose, which are 16."""
GLM = FAMILIES["glm_moe_dsa"]
NO_TIME = Machine(torch.device("cpu"), other=OtherRates("none", "cpu", Rates(*[1.0] * len(Rates.__dataclass_fields__))))
INDEXERS = {
    "all": ["full"] * 4,
    "the first": ["full", "shared", "shared", "shared"],
    "every other": ["full", "shared", "full", "shared"],
}
each = pytest.mark.parametrize("indexers", INDEXERS.values(), ids=INDEXERS)


def model_of(indexers: list[str], **changes: Any) -> tuple[PreTrainedModel, Family]:
    """Four blocks, the first without experts, whose attention has a say."""
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 4, "indexer_types": indexers}
    model = AutoModelForCausalLM.from_config(config_of(GLM, **layers | changes)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.data *= 3
    family = find_family(model.config, "here")
    spread_gains(model, family)
    return model, family


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_choice_has_a_say() -> None:
    """Else no test would see it: of windows that are longer than it is, and not of shorter ones."""
    (model, _), (dense, _) = model_of(INDEXERS["every other"]), model_of(INDEXERS["every other"], index_topk=64)
    near, far = (logits(one) for one in (model, dense))
    assert torch.equal(near[:, :16], far[:, :16]) and not torch.allclose(near[:, 20:], far[:, 20:], rtol=0.1)


@each
def test_blocks_get_what_the_model_gives_them(indexers: list[str]) -> None:
    """Block by block, the hidden states of the whole model."""
    model, family = model_of(indexers)
    expected = model(IDS, output_hidden_states=True).hidden_states
    executor = first_executor(model, family, IDS, batch_windows=2)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        other = executor.another()
        for one in (executor, other):
            one.begin(block)
        outputs = torch.cat(list(other.outputs()))
        executor.advance(f"block {index}")
        found = executor.stacked(range(executor.windows))
        assert torch.equal(found, outputs)
        if index < 3:  # the last is behind the final norm
            torch.testing.assert_close(found, expected[index + 1], rtol=1e-5, atol=1e-5)


@each
def test_sites_follow_the_indexers(indexers: list[str]) -> None:
    _, family = model_of(indexers)
    for index, kind in enumerate(indexers):
        sites = {site.name: site for site in family.sites_of(index)}
        routers = [sites[name].routers for name in ("qkv_a", "q_b")]
        names = ("self_attn.indexer.wk", "self_attn.indexer.weights_proj"), ("self_attn.indexer.wq_b",)
        assert routers == (list(names) if kind == "full" else [(), ()])


@each
@pytest.mark.parametrize("name", ["rtn", "duquant++", "quarot", "mxrot"])
def test_what_is_loaded_is_what_was_quantized(tmp_path: Path, indexers: list[str], name: str) -> None:
    """By mxrot and by transformers; the indexers' weights keep their bits where nothing is merged into them."""
    model, family = model_of(indexers)
    model.half().save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    run = write(tmp_path / "model", tmp_path / "out", recipe(name), windows=None if name == "rtn" else IDS)
    loaded = mxrot.load(tmp_path / "out", device="cpu")
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(loaded), logits(by_transformers))
    before, after = model.state_dict(), loaded.state_dict()
    of_indexers = [key for key in before if ".indexer." in key]
    assert len(of_indexers) == 5 * indexers.count("full")
    kept = [torch.equal(after[key], before[key].float()) for key in of_indexers if key.split(".")[-2] != "k_norm"]
    assert all(kept) == (name in ("rtn", "mxrot"))
    assert not [linear for block in run["blocks"] for linear in block["linears"] if "indexer" in linear["name"]]
    assert family.passes_on == PassedOn("prev_topk_indices", "index_topk")


def test_other_attention_functions_leave_the_choice() -> None:
    model, _ = model_of(INDEXERS["every other"])
    expected = logits(model)
    for context in (shared_heads, unmasked):
        with context(model):
            assert torch.equal(logits(model), expected)


def test_a_plan_counts_what_blocks_pass_on(tmp_path: Path) -> None:
    """Four bytes for each of 16 places of a token, beside hidden states."""
    model, family = model_of(INDEXERS["all"])
    model.config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"architectures": list(family.architectures)})
    )
    plan = make_plan("tiny", tmp_path / "config.json", recipe("duquant++"), NO_TIME, samples=8, seq_len=32)
    assert plan.problems == [] and plan.needs is not None
    terms = [stage.terms["hidden states"] for stage in plan.needs.cpu.stages if stage.terms.get("hidden states")]
    assert terms and set(terms) == {8 * 32 * (4 * 64 + 4 * 16)}
