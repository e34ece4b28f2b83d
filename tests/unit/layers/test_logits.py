"""Numbers of a config that scale logits, and what becomes of a model that scales them otherwise."""

from dataclasses import replace

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config
from torch import Tensor
from transformers import LlamaForCausalLM

from mxrot.errors import FamilyError
from mxrot.layers import check_logits, logits_of
from mxrot.models import FAMILIES, LogitKeys

HIDDEN = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config()).eval().requires_grad_(False)


def test_nothing_by_default(model: LlamaForCausalLM) -> None:
    assert torch.equal(logits_of(model, HIDDEN), model.lm_head(HIDDEN))
    check_logits(model, random_windows(2, 8))


def test_factor_then_divisor_then_bound(model: LlamaForCausalLM) -> None:
    model.config.logit_scale, model.config.logits_scaling, model.config.final_logit_softcapping = 3.0, 7.0, 0.5
    expected: Tensor = model.lm_head(HIDDEN) * 3.0 / 7.0
    assert torch.equal(logits_of(model, HIDDEN), torch.tanh(expected / 0.5) * 0.5)


def test_keys_are_a_field_of_the_family(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    named = replace(FAMILIES["llama"], logits=LogitKeys(factor="output_multiplier"))
    monkeypatch.setitem(FAMILIES, "llama", named)
    model.config.output_multiplier = 3.0
    assert torch.equal(logits_of(model, HIDDEN), model.lm_head(HIDDEN) * 3.0)


@pytest.mark.parametrize("key", ["logit_scale", "logits_scaling"])
def test_a_model_that_does_not_do_what_is_known(model: LlamaForCausalLM, key: str) -> None:
    """Here its own forward knows no factor."""
    setattr(model.config, key, 1.1)
    with pytest.raises(FamilyError, match=r"^LlamaForCausalLM: its logits reach .* \(LogitKeys\)$"):
        check_logits(model, random_windows(2, 8))
