"""Load a checkpoint folder as a transformers model. Only safetensors and JSON are read; nothing is unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from mxrot.assembly import compute_dtype, load_finished_block, load_outer
from mxrot.checkpoint.config import check_marker
from mxrot.checkpoint.files import INDEX, file_in, sha256_of
from mxrot.checkpoint.huggingface import CheckpointConfig
from mxrot.errors import CheckpointError, MxrotError
from mxrot.layers import prepare_linears
from mxrot.models import (
    WeightFiles,
    build_skeleton,
    check_linears,
    find_family,
    needed_attention,
    read_block,
    read_config,
    read_generation_config,
)
from mxrot.models.headers import read_header
from mxrot.recipe import Recipe


def is_checkpoint(folder: Path) -> bool:
    """Does config.json carry mxrot's marker?"""
    try:
        check_marker(json.loads((folder / "config.json").read_text()), str(folder))
    except (OSError, ValueError, AttributeError):
        return False
    except CheckpointError as error:
        return "version" in str(error)
    return True


def load(
    folder: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = False,
    keeps_fp8: bool = False,
) -> PreTrainedModel:
    """The quantized model in `folder`, on `device`, ready for `generate`.

    Parts that are not quantized are held in `dtype`; by default in the checkpoint's own type on a GPU, and in
    float32, which holds it exactly, on a CPU. File sizes are always compared with run.json, with `verify` the
    SHA-256 of every file too. CheckpointError names what is wrong. `keeps_fp8` gives a byte a weight more on a GPU, for
    speed with long inputs. What `save_pretrained` has written has no run.json and no recipe, and is loaded as
    transformers does it.
    """
    folder = Path(folder).expanduser()
    device = torch.device(device)
    if is_saved_by_transformers(folder):
        return _load_saved(folder, device, dtype)
    check_files(folder, verify)
    try:
        return _load(folder, device, dtype, keeps_fp8)
    except CheckpointError:
        raise
    except (MxrotError, OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder}: {error}") from error


def is_saved_by_transformers(folder: Path) -> bool:
    """Is this a checkpoint that was loaded and saved again, without the files that only mxrot writes?"""
    own = ("run.json", "recipe.toml", INDEX)
    return is_checkpoint(folder) and not any((folder / name).exists() for name in own)


def _load_saved(folder: Path, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    config = read_config(folder)
    dtype = dtype or compute_dtype(getattr(config, "dtype", None) or torch.float32, device)
    attention = needed_attention(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return cast(Any, model).to(device).eval()


def _load(folder: Path, device: torch.device, dtype: torch.dtype | None, keeps_fp8: bool) -> PreTrainedModel:
    recipe = Recipe.from_toml((folder / "recipe.toml").read_text(encoding="utf-8"), "recipe.toml")
    config = read_config(folder)
    quantization = CheckpointConfig.from_dict(config.quantization_config)
    del config.quantization_config
    family = find_family(config, str(folder))
    model = build_skeleton(config)
    check_linears(model, family, recipe.input_block, recipe.ignore)
    files = WeightFiles(folder)
    dtype = dtype or compute_dtype(files.dtype_of(f"{family.embedding}.weight"), device)
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        prefix = family.block_prefix(index)
        tensors = read_block(files, family, index)
        for name, tensor in tensors.items():
            _check_tensor(f"{prefix}.{name}", tensor)
        load_finished_block(block, index, tensors, recipe, family, dtype, device)
    load_outer(model, family, files, dtype, device)
    read_generation_config(model, folder)
    if device.type == "cuda":
        prepare_linears(model, keeps_fp8, recipe.accumulation == "fast")
    model.config.quantization_config = quantization
    return model


_STORED_TYPES = {".weight_packed": torch.uint8, ".weight_scale": torch.uint8, "_input.weight": torch.bfloat16}


def _check_tensor(name: str, tensor: torch.Tensor) -> None:
    expected = next((dtype for ending, dtype in _STORED_TYPES.items() if name.endswith(ending)), None)
    if tensor.dtype != expected and not (expected is None and tensor.is_floating_point()):
        raise CheckpointError(f"{name}: expected {expected or 'floating-point numbers'}, got {tensor.dtype}")
    if name.endswith(".weight_scale") and bool((tensor == 255).any()):
        raise CheckpointError(f"{name}: holds the scale NaN (byte 255); the file is damaged")


def check_files(folder: Path, verify: bool = False) -> None:
    """CheckpointError unless every file of run.json is there and has its size, and with `verify` its hash."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = _read_json(folder / "config.json")
    check_marker(config, str(folder))
    listed = _read_json(folder / "run.json").get("files")
    if not isinstance(listed, dict) or INDEX not in listed:
        raise CheckpointError(f"{folder / 'run.json'}: has no list of files")
    for name, expected in listed.items():
        path = file_in(folder, name)
        if not path.is_file():
            raise CheckpointError(f"{path}: is missing")
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise CheckpointError(f"{folder / 'run.json'}: gives no size and SHA-256 of {name}")
        found, wanted = path.stat().st_size, expected["bytes"]
        if path.suffix == ".safetensors" and found != wanted:
            raise CheckpointError(f"{path}: expected {wanted} bytes, got {found}; the file is truncated or altered")
        if verify and sha256_of(path) != expected["sha256"]:
            raise CheckpointError(f"{path}: its SHA-256 is not the one in run.json; the file was altered")
        if path.suffix == ".safetensors":
            read_header(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return table
