"""Fill a model skeleton: what is outside of the decoder blocks, and blocks that are quantized already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import FamilyError
from mxrot.models import Family, WeightFiles, fill, rebuild_rotary
from mxrot.recipe import Recipe
from mxrot.surgery import install_empty_site, scheme_name, stored_tensors


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own type on a GPU; float32, which holds it exactly and is faster there, on a CPU."""
    return torch.float32 if device.type == "cpu" else stored


def load_outer(
    model: PreTrainedModel, family: Family, files: WeightFiles, dtype: torch.dtype, device: torch.device
) -> None:
    """Load what is outside of the decoder blocks. FamilyError names a tensor that is missing or has no place."""
    tensors = outer_tensors(files, family)
    places = (family.embedding, family.final_norm, family.head)
    for name in tensors:
        if not name.startswith(tuple(f"{place}." for place in places)):
            raise FamilyError(f"{name}: family {family.name} has no place for this tensor")
    for name in places:
        prefix = name + "."
        own = {key[len(prefix) :]: value.to(device, dtype) for key, value in tensors.items() if key.startswith(prefix)}
        if name == family.head and not own and model.config.tie_word_embeddings:
            model.tie_weights()
        else:
            fill(model.get_submodule(name), own, name)
    rebuild_rotary(model, family, device)


def outer_tensors(files: WeightFiles, family: Family) -> dict[str, Tensor]:
    """Every tensor outside of the decoder blocks, by its full name."""
    return {name: files.read(name) for name in files.names if not name.startswith(family.blocks + ".")}


def load_finished_block(
    block: nn.Module,
    index: int,
    tensors: dict[str, Tensor],
    recipe: Recipe,
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a meta `block` with the tensors of a quantized one, by their names in the block."""
    weights = recipe.weights.quantizer()
    activations = None if recipe.activations is None else recipe.activations.quantizer()
    for site in family.active_sites(index, recipe.ignore):
        scheme = scheme_name(index, site)
        stored = tensors.get(f"{site.linears[0]}.{scheme}_input.weight")
        install_empty_site(block, scheme, site, stored, weights, activations)
    quantized = stored_tensors(block, torch.int8)
    moved = {
        name: value.to(device, dtype) if quantized[name].dtype == torch.int8 else value.to(device)
        for name, value in tensors.items()
        if name in quantized
    }
    fill(block, {**tensors, **moved}, f"{family.blocks}.{index}")
