from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import ModelRow, Seconds, Works, bench_model, cache_scheme, model, model_table
from mxrot.errors import ConfigError
from mxrot.layers import QuantLinear
from mxrot.recipe import load_recipe

CPU = torch.device("cpu")
CONFIG = tiny_config(architectures=["LlamaForCausalLM"])
WIDE = tiny_config(architectures=["LlamaForCausalLM"], head_dim=32)
"""With heads of 32."""


@pytest.mark.parametrize(("name", "compiler"), [("mxrot", "aot_eager"), ("mxrot-vllm", None), ("rtn", None)])
def test_both_models_do_both_kinds_of_work(name: str, compiler: str | None) -> None:
    torch.compiler.reset()
    told: list[str] = []
    works = Works(16, (8,), None, compiler)
    rows = bench_model(CONFIG, load_recipe(name), CPU, works, told.append)
    assert [(row.model, row.work) for row in rows] == [
        (kind, work) for kind in ("bf16", name) for work in ("prompt of 16", "token after 8")
    ]
    assert all(row.seconds is not None for row in rows) and len(told) == 4
    # 4.25 bits instead of 16, and transforms, which weigh much in a model this small
    share = rows[2].linear_bytes / rows[0].linear_bytes
    assert share == pytest.approx(4.25 / 16, abs=1e-3) if name == "rtn" else 0.27 < share < 2


def test_a_token_with_a_packed_cache_beside_one_without() -> None:
    """All numbers of a context are drawn, and the packed cache is 4.25/16 of the other."""
    works = Works(None, (8, 40), cache_scheme("mxfp4", "hadamard", 32), None)
    rows = bench_model(WIDE, load_recipe("rtn"), CPU, works)
    kinds = ["bfloat16", "keys mxfp4 even under hadamard, values mxfp4 even under hadamard"]
    assert [(row.model, row.work, row.cache) for row in rows] == [
        (name, f"token after {context}", kind) for name in ("bf16", "rtn") for context in (8, 40) for kind in kinds
    ]
    for unpacked, packed in zip(rows[::2], rows[1::2], strict=True):
        assert packed.seconds is not None and packed.cache_bytes == unpacked.cache_bytes * 4.25 / 16
    cells = [list(column.cells) for column in model_table(rows).columns]
    assert cells[9][:2] == ["1.000", "0.266"] and all(cells[10])


def test_packed_and_unpacked_tokens_are_nearly_the_same() -> None:
    """In eight bits, with the numbers that were drawn for one of them in both."""
    torch.manual_seed(0)
    random = model.random_model(WIDE, CPU)
    dense = model.token_step(random, 8)
    packed = model.packed_token_step(random, 8, cache_scheme("mxfp8", "none", 32))
    dense(), packed()
    for (keys, values), tokens in zip(dense.cache.kept, packed.cache.kept, strict=True):
        keys.copy_(tokens.keys.dequantize())
        values.copy_(tokens.values.dequantize())
    expected, found = dense(), packed()
    assert expected.std() > 0.1 and (found - expected).norm() < 0.03 * expected.norm()


def test_what_caches_are_measured() -> None:
    assert cache_scheme("int4", "none", 64).spelled == "keys int4_row_asym minmax, values int4_row_asym minmax"
    assert cache_scheme("mxfp4", "second-moment", 64).key_transform == "stored"
    for name, transform, width in (("mxfp4", "x", 64), ("none", "none", 64), ("mxfp4", "none", 48)):
        with pytest.raises(ConfigError, match="--kv"):
            cache_scheme(name, transform, width)


def test_a_generated_token_is_the_next_one_of_the_prompt() -> None:
    """With keys and values of the tokens before it in the cache, logits are those of the whole."""
    random = model.random_model(CONFIG, CPU).float()
    ids = torch.arange(5)[None]
    cache = model.FixedCache(5)
    logits = torch.empty(0)
    with torch.no_grad():
        for position in range(5):
            cache.position = torch.tensor([position])
            visible = (torch.arange(5) <= position)[None, None, None]
            logits = random(
                input_ids=ids[:, position : position + 1],
                position_ids=cache.position[None],
                attention_mask=visible,
                past_key_values=cache,
            ).logits
        torch.testing.assert_close(logits[:, -1:], random(ids).logits[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "nvfp4", "int4_g32_asym"])
def test_drawn_weights_are_as_large_as_those_of_the_model(format: str) -> None:
    recipe = load_recipe("mxrot").changed({"weights.format": format, "weights.rule": "", "rounding.method": "rtn"})
    quantized = model.random_quantized_model(CONFIG, CPU, recipe)
    sizes = [
        float(module.dequantized_weight().square().mean()) * module.in_features
        for module in quantized.modules()
        if isinstance(module, QuantLinear)
    ]
    assert len(sizes) == 14 and all(0.25 < size < 4 for size in sizes)


@pytest.mark.parametrize("format", ["mxint8", "mxfp4"])
def test_a_quantized_head_is_drawn_too_and_is_no_linear_of_a_block(format: str) -> None:
    """As large as that of the model."""
    recipe = load_recipe("rtn").changed({"head.format": format})
    quantized = model.random_quantized_model(CONFIG, CPU, recipe)
    assert isinstance(quantized.lm_head, QuantLinear) and quantized.lm_head.weights.format.name == format
    assert 0.25 < float(quantized.lm_head.dequantized_weight().square().mean()) * CONFIG.hidden_size < 4
    plain = model.random_quantized_model(CONFIG, CPU, load_recipe("rtn"))
    assert model.linear_bytes(quantized) == model.linear_bytes(plain)
    rows = bench_model(CONFIG, recipe, CPU, Works(16, (8,), None, None))
    assert all(row.seconds is not None for row in rows)


def test_logits_that_are_not_finite_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.random_model

    def broken(*arguments: Any) -> Any:
        found = own(*arguments)
        found.lm_head.weight.data.fill_(float("inf"))
        return found

    monkeypatch.setattr(model, "random_model", broken)
    rows = bench_model(CONFIG, load_recipe("rtn"), CPU, Works(16, (8,), None, None))
    assert all(row.seconds is None for row in rows)
    assert "LOGITS ARE NOT FINITE" in list(model_table(rows).columns[2].cells)


def test_the_table_compares_with_the_first_model() -> None:
    def row(name: str, seconds: float, size: int) -> ModelRow:
        return ModelRow(name, "prompt", Seconds(seconds, seconds, seconds), size)

    table = model_table([row("bf16", 0.2, 100), row("mxrot", 0.1, 27)])
    assert list(table.columns[4].cells) == ["1.00", "2.00"]
    assert list(table.columns[6].cells) == ["1.000", "0.270"]


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = ["--blocks", "1", "--hidden", "64", "--ffn", "96", "--heads", "2", "--kv-heads", "1", "--vocabulary", "50"]
    work = ["--prompt", "16", "--context", "8", "--no-compile", "--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *work])
    assert result.exit_code == 0, result.output
    assert len(json.loads(path.read_text())["rows"]) == 4
    more = ["--prompt", "0", "--context", "8,9", "--kv", "mxfp4", "--kv-first", "2", "--kv-last", "3"]
    more += ["--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *more])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 8 and written["compiled"] is False
    wrong = (
        ["--kv", "mxfp4", "--compile"],
        ["--context", "8,x"],
        ["--kv", "mxfp5"],
        ["--kv-last", "3"],
        ["--kv-transform", "x", "--kv", "int4"],
        ["--kv-transform", "second-moment", "--kv", "int4"],
    )
    for options in wrong:
        assert CliRunner().invoke(cli.app, ["bench", "model", *shape, *options, "--device", "cpu"]).exit_code == 2
    bad = CliRunner().invoke(cli.app, ["bench", "model", "--hidden", "100", "--device", "cpu"])
    assert bad.exit_code == 2 and "--hidden must be" in bad.output
