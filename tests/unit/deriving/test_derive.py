"""What is refused, and what is left out, in models that do something that no record can say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tests.tiny_model import tiny_config
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from mxrot.deriving import derived_family, proofs
from mxrot.errors import FamilyError
from mxrot.models import Family, Site

Forward = Callable[[Any, Tensor], Tensor]


def llama() -> Family:
    return derived_family(tiny_config(architectures=["LlamaForCausalLM"]), "here")


def site(name: str) -> Site:
    return next(site for site in llama().sites if site.name == name)


@pytest.fixture
def mlp(monkeypatch: pytest.MonkeyPatch) -> Callable[[Forward], None]:
    """Gives the MLPs of Llama another forward."""
    return lambda forward: monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", forward)


def inner(self: Any, x: Tensor) -> Tensor:
    found: Tensor = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
    return found


def test_an_mlp_as_it_is(mlp: Callable[[Forward], None]) -> None:
    """Else the tests below would see their own changes."""
    mlp(lambda self, x: self.down_proj(inner(self, x)))
    assert site("down").producer == "mlp.up_proj" and site("gate_up").norm == "post_attention_layernorm"


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, x: nn.functional.linear(inner(self, x), self.down_proj.weight),
            r"^model.layers.0.mlp.down_proj: its weight is used by linear outside of its own forward",
        ),
        (
            lambda self, x: self.down_proj(inner(self, x).to(self.down_proj.weight.dtype)),
            r"^model.layers.0.mlp.down_proj: its weight is used by __get__ outside of its own forward",
        ),
        (
            lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))),
            r"^model.layers.0.mlp.up_proj: is called 0 times in a pass",
        ),
        (
            lambda self, x: self.down_proj(inner(self, x)) + self.down_proj(self.gate_proj(x)),
            r"^model.layers.0.mlp.gate_proj: is called 2 times in a pass",
        ),
        (lambda self, x: x @ x, r"^here: a small model of its class does not run as it is called here \(RuntimeError"),
    ],
    ids=["weight", "dtype of weight", "not reached", "twice", "does not run"],
)
def test_a_linear_that_is_not_called_as_one_is_refused(
    mlp: Callable[[Forward], None], forward: Forward, message: str
) -> None:
    mlp(forward)
    with pytest.raises(FamilyError, match=message):
        llama()


def test_a_norm_that_more_reads_is_not_named(mlp: Callable[[Forward], None]) -> None:
    mlp(lambda self, x: self.down_proj(inner(self, x)) + x)
    assert site("gate_up").norm is None and site("qkv").norm == "input_layernorm"


@pytest.mark.parametrize(
    "between", [torch.tanh, lambda x: x + 0.01, lambda x: x.flip(-1) + x], ids=["tanh", "added", "mixed"]
)
def test_a_producer_with_a_function_behind_it_is_not_named(
    mlp: Callable[[Forward], None], between: Callable[[Tensor], Tensor]
) -> None:
    mlp(lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * between(self.up_proj(x))))
    assert site("down").producer is None and site("gate_up").norm is not None


def test_a_producer_whose_channels_cannot_be_permuted_is_not_named(mlp: Callable[[Forward], None]) -> None:
    """Scales fold through factors that differ by channel, orders do not."""
    mlp(lambda self, x: self.down_proj(inner(self, x) * torch.arange(1, 97)))
    assert site("down").producer is None


def test_a_bound_that_only_large_values_reach_is_seen(
    mlp: Callable[[Forward], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp(lambda self, x: self.down_proj(inner(self, x).clamp(-1000, 1000)))
    assert site("down").producer is None
    monkeypatch.setattr(proofs, "MAGNITUDES", (1.0,))
    assert site("down").producer == "mlp.up_proj"


def test_two_tensors_of_one_content_are_two_sites(mlp: Callable[[Forward], None]) -> None:
    mlp(lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x.clone())))
    assert [found.linears for found in llama().sites[2:]] == [
        ("mlp.gate_proj",),
        ("mlp.up_proj",),
        ("mlp.down_proj",),
    ]


def test_a_tensor_that_is_written_into_is_another(mlp: Callable[[Forward], None]) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x.mul_(2)))  # type: ignore[no-any-return]

    mlp(forward)
    assert [found.linears for found in llama().sites[2:4]] == [("mlp.gate_proj",), ("mlp.up_proj",)]
    assert llama().sites[2].norm is None


def test_blocks_that_group_their_linears_otherwise_are_refused(
    mlp: Callable[[Forward], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    own = modeling_llama.LlamaMLP.__init__

    def init(self: Any, config: Any) -> None:
        own(self, config)
        made.append(self)
        self.is_later = len(made) % 2 == 0

    monkeypatch.setattr(modeling_llama.LlamaMLP, "__init__", init)
    mlp(lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x + 0 if self.is_later else x)))
    with pytest.raises(FamilyError, match=r"^here: the linears of decoder block 1 read their inputs otherwise"):
        llama()


def test_logits_that_are_scaled_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    own = transformers.LlamaForCausalLM.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        found = own(self, *arguments, **keywords)
        found.logits = found.logits * 3
        return found

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(FamilyError, match=r"^here: its decoder blocks, final norm and head, run one after"):
        llama()


def test_values_that_are_clipped_are_not_named() -> None:
    """By a number that only large ones reach."""
    for bound, values in ((None, "self_attn.v_proj"), (50.0, "")):
        config = transformers.OlmoConfig(architectures=["OlmoForCausalLM"], clip_qkv=bound)
        found = derived_family(config, "here")
        assert found.values == found.values_read_by.replace("o_proj", "v_proj") == values
        assert (found.sites[1].producer is None) == (bound is not None)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ("GPT2LMHeadModel", r"attn.c_attn.weight \[768, 2304\] is the weight of a Conv1D, and only plain nn.Linear"),
        ("FalconForCausalLM", r"query_key_value.weight .* is the weight of a FalconLinear"),
        ("BioGptForCausalLM", r"biogpt.embed_positions.weight is outside of its decoder blocks"),
        ("Gemma3nForCausalLM", r"decoder block \d+ is built otherwise than block 0 \(.*self_attn.k_proj"),
        ("DogeForCausalLM", r"config.json: keep_window_size is 2048, and what it does to attention is not known"),
        ("OPTForCausalLM", r"what its last decoder block gives does not pass one norm"),
    ],
)
def test_an_architecture_that_cannot_be_understood_is_refused(architecture: str, message: str) -> None:
    config = getattr(transformers, architecture).config_class(architectures=[architecture])
    with pytest.raises(FamilyError, match=rf"^here: .*{message}"):
        derived_family(config, "here")


def test_a_model_of_more_than_text_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"^here: a model of more than text; no family is derived for it$"):
        derived_family(transformers.Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]), "here")


def test_a_config_that_calls_its_model_otherwise_is_refused() -> None:
    with pytest.raises(FamilyError, match=r"^here: config.json calls its architecture Other, and transformers builds"):
        derived_family(tiny_config(architectures=["Other"]), "here")


def test_nothing_random_is_left_behind_and_the_config_stays() -> None:
    config = tiny_config(architectures=["LlamaForCausalLM"])
    before, state = config.to_dict(), torch.random.get_rng_state()
    first, second = derived_family(config, "here"), derived_family(config, "here")
    assert first == second and config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)
