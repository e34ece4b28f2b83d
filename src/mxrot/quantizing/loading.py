"""Fill a model skeleton: the modules outside of the decoder blocks, and blocks that are already quantized."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.errors import CheckpointError, FamilyError
from mxrot.layers import HeadLinear, separate_experts
from mxrot.layers.transform import is_of_transform
from mxrot.models import Family, Source, build_skeleton, fill, no_place, rebuild_buffers, rebuild_carried_buffers
from mxrot.scheme import Scheme, install_site
from mxrot.surgery import stored_tensors


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """On a GPU the model's own type; on a CPU float32, which holds it exactly and is faster there."""
    return torch.float32 if device.type == "cpu" else stored


def load_outer(
    model: PreTrainedModel,
    family: Family,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device,
    carries: bool = True,
) -> None:
    """Load the tensors outside of the decoder blocks, by full names.

    Modules beside the text model are skipped, unless the model `carries` them. FamilyError, with the name, for a tensor
    that is missing or unexpected.
    """
    outside = (family.embedding, family.final_norm, family.head, *family.carried)
    for name in tensors:
        if not name.startswith(tuple(f"{place}." for place in outside)):
            raise FamilyError(no_place(name, family))
    for name in outside if carries else outside[:3]:
        prefix = name + "."
        coded = _coded_names(model.get_submodule(name))
        own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
        own = {key: value.to(device, None if key in coded else dtype) for key, value in own.items()}
        is_tied = name == family.head and "weight" not in own and model.config.tie_word_embeddings
        if is_tied:  # a bias of its own is not tied
            own["weight"] = model.get_submodule(family.embedding).get_parameter("weight")
        fill(model.get_submodule(name), own, name)
        if is_tied:
            model.tie_weights()
    rebuild_buffers(model, family, device)
    for name in family.carried if carries else ():
        rebuild_carried_buffers(model.get_submodule(name), device)


def _coded_names(module: nn.Module) -> set[str]:
    """The tensors of a quantized head that keep their checkpoint types."""
    if not isinstance(module, HeadLinear):
        return set()
    return {name for name, tensor in stored_tensors(module, torch.int8).items() if tensor.dtype != torch.int8}


def load_original(
    source: Source, dtype: torch.dtype, device: torch.device, separates_experts: bool = False
) -> PreTrainedModel:
    """The whole model from its source, ready to run, with experts as in transformers or, if `separates_experts`, with
    linears for each expert.

    FamilyError unless the source has exactly the tensors that the config requires.
    """
    model, family = build_skeleton(source.config), source.family
    for problem in source.problems(model):
        raise problem
    load_outer(model, family, source.outer(), dtype, device)
    if separates_experts:
        separate_experts(model)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        load_original_block(block, index, source, dtype, device, separates_experts)
    return model


def load_original_block(
    block: nn.Module,
    index: int,
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    separates_experts: bool = False,
) -> None:
    """Fill a meta `block` from the source. FamilyError as for `load_original`."""
    tensors, family = source.block(index, device), source.family
    if family.experts is not None and not separates_experts:
        tensors = family.experts.together(tensors)
    own = {name: value.to(family.dtype_of(name, dtype)) for name, value in tensors.items()}
    fill(block, own, family.block_prefix(index))


def load_finished_block(
    block: nn.Module,
    index: int,
    tensors: dict[str, Tensor],
    scheme: Scheme,
    family: Family,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Fill a meta `block` with the tensors of a quantized one, by their names in the block.

    CheckpointError or FamilyError, with the name, for a tensor that is missing, extra or of the wrong shape.
    """
    prefix = family.block_prefix(index)
    for site in scheme.active_sites(family, index):
        install_site(block, index, site, scheme.linears[f"{prefix}.{site.linears[0]}"])
    for name in block.state_dict():
        if is_of_transform(name) and name not in tensors:
            raise CheckpointError(f"{prefix}.{name}: is missing; each site has a transform")
    quantized = stored_tensors(block, torch.int8)
    moved = {
        name: value.to(device, family.dtype_of(name, dtype) if quantized[name].dtype == torch.int8 else None)
        for name, value in tensors.items()
        if name in quantized
    }
    fill(block, {**tensors, **moved}, prefix)
