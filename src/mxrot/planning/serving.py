"""What vLLM would do with the result, as far as the layout of the checkpoint tells (docs/checkpoint.md)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from mxrot.planning.shape import ModelShape
from mxrot.recipe import Recipe


@dataclass(frozen=True)
class Serving:
    """An answer about a runtime."""

    follows_layout: bool
    """Does the checkpoint hold only what the runtime's own layout defines?"""
    because: str


def serving_by_vllm(model: PreTrainedModel, shape: ModelShape, recipe: Recipe, is_written: bool) -> Serving:
    """Of stock vLLM, without a plugin. Nothing was run."""
    if not is_written:
        return Serving(False, "no checkpoint would be written")
    if any(found.site.is_of_experts for found in shape.fullest):
        return Serving(False, "experts in this layout were not tried in vLLM, which does not transform their inputs")
    if not recipe.has_transform:
        return Serving(True, "without a transform the checkpoint is plain compressed-tensors")
    if recipe.sharing == "block":
        return Serving(
            False,
            'one matrix a block is read by mxrot only; transform.sharing = "site" follows the layout (mxrot-vllm)',
        )
    biased = _with_bias(model, shape)
    if biased:
        return Serving(False, f"transformed linears with a bias ({', '.join(biased)}) are not in what vLLM supports")
    return Serving(True, "one matrix a site follows the compressed-tensors layout; serving it has not been verified")


def _with_bias(model: PreTrainedModel, shape: ModelShape) -> list[str]:
    """Quantized linears of a block that have a bias, by the last part of their names."""
    names = {name for found in shape.fullest for name in found.site.linears}
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.bias is not None and any(name.endswith(f".{n}") for n in names)
    }
    return sorted(found)
