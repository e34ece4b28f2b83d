"""Load a checkpoint folder as a transformers model. Only safetensors, JSON and TOML are read; nothing is unpickled."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mxrot.checkpoint.checked import Checked, check_checkpoint, checkpoint_errors, is_checkpoint
from mxrot.checkpoint.contents import check_value
from mxrot.checkpoint.huggingface import CheckpointConfig
from mxrot.marker import MARKER, SAVED_BY
from mxrot.models import WeightFiles, fill, read_block, read_outer
from mxrot.quantizing.loading import compute_dtype, load_outer
from mxrot.scheme import prepare
from mxrot.shell import expanded
from mxrot.surgery import stored_tensors

__all__ = ["is_checkpoint", "load"]


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool | None = None,
    keeps_fp8: bool = False,
) -> PreTrainedModel:
    """The quantized model in `folder`, on `device`, ready for `generate`. `save_pretrained` may have written the
    folder, too.

    Parts that are not quantized are held in `dtype`. By default this is the checkpoint's own type on a GPU, and
    float32, which holds it exactly, on a CPU. The names, shapes, types and sizes of all stored tensors are first
    compared with the config, and recipe.toml with the config. `verify` selects the files whose SHA-256 is compared with
    run.json: True all, False none, None all that programs read, with weights up to 1 GB. CheckpointError names what is
    wrong. With `keeps_fp8`, a weight takes one byte more on a GPU, which is faster for long inputs.
    """
    folder = expanded(folder)
    with checkpoint_errors(folder):
        return _load(check_checkpoint(folder, verify), torch.device(device), dtype, keeps_fp8)


def _load(checked: Checked, device: torch.device, dtype: torch.dtype | None, keeps_fp8: bool) -> PreTrainedModel:
    model, family = checked.skeleton, checked.family
    files = WeightFiles(checked.folder, family.beside)
    dtype = dtype or compute_dtype(own_dtype(checked), device)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        prefix = family.block_prefix(index)
        tensors = read_block(files, family, index)
        for name, tensor in tensors.items():
            check_value(f"{prefix}.{name}", tensor)
        kinds = stored_tensors(block, torch.int8)
        moved = {
            name: _moved(value, kinds[name], family.dtype_of(name, dtype), device) for name, value in tensors.items()
        }
        fill(block, moved, prefix)
    outer = read_outer(files, family)
    for name in outer:
        if checked.scheme.head is not None and name.startswith(f"{family.head}."):
            check_value(name, outer[name])
    load_outer(model, family, outer, dtype, device)
    if device.type == "cuda":
        prepare(model, checked.scheme, keeps_fp8)
    model.config.quantization_config = CheckpointConfig(**checked.quantization)
    return model


def own_dtype(checked: Checked) -> torch.dtype:
    """The type that the model computes in, from config.json. transformers writes it there again if a model was moved to
    another type. Otherwise it is the type of the embedding, as in version 1."""
    if SAVED_BY in checked.quantization[MARKER] and isinstance(checked.config.dtype, torch.dtype):
        return checked.config.dtype
    return checked.layout.dtype or WeightFiles(checked.folder, checked.family.beside).dtype_of(
        f"{checked.family.embedding}.weight"
    )


def _moved(value: Tensor, kind: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The value on the device, and in `dtype` unless it belongs to a quantized linear."""
    return value.to(device, dtype) if kind.dtype == torch.int8 else value.to(device)
