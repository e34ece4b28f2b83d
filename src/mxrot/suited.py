"""What a model can have of a recipe: some steps only make a result better, and are left out where a model has no room
for them, with a word on it, so that one recipe serves every family."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mxrot.models import Family, value_heads
from mxrot.recipe import Recipe
from mxrot.rounding import GPTQ
from mxrot.surgery import permutable_linears


def suited(recipe: Recipe, family: Family, config: Any) -> tuple[Recipe, list[str]]:
    """The recipe for a model of a family, `config` its transformers config; and what was left out of it, a sentence
    each."""
    left_out = []
    for changed, said in _concessions(recipe, family, config):
        recipe = changed(recipe)
        left_out.append(said)
    return recipe, left_out


def _concessions(recipe: Recipe, family: Family, config: Any) -> Iterator[tuple[Any, str]]:
    if family.experts is not None and recipe.calibration.held_out:
        yield (
            _unchosen,
            "rounding: damping and target_damping are not chosen by site: experts get tokens, and not windows that could "
            "be held out",
        )
    wanted = recipe.permutation
    if wanted is None:
        return
    if wanted.ffn != "none" and not permutable_linears(family):
        yield _without_order("ffn"), f"permutation.ffn: family {family.name} has no linear whose channels can be permuted"
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


def _without_order(key: str) -> Any:
    def changed(recipe: Recipe) -> Recipe:
        assert recipe.permutation is not None
        others = {"ffn", "value_heads"} - {key}
        if all(getattr(recipe.permutation, other) == "none" for other in others):
            return replace(recipe, permutation=None)
        return replace(recipe, permutation=replace(recipe.permutation, **{key: "none"}))

    return changed
