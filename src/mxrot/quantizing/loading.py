"""Fill a model skeleton: what is outside of the decoder blocks, and blocks that are quantized already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import CheckpointError, FamilyError
from mxrot.models import (
    Family,
    Site,
    WeightFiles,
    build_skeleton,
    check_depth,
    fill,
    no_place,
    read_block,
    rebuild_buffers,
    tensor_problems,
)
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.surgery import install_empty_site, scheme_name, stored_tensors


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The model's own type on a GPU; float32, which holds it exactly and is faster there, on a CPU."""
    return torch.float32 if device.type == "cpu" else stored


def load_outer(
    model: PreTrainedModel, family: Family, files: WeightFiles, dtype: torch.dtype, device: torch.device
) -> None:
    """Load what is outside of the decoder blocks. FamilyError names a tensor that is missing or has no place."""
    outside = (family.embedding, family.final_norm, family.head)
    blocks = (family.block_prefix(index) for index, _ in enumerate(model.get_submodule(family.blocks).children()))
    known = tuple(f"{place}." for place in (*outside, *blocks))
    for name in files.names:
        if not name.startswith(known):
            raise FamilyError(no_place(name, family))
    tensors = outer_tensors(files, family)
    for name in outside:
        prefix = name + "."
        own = {key[len(prefix) :]: value.to(device, dtype) for key, value in tensors.items() if key.startswith(prefix)}
        if name == family.head and not own and model.config.tie_word_embeddings:
            model.tie_weights()
        else:
            fill(model.get_submodule(name), own, name)
    rebuild_buffers(model, family, device)


def load_original(
    config: Any, family: Family, files: WeightFiles, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The whole model as its files hold it, ready to run: experts as transformers computes them.

    FamilyError unless the files hold the tensors of the config, all of them and no others.
    """
    check_depth(files, family, config)
    model = build_skeleton(config)
    for problem in tensor_problems(files, model, family):
        raise problem
    load_outer(model, family, files, dtype, device)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        tensors = read_block(files, family, index, device)
        if family.experts is not None:
            tensors = family.experts.together(tensors)
        fill(block, {name: value.to(dtype) for name, value in tensors.items()}, family.block_prefix(index))
    return model


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
    """Fill a meta `block` with the tensors of a quantized one, by their names in the block.

    CheckpointError or FamilyError names a tensor that is missing, extra or of the wrong shape.
    """
    weights = recipe.weights.quantizer()
    activations = None if recipe.activations is None else recipe.activations.for_inputs()
    for site in family.active_sites(index, recipe.ignore):
        scheme = scheme_name(index, site)
        stored = None
        if recipe.has_transform:
            stored = _stored_transform(tensors, f"{site.linears[0]}.{scheme}_input.weight", block, site, recipe)
        install_empty_site(block, scheme, site, stored, weights, activations)
    quantized = stored_tensors(block, torch.int8)
    moved = {
        name: value.to(device, dtype) if quantized[name].dtype == torch.int8 else value.to(device)
        for name, value in tensors.items()
        if name in quantized
    }
    fill(block, {**tensors, **moved}, f"{family.blocks}.{index}")


def _stored_transform(tensors: dict[str, Tensor], name: str, block: nn.Module, site: Site, recipe: Recipe) -> Tensor:
    """The transform of a site; without this check a model would load without it, and compute garbage."""
    if name not in tensors:
        raise CheckpointError(f"{name}: is missing; recipe {recipe.name} has a transform for each site")
    linear = block.get_submodule(site.linears[0])
    assert isinstance(linear, nn.Linear)
    one = (TRANSFORM_BLOCK, TRANSFORM_BLOCK)
    allowed = [one] if recipe.sharing == "site" else [one, (linear.in_features // TRANSFORM_BLOCK, *one)]
    found = tuple(tensors[name].shape)
    if found not in allowed:
        raise CheckpointError(f"{name}: expected shape {' or '.join(map(str, map(list, allowed)))}, got {list(found)}")
    return tensors[name]
