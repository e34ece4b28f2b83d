"""Adapt a recipe to a model. Some steps only improve a result. If a model has no room for such a step, it is left out
and reported, so that one recipe serves every family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from mxrot.models import Family, value_heads
from mxrot.recipe import Recipe
from mxrot.rounding import GPTQ
from mxrot.sections import PermutationChoice
from mxrot.surgery import permutable_linears
from mxrot.tables import build, plain

Change = Callable[[Recipe], Recipe]


def suited(recipe: Recipe, family: Family, config: Any) -> tuple[Recipe, list[str]]:
    """The recipe for a model with this family and transformers config, and a sentence for each step left out."""
    left_out = []
    for changed, said in _concessions(recipe, family, config):
        recipe = changed(recipe)
        left_out.append(said)
    return recipe, left_out


def _concessions(recipe: Recipe, family: Family, config: Any) -> Iterator[tuple[Change, str]]:
    if family.experts is not None and recipe.calibration.held_out:
        yield (
            _unchosen,
            "rounding: damping and target_damping are not chosen by site: experts get tokens, and not windows that "
            "could be held out",
        )
    wanted = recipe.permutation
    if wanted is None:
        return
    blocks = range(config.get_text_config().num_hidden_layers)
    if wanted.ffn != "none" and not any(permutable_linears(family, index) for index in blocks):
        yield (
            _without_order("ffn"),
            f"permutation.ffn: family {family.name} has no linear whose channels can be permuted",
        )
    if wanted.value_heads != "none" and not family.names_values:
        yield (
            _without_order("value_heads"),
            f"permutation.value_heads: family {family.name} names no linear that makes values, head after head",
        )
        return
    if wanted.value_heads != "none" and recipe.cache is not None and recipe.cache.transform != "none":
        yield (
            _without_order("value_heads"),
            f'permutation.value_heads: cache.transform = "{recipe.cache.transform}" mixes the channels of a head',
        )
        return
    width = value_heads(config.get_text_config())[1]
    block = next((one.transform.block for one in recipe.variants if width % one.transform.block), None)
    if wanted.value_heads != "none" and block is not None:
        yield (
            _without_order("value_heads"),
            f"permutation.value_heads: heads are {width} wide, which is not a multiple of the transform's block of "
            f"{block}",
        )


def _unchosen(recipe: Recipe) -> Recipe:
    rounding = recipe.rounding
    if isinstance(rounding, GPTQ):
        rounding = replace(rounding, dampings=(), target_dampings=())
    return replace(recipe, rounding=rounding, calibration=replace(recipe.calibration, held_out=0.0))


def _without_order(key: str) -> Change:
    def changed(recipe: Recipe) -> Recipe:
        assert recipe.permutation is not None
        kinds = plain(recipe.permutation) | {key: "none"}
        kept = None if set(kinds.values()) == {"none"} else build(PermutationChoice, kinds, "permutation")
        return replace(recipe, permutation=kept)

    return changed
