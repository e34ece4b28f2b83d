"""A comparison equals its parts done by hand; and what a model weighs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny_model import tiny_config, write_tiny_model
from transformers import LlamaForCausalLM

import mxrot
from mxrot import api
from mxrot.errors import ConfigError
from mxrot.evaluation import perplexity
from mxrot.layers import ModelSize
from mxrot.recipe import load_recipe
from mxrot.report.comparing import compare_recipes, model_size
from mxrot.text import load_text, token_windows

BLOCK_WEIGHTS = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
"""Weights of the linears of one block of the tiny model: q and o, k and v, the three of the MLP."""
OUTER = 2 * 256 * 64 + 64 + 2 * (64 + 64)
"""Embedding, head, and norms of two blocks."""
RECIPE = load_recipe("duquant++").changed({"transform.steps": 4})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"the number {number} follows {number - 1}; " for number in range(60)))
    return str(path)


def test_rows_are_what_the_parts_give_alone(folder: Path, words: str) -> None:
    options = {"calib": words, "samples": 2, "seq_len": 32, "seed": 3}
    rows = compare_recipes(str(folder), [load_recipe("rtn"), RECIPE], texts=[words], windows=3, **options)  # type: ignore[arg-type]
    windows = token_windows(load_text(words, "evaluation"), api.load_tokenizer(folder), 32, 3)
    alone = {
        "FP16": api.open_model(folder)[0],
        "rtn": mxrot.quantize(folder, "rtn"),
        "duquant++": mxrot.quantize(folder, RECIPE, **options),  # type: ignore[arg-type]
    }
    assert [row.recipe for row in rows] == list(alone)
    for row, model in zip(rows, alone.values(), strict=True):
        batch = api.EVALUATION_TOKENS["cpu"] // 32
        assert row.perplexity == {"words": perplexity(model, windows, batch)}  # type: ignore[arg-type]
    assert len({row.perplexity["words"].ppl for row in rows}) == 3
    assert rows[0].quantize_seconds is None and all(row.quantize_seconds > 0 for row in rows[1:])  # type: ignore[operator]


def test_tells_what_it_is_at(folder: Path, words: str) -> None:
    told: list[str] = []
    compare_recipes(
        str(folder),
        [load_recipe("rtn")],
        texts=[words],
        windows=1,
        seq_len=32,
        progress=lambda done, total, what: told.append(what),
    )
    linears = [f"self_attn.{name}_proj" for name in "qo"] + ["mlp.gate_proj", "mlp.down_proj"]
    blocks = [(f"rtn, model.layers.{index}", linears) for index in range(2)]
    inside = [name for block, parts in blocks for name in (block, *(f"{block}.{part}" for part in parts))]
    rest = [name for name in dict.fromkeys(told) if name not in inside]
    assert rest == ["perplexity of FP16, tokens", "rtn, done", "perplexity of rtn, tokens"]
    assert [name for name in dict.fromkeys(told) if name in inside] == inside


def test_with_a_prompt_each_row_says_something(folder: Path, words: str) -> None:
    rows = compare_recipes(str(folder), [load_recipe("rtn")], texts=[words], windows=1, seq_len=32, prompt="one two")
    assert all(row.extra["generated"].startswith("one two ") for row in rows)
    assert all("\n" not in row.extra["generated"] for row in rows)


def test_a_model_that_does_not_fit_is_an_error_before_anything_is_told(tmp_path: Path, words: str) -> None:
    odd = write_tiny_model(tmp_path / "odd", intermediate_size=100)

    def never(done: int, total: int, what: str) -> None:
        raise AssertionError("work began")

    with pytest.raises(ConfigError, match=r"down_proj.*100"):
        compare_recipes(str(odd), [load_recipe("rtn")], texts=[words], windows=1, seq_len=32, progress=never)


# Size


def test_size_of_a_quantized_model(folder: Path) -> None:
    size = model_size(mxrot.quantize(folder, "rtn"), torch.float16)  # type: ignore[arg-type]
    assert size == ModelSize(
        quantized_weights=2 * BLOCK_WEIGHTS,
        code_bytes=2 * BLOCK_WEIGHTS // 2,
        scale_bytes=2 * BLOCK_WEIGHTS // 32,
        transform_bytes=0,
        other_bytes=2 * OUTER,
    )
    assert size.bits_per_weight == 4.25
    assert size.transform_bits_per_weight == 0


@pytest.mark.parametrize(("sharing", "matrices"), [("site", 4), ("block", 2 + 2 + 2 + 3)])
def test_transforms_are_counted_apart(folder: Path, words: str, sharing: str, matrices: int) -> None:
    recipe = RECIPE.changed({"transform.sharing": sharing})
    size = model_size(mxrot.quantize(folder, recipe, calib=words, samples=1, seq_len=32), torch.float16)  # type: ignore[arg-type]
    assert size.transform_bytes == 2 * matrices * 32 * 32 * 2
    assert size.bits_per_weight == 4.25
    assert size.transform_bits_per_weight == 8 * size.transform_bytes / (2 * BLOCK_WEIGHTS)
    assert size.total_bytes == size.code_bytes + size.scale_bytes + size.transform_bytes + 2 * OUTER


def test_a_model_that_is_not_quantized_has_no_bits_per_weight() -> None:
    size = model_size(LlamaForCausalLM(tiny_config()), torch.bfloat16)
    assert size.bits_per_weight is None and size.transform_bits_per_weight is None
    assert size.total_bytes == 2 * (OUTER + 2 * BLOCK_WEIGHTS)


def test_a_tied_head_is_counted_once() -> None:
    apart, tied = (
        model_size(LlamaForCausalLM(tiny_config(tie_word_embeddings=tie)), torch.bfloat16).total_bytes
        for tie in (False, True)
    )
    assert apart - tied == 2 * 256 * 64


def test_sizes_add_up() -> None:
    assert ModelSize(1, 2, 3, 4, 5) + ModelSize(10, 20, 30, 40, 50) == ModelSize(11, 22, 33, 44, 55)
