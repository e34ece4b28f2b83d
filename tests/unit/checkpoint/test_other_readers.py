"""Programs without mxrot: transformers refuses what it would compute otherwise, before it opens a file of weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.tiny_model import write_tiny_model
from tests.unit.checkpoint.folders import recipe, write

import mxrot
from mxrot.layers import QuantLinear
from mxrot.overrides import Override
from mxrot.vllm.export import export_for_vllm

PROGRAM = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mxrot", "mxrot_autoload"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NotInstalled())
import safetensors.torch, torch, transformers
import transformers.modeling_utils as reading

opened, opens = [], reading.safe_open
reading.safe_open = lambda *files, **options: opened.append(files[0]) or opens(*files, **options)
found = {}
for folder, *options in map(lambda word: word.split(","), sys.argv[1:]):
    opened.clear()
    given = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if options else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **given)
        model(torch.arange(4)[None])  # what was loaded as codes is decoded in the first call
        weights = {name: value.float() for name, value in model.state_dict().items() if name.endswith("proj.weight")}
        safetensors.torch.save_file(weights, folder + ".safetensors")
        said = "loaded"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found[",".join([folder, *options])] = [said, len(opened)]
print(json.dumps(found))
"""

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a transform": ("hadamard", {}),
    "a matrix a block": ("hadamard", {"transform__sharing": "block"}),
    "a transform, inputs as they are": ("hadamard", {"activations": "none"}),
    "a format without a layout": ("rtn", {"weights__format": "mxint8", "weights__rule": ""}),
    "inputs in another format": ("rtn", {"activations__format": "mxfp8_e4m3"}),
    "a mixture": ("rtn", {"override": (Override.from_table({"sites": ["down"], "format": "mxfp8_e4m3"}, "down"),)}),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, int]]]:
    """What a program without mxrot says of each folder, and how many files of weights it has opened."""
    root = tmp_path_factory.mktemp("readers")
    source = write_tiny_model(root / "source", torch.bfloat16)
    for kind, (name, changes) in (REFUSED | {"plain": ("rtn", {})}).items():
        overrides = changes.get("override", ())
        chosen = recipe(name, **{key: value for key, value in changes.items() if key != "override"})
        write(source, root / kind, replace(chosen, override=overrides))
    export_for_vllm(root / "a transform", root / "exported")
    words = [str(root / kind) for kind in (*REFUSED, "plain", "exported")] + [f"{root / 'a transform'},dequantize"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return root, {str(Path(word).name): tuple(answer) for word, answer in found.items()}


@pytest.mark.parametrize("kind", [*REFUSED, "a transform,dequantize", "exported"])
def test_they_refuse_what_they_would_compute_otherwise(said: tuple[Path, Any], kind: str) -> None:
    answer, opened = said[1][kind]
    assert "ValidationError" in answer and "mxrot" in answer and opened == 0


def test_they_load_what_is_plain_compressed_tensors(said: tuple[Path, Any]) -> None:
    root, answers = said
    assert answers["plain"][0] == "loaded" and answers["plain"][1] > 0
    own = mxrot.load(root / "plain", device="cpu")
    theirs = load_file(root / "plain.safetensors")
    linears = {name: module for name, module in own.named_modules() if isinstance(module, QuantLinear)}
    assert {f"{name}.weight" for name in linears} == theirs.keys()
    for name, linear in linears.items():
        assert torch.equal(linear.dequantized_weight(), theirs[f"{name}.weight"])
