"""Families whose logits are scaled: perplexity and divergence are those of the model's own forward."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.cases.commands import IDS, logits, mxrot
from tests.tiny_model import write_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mxrot.evaluation import divergence, perplexity
from mxrot.layers import logits_of
from mxrot.models import FAMILIES, Family, find_family
from mxrot.models.families.llama import LLAMA_SITES

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SCALED = {
    "granite": {
        "logits_scaling": 1 / 16,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.1,
    },
    "cohere": {"logit_scale": 20.0},
    "cohere2": {"logit_scale": 20.0, "sliding_window": 8},
    "gemma2": {"final_logit_softcapping": 0.5, "head_dim": 16, "query_pre_attn_scalar": 16},
}
ARCHITECTURES = {
    "granite": "GraniteForCausalLM",
    "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}


def tiny(kind: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, architectures=[ARCHITECTURES[kind]], **SIZES, **SCALED[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    return model


@pytest.fixture(autouse=True)
def records(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record for each, as somebody adds a family who knows no more than the names of its linears."""
    plain = tuple(replace(site, norm=None, residual=None) for site in LLAMA_SITES)
    for kind, architecture in ARCHITECTURES.items():
        if not any(architecture in family.architectures for family in FAMILIES.values()):
            monkeypatch.setitem(FAMILIES, kind, Family(kind, (architecture,), plain))


def own_nll(model: PreTrainedModel) -> float:
    logs = logits(model).log_softmax(dim=-1)[:, :-1]
    return float(-logs.gather(2, IDS[:, 1:, None]).mean())


@pytest.mark.case("B6")
@pytest.mark.parametrize("kind", SCALED)
@torch.no_grad()
def test_perplexity_and_divergence_are_those_of_the_own_forward(kind: str) -> None:
    model, other = tiny(kind), tiny(kind, seed=1)
    found = divergence(model, other, IDS)
    logs, wanted = (logits(each).log_softmax(dim=-1)[:, :-1] for each in (model, other))
    kl = float((wanted.exp() * (wanted - logs)).sum(dim=-1).mean())
    assert kl > 0.01  # a head without its factor would be far off
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert perplexity(model, IDS).nll == pytest.approx(own_nll(model), rel=1e-5)
    hidden: Tensor = model.get_decoder()(input_ids=IDS).last_hidden_state
    assert torch.equal(logits_of(model, hidden), model(IDS).logits)


@pytest.mark.case("B6")
def test_granite_through_the_commands(tmp_path: Path) -> None:
    model = tiny("granite")
    model.save_pretrained(tmp_path / "granite")
    write_tokenizer(tmp_path / "granite")
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert find_family(model.config, "here").name == "granite"
    assert mxrot("quantize", tmp_path / "granite", "-r", "hadamard", "-o", tmp_path / "out").exit_code == 0
    words = ("--text", text, "--seq-len", "64", "--json", tmp_path / "scores.json", "--device", "cpu")
    result = mxrot("eval", tmp_path / "out", "--against", tmp_path / "granite", *words)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "scores.json").read_text())["divergence"]["words"]
    ids = torch.tensor(list(text.read_bytes()[: 64 * (len(text.read_bytes()) // 64)])).view(-1, 64)
    with torch.no_grad():
        logs = AutoModelForCausalLM.from_pretrained(tmp_path / "granite")(_byte_ids(tmp_path, text, ids)).logits
    nll = -logs.log_softmax(-1)[:, :-1].gather(2, _byte_ids(tmp_path, text, ids)[:, 1:, None]).mean()
    assert found["original_ppl"] == pytest.approx(float(nll.exp()), rel=1e-4)


def _byte_ids(folder: Path, text: Path, like: Tensor) -> Tensor:
    ids = AutoTokenizer.from_pretrained(folder / "granite")(text.read_text(), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: like.numel()]).view(like.shape)


@pytest.mark.case("B6")
def test_a_family_whose_scaling_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not measured wrongly in silence: here a factor that no config names."""
    from mxrot.errors import FamilyError

    model = tiny("granite")
    forward = type(model).forward

    def scaled(self: PreTrainedModel, *arguments: object, **keywords: object) -> object:
        output = forward(self, *arguments, **keywords)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", scaled)
    with pytest.raises(FamilyError, match="name the key of its config that scales them"):
        perplexity(model, IDS)
    with pytest.raises(FamilyError, match="name the key of its config that scales them"):
        divergence(model, tiny("granite", seed=1), IDS)
