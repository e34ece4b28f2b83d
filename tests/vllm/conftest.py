"""One process, one vLLM, on a CPU; and small checkpoints of each kind."""

import json
import os
import shutil

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ["VLLM_PLUGINS"] = ""  # tests of stock vLLM run in the same process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config, write_tiny_model, write_tokenizer
from tests.unit.checkpoint.folders import recipe, write
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mxrot.checkpoint.checked import check_checkpoint
from mxrot.checkpoint.config import compressed_tensors_config
from mxrot.overrides import Override
from mxrot.vllm.export import export_for_vllm
from mxrot.vllm.verdict import check_for_vllm


@pytest.fixture(scope="session", autouse=True)
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from tests.vllm.plain_vllm import set_up
    from torch.distributed import destroy_process_group

    set_up(tmp_path_factory.mktemp("distributed") / "rendezvous")
    yield
    destroy_process_group()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a checkpoint by its kind, written when it is first asked for."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(kind: str) -> Path:
        if not (root / kind).exists():
            _write(root, kind)
        return root / kind

    return make


@pytest.fixture(scope="session")
def exported(checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """The same in the words of compressed-tensors, exported or not: with one matrix a site where it has others."""

    def make(kind: str) -> Path:
        folder = checkpoint(kind)
        output = folder.with_name(f"exported-{kind}")
        if not output.exists():
            if check_for_vllm(folder).stock.stops:
                shutil.copytree(folder, output)
                _reword(output)
            else:
                export_for_vllm(folder, output)
        return output

    return make


def _reword(folder: Path) -> None:
    checked = check_checkpoint(folder)
    linears = {
        name: replace(one, stages=tuple(replace(stage, sharing="site") for stage in one.stages))
        for name, one in checked.scheme.linears.items()
    }
    table = compressed_tensors_config(replace(checked.scheme, linears=linears), checked.family, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": table}))


_FITTED = ("mxrot-vllm", {"calibration__generated": 0.0})  # matrices that are neither symmetric nor orthogonal
_RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("rtn", {}),
    "site": _FITTED,
    "block": (_FITTED[0], _FITTED[1] | {"transform__sharing": "block"}),
    "one-for-all-blocks": ("hadamard", {"transform__sharing": "block"}),
    "blocks-of-16": ("hadamard", {"transform__block": 16}),
    "weights-only": ("hadamard", {"activations": "none"}),
    "ignores-down": ("hadamard", {"ignore": ["down_proj"]}),
    "bias": _FITTED,
    "plain-bias": ("rtn", {}),
    "mistral": _FITTED,
    "qwen2": ("hadamard", {}),
    "qwen3": _FITTED,
    "phi3": ("hadamard", {}),
    "plain-phi3": ("rtn", {}),
    "mixture": (
        _FITTED[0],
        _FITTED[1]
        | {
            "override": (
                Override.from_table({"sites": ["down"], "format": "mxfp8_e4m3"}, "down"),
                Override.from_table({"sites": ["gate_up"], "blocks": [1, 1], "activations": "none"}, "gate_up"),
                Override.from_table({"sites": ["o"], "blocks": [0, 0], "weights": "none"}, "o"),
            )
        },
    ),
    "other-formats": ("hadamard", {"weights__format": "int4_g32_asym", "weights__rule": "", "activations": "none"}),
    "whole-rows": ("rtn", {"weights__format": "int8_row", "weights__rule": "", "activations": "none"}),
    **{
        f"head-{name}": ("hadamard", {"head__format": "mxfp4", "head__transform": "hadamard"})
        for name in ("mistral", "qwen2", "qwen3", "phi3")
    },
    "tensor-scale": ("rtn", {"weights__format": "nvfp4", "weights__rule": "", "activations": "none"}),
}


_FOREIGN: dict[str, tuple[Any, Any]] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "plain-phi3": (Phi3Config, Phi3ForCausalLM),
}


def _write(root: Path, kind: str) -> None:
    name, changes = _RECIPES[kind]
    source = root / f"source-{kind}"
    foreign = _FOREIGN.get(kind.removeprefix("head-"))
    if foreign is None:
        write_tiny_model(source, torch.bfloat16, attention_bias="bias" in kind)
    else:
        kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        table = tiny_config().to_dict()
        settings = {key: table[key] for key in (*kept, "num_key_value_heads", "max_position_embeddings")}
        torch.manual_seed(0)
        config = foreign[0](**settings, tie_word_embeddings=False, pad_token_id=None)
        config.head_dim = table["head_dim"]
        model = foreign[1](config)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5)  # norm gains, and biases, which are zero otherwise
        model.to(torch.bfloat16).save_pretrained(source)
        write_tokenizer(source)
    overrides = changes.get("override", ())
    chosen = recipe(name, **{key: value for key, value in changes.items() if key != "override"})
    write(source, root / kind, replace(chosen, override=overrides))
