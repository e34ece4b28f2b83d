"""A small checkpoint and its models, as the cases of transformers load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.cases.commands import IDS
from tests.tiny_model import write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mxrot
from mxrot.layers import prepare_linears
from mxrot.recipe import load_recipe


def write_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Quantize a tiny model with biases, a transform for each block of channels, into `folder`."""
    source = write_tiny_model(folder.with_name(f"{folder.name}-source"), seed=seed, attention_bias=True, **changes)
    mxrot.quantize(source, load_recipe("hadamard").changed({"transform.sharing": "block"}), folder)
    return folder


def from_pretrained(folder: Path, **options: Any) -> PreTrainedModel:
    """The model as transformers loads it, in float32 unless `options` say otherwise."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, **({"dtype": torch.float32} | options))
    return model


def loaded(folder: Path, is_prepared: bool = False) -> PreTrainedModel:
    """The model as `mxrot.load` gives it on a CPU; on request prepared as on a GPU, its sites computed as a whole."""
    model = mxrot.load(folder, device="cpu")
    if is_prepared:
        prepare_linears(model, keeps_lifted=True)
    return model


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    """Logits [S, T, V]; ids stay on the CPU, where hooks that offload take them from."""
    found: Tensor = model(ids).logits
    return found
