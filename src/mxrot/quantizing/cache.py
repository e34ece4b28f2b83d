"""Transforms of a quantized cache, fitted to keys, queries, values and the weights behind them.

In a checkpoint, the transform of the values is merged into the linears before and behind attention. A model that only
runs with a quantized cache has both transforms in its attention modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mxrot.calibration import Executor, first_executor
from mxrot.calibration.attention_inputs import head_moments
from mxrot.errors import NumericsError
from mxrot.formats import CacheScheme
from mxrot.layers import quantize_cache, restore_cache
from mxrot.models import Family, value_heads
from mxrot.quantizing.batches import windows_at_once
from mxrot.quantizing.part import BlockRun, Part
from mxrot.surgery.fold_values import fold_values, reader_moments
from mxrot.transforms.heads import head_transforms


@dataclass(frozen=True)
class HeadTransforms:
    """The matrices of a block's heads of keys and values, float64 [KV heads, D, D]."""

    keys: Tensor
    values: Tensor


def fitted_transforms(executor: Executor, attention: nn.Module, reader: Tensor, name: str) -> HeadTransforms:
    """The transforms of the current block, fitted to the inputs of `attention`. `reader` is the weight behind it.

    NumericsError, with the `name` of the attention, for values that are not finite or cannot be factorized.
    """
    queries, keys, values = head_moments(executor, attention)
    for what, moments in (("queries", queries), ("keys", keys), ("values", values)):
        if not torch.isfinite(moments).all():
            raise NumericsError(
                f"{name}: its {what} are so large on the calibration text that their moments overflow, or no numbers; "
                "check the model's weights"
            )
    heads, width, _ = keys.shape
    with _named(name):
        return HeadTransforms(
            head_transforms(keys, queries), head_transforms(values, reader_moments(reader, heads, width))
        )


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except torch.linalg.LinAlgError as error:
        raise NumericsError(
            f"{name}: the second moments of its keys, queries and values cannot be factorized, they are too large or "
            'too uneven; check the model\'s weights, or set cache.transform = "hadamard"'
        ) from error


def fit_block(run: BlockRun, part: Part) -> None:
    """Fit the cache's transforms for a block that is not quantized yet.

    The transform of the keys becomes a parameter of its attention. That of the values is merged into the weights of
    `part`, in float64, and rounded once into its modules.
    """
    family, executor = run.family, part.executor
    assert executor is not None
    attention = part.module.get_submodule(family.attention)
    executor.begin(part.module)
    reader = part.weights[family.values_read_by]
    found = fitted_transforms(executor, attention, reader, f"{part.name}.{family.attention}")
    set_matrix(attention, "key_transform", found.keys)
    bias = part.module.get_submodule(family.values).bias
    folded = fold_values(part.weights, bias if isinstance(bias, Tensor) else None, family, found.values)
    for linear in (family.values, family.values_read_by):
        full = f"{part.name}.{linear}.weight"
        _fill(part.module.get_parameter(f"{linear}.weight"), part.weights[linear], run.rounding_type(full), full)
    if folded is not None:
        full = f"{part.name}.{family.values}.bias"
        _fill(part.module.get_parameter(f"{family.values}.bias"), folded, run.rounding_type(full), full)


@torch.no_grad()
def _fill(parameter: Tensor, exact: Tensor, dtype: torch.dtype, name: str) -> None:
    rounded = exact.to(dtype)
    if not torch.isfinite(rounded).all():
        raise NumericsError(
            f"{name}: with the cache's transform it is {exact.abs().max():.4g}, which is too large for {dtype}; set "
            'cache.transform = "hadamard"'
        )
    parameter.copy_(rounded)


@torch.no_grad()
def set_matrix(attention: nn.Module, name: str, matrices: Tensor) -> None:
    """Set one of the matrices of an attention module with a quantized cache."""
    attention.get_parameter(name).copy_(matrices)


@torch.no_grad()
def fit_cache(model: PreTrainedModel, family: Family, windows: Tensor, scheme: CacheScheme) -> None:
    """Install a quantized cache with fitted transforms in a running model that is not quantized, replacing any other
    cache.

    `windows` are calibration token windows [W, T]. `scheme` says which of the two transforms are "stored": these are
    fitted to the model as it is, and kept in its attention modules. NumericsError as for `fitted_transforms`.
    """
    heads, width = value_heads(model.config.get_text_config())
    for module in model.modules():
        restore_cache(module)
    blocks = list(model.get_submodule(family.blocks).children())
    device = model.get_submodule(family.embedding).weight.device
    assert isinstance(device, torch.device)
    found: dict[int, HeadTransforms] = {}
    if scheme.stored_names:
        executor = first_executor(model, family, windows, windows_at_once(model, family, device, windows.shape[1]))
        for index, block in enumerate(blocks):
            name = family.block_prefix(index)
            executor.begin(block)
            if family.attends(index):
                attention, reader = block.get_submodule(family.attention), block.get_submodule(family.values_read_by)
                assert isinstance(reader.weight, Tensor)
                found[index] = fitted_transforms(executor, attention, reader.weight, f"{name}.{family.attention}")
            if index + 1 == len(blocks):
                executor.end()
            else:
                executor.advance(name)
    for index, block in enumerate(blocks):
        if not family.attends(index):
            continue
        attention = block.get_submodule(family.attention)
        quantize_cache(attention, scheme, width, heads)
        for name in scheme.stored_names:
            set_matrix(attention, name, found[index].keys if name == "key_transform" else found[index].values)
