"""Open a model and its tokenizer from a folder, an object or an id. No tensor is missing, and none is random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from mxrot.checkpoint import is_checkpoint, load
from mxrot.environment import check_device
from mxrot.errors import CheckpointError, FamilyError
from mxrot.models import (
    Family,
    FolderSource,
    build_skeleton,
    find_family,
    find_model,
    quantized_by,
    read_config,
    read_generation_config,
)
from mxrot.models.folder import weight_map
from mxrot.models.tokenizer import load_tokenizer as load_tokenizer
from mxrot.progress import Progress
from mxrot.quantizing.loading import compute_dtype, load_original
from mxrot.quantizing.problems import weight_problems
from mxrot.shell import expanded

_REPORTED = {
    "missing_keys": "transformers finds no such tensor and would make one of random numbers",
    "mismatched_keys": "this tensor has another shape than the config says",
    "unexpected_keys": "transformers has no place for this tensor and would leave it out",
}


def default_device() -> str:
    """The GPU if there is one, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def base_name(model: str, folder: Path) -> str:
    """The name of the base model in a model card, without a revision."""
    if model == "demo":
        return "SmolLM2-135M-Instruct"
    return folder.name if expanded(model).exists() else model.partition("@")[0]


def is_verifiable(name: str | Path) -> bool:
    """True if this is a checkpoint of mxrot with recorded hashes."""
    return (find_model(str(name)) / "run.json").exists()


def open_model(name: str | Path, device: str | None = None, verify: bool | None = None) -> tuple[PreTrainedModel, Path]:
    """A model that is ready to run, quantized or not, and its folder, from a hub id, a folder or `demo`.

    See `mxrot.load` for `verify`. CheckpointError if it is True and the model is not a checkpoint.
    """
    folder = find_model(str(name))
    device = device or default_device()
    check_device(device)
    if is_checkpoint(folder):
        return load(folder, device, verify=verify), folder
    if verify:
        raise CheckpointError(f"{name}: not a checkpoint of mxrot, and without hashes to verify; leave out --verify")
    config = read_config(folder)
    family = find_family(config, str(name))
    if quantized_by(config) is not None:
        return _opened_by_transformers(folder, family, config, str(name), torch.device(device)), folder
    source = FolderSource(folder, str(name))
    stored = getattr(config, "dtype", None) or source.dtype
    model = load_original(source, compute_dtype(stored, torch.device(device)), torch.device(device))
    read_generation_config(model, folder)
    return model, folder


def check_original(folder: Path, name: str) -> None:
    """FamilyError unless the folder holds a whole model of a known family that is not quantized yet."""
    source = FolderSource(folder, name)
    for problem in weight_problems(build_skeleton(source.config), name, source):
        raise problem


def _opened_by_transformers(
    folder: Path, family: Family, config: Any, name: str, device: torch.device
) -> PreTrainedModel:
    """A model that another program has quantized, opened by transformers. FamilyError unless transformers finds every
    tensor and has a place for each."""
    weight_map(folder)
    try:
        model, report = getattr(transformers, family.auto_class).from_pretrained(
            folder,
            dtype=torch.float32 if device.type == "cpu" else "auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FamilyError(f"{name}: transformers cannot load it: {first_line(error)}") from error
    if getattr(model, "hf_quantizer", None) is None:
        raise FamilyError(f"{name}: is quantized in a way that transformers does not know ({quantized_by(config)})")
    for key, said in _REPORTED.items():
        found = sorted(str(item if isinstance(item, str) else item[0]) for item in report[key])
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise FamilyError(f"{name}: {found[0]}{more}: {said}; is the model whole, and its config the right one?")
    opened: PreTrainedModel = model.to(device).eval()
    return opened


def first_line(error: Exception) -> str:
    """The first line of an error message of another package, or the type of the error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def opened(model: PreTrainedModel | str | Path, device: str | None, progress: Progress) -> PreTrainedModel:
    """The model itself. It is opened if only its name is given."""
    if isinstance(model, PreTrainedModel):
        return model
    progress(0, 1, f"opening {model}")
    return open_model(model, device)[0]
