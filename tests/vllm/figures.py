"""How far vLLM's Python path is from mxrot, for one checkpoint of a small model; no test.

PYTHONPATH=.venv-vllm/vllm:. .venv-vllm/bin/python tests/vllm/figures.py CHECKPOINT [WINDOWS LENGTH]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

import torch
from tests.vllm import plain_vllm
from tests.vllm.test_stock import linears_of, parts_of, relative_error
from torch import Tensor

import mxrot
from mxrot import api
from mxrot.layers import QuantLinear
from mxrot.marker import IN_VLLM
from mxrot.text import load_text, token_windows
from mxrot.vllm.plugin import register


def own(folder: Path, dtype: torch.dtype, quantizes_inputs: bool) -> Any:
    """mxrot's model, with inputs as they are unless `quantizes_inputs`."""
    model = mxrot.load(folder, dtype=dtype)
    for module in model.modules():
        if isinstance(module, QuantLinear) and not quantizes_inputs:
            module.activations = None
    return model


@torch.no_grad()
def linear_errors(stock: Any, model: Any) -> list[float]:
    """Of each linear of stock vLLM, on the same random input."""
    errors = []
    for name, linear in linears_of(stock).items():
        parts = [model.get_submodule(part) for part in parts_of(name)]
        x = torch.randn(64, parts[0].in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        errors.append(relative_error(linear.quant_method.apply(linear, x), torch.cat([p(x) for p in parts], dim=-1)))
    return sorted(errors)


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    return float(losses.exp())


def main(folder: Path, windows: int, length: int) -> None:
    tokens = token_windows(load_text("demo", "evaluation"), api.load_tokenizer(folder), length, windows)
    register()

    def say(what: str, found: Tensor, *references: Tensor) -> None:
        errors = ", ".join(f"{relative_error(found, reference):.4f}" for reference in references)
        print(f"{what:42} perplexity {perplexity(found, tokens):7.3f}  relative errors {errors}", flush=True)

    print("relative errors of logits: to mxrot in bfloat16, to mxrot in float32")
    for bits, quantizes in (("W4A4", True), ("W4A16", False)):
        plain_vllm.PlainKernel.quantizes_inputs = quantizes
        models = [own(folder, dtype, quantizes) for dtype in (torch.bfloat16, torch.float32)]
        with torch.no_grad():
            ours = [model(tokens).logits.float() for model in models]
        say(f"{bits} mxrot, bfloat16", ours[0], *ours)
        say(f"{bits} mxrot, float32", ours[1], *ours)
        ways = [("stock", "compressed-tensors", "bfloat16")]
        ways += [("plugin", IN_VLLM, "bfloat16"), ("plugin", IN_VLLM, "float32")] if quantizes else []
        for way, method, dtype in ways:
            config = plain_vllm.configure(folder, dtype, method, max(64, length))
            model = plain_vllm.load(config)
            say(f"{bits} {way}, {dtype}", plain_vllm.logits(model, config, tokens), *ours)
            if way == "stock":
                errors = linear_errors(model, models[0])
                low, middle, high = errors[0], errors[len(errors) // 2], errors[-1]
                print(f"{bits} linears of stock: median {middle:.4f}, {low:.4f} to {high:.4f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        plain_vllm.set_up(Path(scratch) / "rendezvous")
        main(Path(sys.argv[1]), *(int(x) for x in sys.argv[2:4] or (2, 512)))
