"""What a mixture takes is what `mxrot plan` says of its recipe."""

import random
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config

from mxrot.layers import build_apart
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.planning.shape import ModelShape
from mxrot.recipe import load_recipe
from mxrot.search.bits import Bits, Cell, Costs, Limits, spelled
from mxrot.search.choices import Choice, parse_choices
from mxrot.search.written import mixture_recipe

CHOICES = "mxfp6_e2m3,mxfp8_e4m3,mxfp4/mxfp8_e4m3"


def costs_of(choices: str = CHOICES, name: str = "duquant++-gptq", **changes: Any) -> tuple[Any, Costs, Any]:
    recipe = load_recipe(name).changed(changes)
    model = build_apart(tiny_config(num_hidden_layers=3))
    parsed = parse_choices(choices, recipe, False)
    return recipe, Costs.of(recipe, parsed, LLAMA, model, torch.float16), model


def drawn(costs: Costs, seed: int) -> dict[Cell, Choice]:
    draws = random.Random(seed)
    some = [cell for cell in costs.added if draws.random() < 0.5]
    return {cell: draws.choice(list(costs.added[cell])) for cell in some}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("name", "changes"), [("mxrot", {}), ("mxrot", {"ignore": ["down_proj"]}), ("nvfp4", {})])
def test_bits_a_weight_are_those_of_plan(name: str, changes: dict[str, Any], seed: int) -> None:
    recipe, costs, model = costs_of("mxfp6_e2m3,mxfp8_e4m3", name, **changes)
    mixture = drawn(costs, seed)
    assert mixture
    written = mixture_recipe(recipe, mixture, costs.kinds, costs.bits(mixture), "tiny")
    planned = ModelShape.of(model, LLAMA, written).size_after(torch.float16).bits_per_weight
    assert costs.bits(mixture).weights == pytest.approx(planned, rel=1e-12)


def test_inputs_are_a_mean_over_what_a_token_brings_to_sites() -> None:
    """qkv, o and gate_up read 64 channels, down reads 96."""
    _, costs, _ = costs_of()
    inputs = Choice("mxfp4", "mxfp8_e4m3")
    assert costs.base == pytest.approx(Bits(4.25, 4.25))
    raised = costs.bits({Cell("down", block): inputs for block in range(3)})
    assert raised == pytest.approx(Bits(4.25, 4.25 + 4 * 96 / (3 * 64 + 96)))
    assert costs.bits(costs.all_of(inputs)) == pytest.approx(Bits(4.25, 8.25))


def test_what_is_no_raise_is_no_choice() -> None:
    """mxfp6 takes less than mxint8, which some sites have."""
    _, costs, _ = costs_of("mxfp6_e2m3", override=[{"sites": ["o"], "format": "mxint8"}])
    assert costs.kinds == ["qkv", "gate_up", "down"] and costs.blocks == [0, 1, 2]
    assert costs.added[Cell("o", 0)] == {}
    assert set(costs.all_of(Choice("mxfp6_e2m3", "mxfp6_e2m3"), block=1)) == {
        Cell(kind, 1) for kind in ("qkv", "gate_up", "down")
    }


def test_sites_that_are_left_stay_so() -> None:
    _, costs, _ = costs_of(override=[{"sites": ["o"], "blocks": [0, 0], "weights": "none"}])
    assert Cell("o", 0) not in costs.added and Cell("o", 1) in costs.added


def test_choices_come_cheapest_first() -> None:
    _, costs, _ = costs_of()
    assert [choice.spelled for choice in costs.choices] == ["mxfp4/mxfp8_e4m3", "mxfp6_e2m3", "mxfp8_e4m3"]


def test_limits_admit_what_is_at_most_as_much() -> None:
    limits = Limits(4.5, None)
    assert limits.admit(Bits(4.5, 8.25)) and not limits.admit(Bits(4.5001, 4.25))
    assert not Limits(4.5, 5.0).admit(Bits(4.5, 5.1)) and Limits(None, 5.0).admit(Bits(9.0, 5.0))


def test_the_same_mixture_is_spelled_the_same() -> None:
    six, eight = Choice("mxfp6_e2m3", "mxfp6_e2m3"), Choice("mxfp4", "mxfp8_e4m3")
    one = {Cell("o", 1): six, Cell("down", 10): eight}
    assert spelled(one) == spelled(dict(reversed(one.items()))) == "down.10=mxfp4/mxfp8_e4m3 o.1=mxfp6_e2m3"
    assert spelled({}) == ""
