"""Quantized products of attention in every family: taken, or refused by name before any weight is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.contracts.tiny_configs import auto_class, config_of

from mxrot.layers import build_apart, operands_of, separate_experts
from mxrot.models import FAMILIES, find_family
from mxrot.quantizing.problems import find_problems
from mxrot.recipe import load_recipe
from mxrot.scheme import Scheme, install_attention

RECIPE = load_recipe("amxfp4-attention")
HEADS = {"head_dim": 32, "hidden_size": 128}


def besides(config: Any) -> str | None:
    """What attention of a config does besides the two products, as the refusal says it."""
    config = config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "no soft caps"
    return "no windows" if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_takes_it_or_is_refused_by_name(name: str) -> None:
    """Where it is taken, token by token gives what the whole text gives, and not what it was before."""
    changes = {"sliding_window": None} if FAMILIES[name].windows == "all" else {}
    config = config_of(FAMILIES[name], **HEADS, **changes)
    family = find_family(config, name)
    refused = [str(one) for one in find_problems(build_apart(config), family, RECIPE, name)]
    beside = family.heads_obstacle or besides(config)
    assert len(refused) == (beside is not None)
    if beside is not None:
        assert beside in refused[0] and f"family {name} " in refused[0]
        return
    torch.manual_seed(0)
    model = auto_class(family).from_config(config).eval().double().requires_grad_(False)
    separate_experts(model)  # those of transformers know no float64
    ids = torch.randint(2, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    before = model(ids).logits
    install_attention(model, Scheme.of(RECIPE, family, build_apart(config)), family)
    assert all(operands_of(attention) is not None for attention in family.attentions(model))
    whole = model(ids).logits
    assert not torch.allclose(whole, before, rtol=1e-6)
    cache, logits = None, []
    sizes = [30, *[1] * 10]
    positions = torch.arange(40)[None].split(sizes, dim=1)  # Bamba counts them from 0 unless told
    for piece, places in zip(ids.split(sizes, dim=1), positions, strict=True):
        out = model(piece, position_ids=places, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    is_rounded = family.experts is not None or family.states_of is not None  # shares, or states, to float32
    tolerance = 2.0**-20 if is_rounded else 1e-10
    assert torch.allclose(torch.cat(logits, dim=1), whole, rtol=0, atol=tolerance)
