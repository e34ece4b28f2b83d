"""What vLLM would do with the result: the verdict of `mxrot export`, before there is anything to export."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from mxrot.models import Family
from mxrot.recipe import Recipe
from mxrot.vllm.verdict import Facts, judge


@dataclass(frozen=True)
class Serving:
    """An answer about a runtime."""

    follows_layout: bool
    """Does the runtime, as it comes, run the checkpoint?"""
    because: str


def serving_by_vllm(model: PreTrainedModel, family: Family, recipe: Recipe, is_written: bool) -> Serving:
    """Of stock vLLM, without a plugin. Nothing was run. The linears of `model`, a skeleton, are replaced."""
    if not is_written:
        return Serving(False, "no checkpoint would be written")
    stops = judge("planned", Facts.planned(model, family, recipe)).stock.stops
    if stops:
        return Serving(False, stops[0])
    if not recipe.has_transform:
        return Serving(True, "without a transform the checkpoint is plain compressed-tensors")
    return Serving(True, "one matrix a site follows the compressed-tensors layout; serving it has not been verified")
