"""A model and its tokenizer from a folder, an object or an id: nothing missing, nothing random."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mxrot.checkpoint import is_checkpoint, load
from mxrot.errors import FamilyError
from mxrot.models import find_family, find_model, needed_attention, read_config


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_name(model: str, folder: Path) -> str:
    """How a model card calls the base model."""
    return "SmolLM2-135M-Instruct" if model == "demo" else (folder.name if Path(model).exists() else model)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder; FamilyError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FamilyError(f"{folder}: no tokenizer that transformers reads: {str(error).splitlines()[0]}") from error


def open_model(name: str | Path, device: str | None = None, verify: bool = False) -> tuple[PreTrainedModel, Path]:
    """A model ready to run, quantized or not, by hub id, folder or `demo`; and its folder."""
    folder = find_model(str(name))
    device = device or default_device()
    if is_checkpoint(folder):
        return load(folder, device, verify=verify), folder
    config = read_config(folder)
    find_family(config, str(name))
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=needed_attention(config),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise FamilyError(f"{name}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from error
    cast(Any, model).to(device)
    return model.eval(), folder
