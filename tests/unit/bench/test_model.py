from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import ModelRow, Seconds, bench_model, model, model_table
from mxrot.layers import QuantLinear
from mxrot.recipe import load_recipe

CPU = torch.device("cpu")
CONFIG = tiny_config(architectures=["LlamaForCausalLM"])


@pytest.mark.parametrize(("name", "compiler"), [("mxrot", "aot_eager"), ("mxrot-vllm", None), ("rtn", None)])
def test_both_models_do_both_kinds_of_work(name: str, compiler: str | None) -> None:
    torch.compiler.reset()
    told: list[str] = []
    rows = bench_model(CONFIG, load_recipe(name), CPU, 16, 8, compiler, told.append)
    assert [(row.model, row.work) for row in rows] == [
        (kind, work) for kind in ("bf16", name) for work in ("prompt of 16", "token after 8")
    ]
    assert all(row.seconds is not None for row in rows) and len(told) == 4
    # 4.25 bits instead of 16, and transforms, which weigh much in a model this small
    share = rows[2].linear_bytes / rows[0].linear_bytes
    assert share == pytest.approx(4.25 / 16, abs=1e-3) if name == "rtn" else 0.27 < share < 2


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


def test_logits_that_are_not_finite_have_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = model.random_model

    def broken(*arguments: Any) -> Any:
        found = own(*arguments)
        found.lm_head.weight.data.fill_(float("inf"))
        return found

    monkeypatch.setattr(model, "random_model", broken)
    rows = bench_model(CONFIG, load_recipe("rtn"), CPU, 16, 8, None)
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
    bad = CliRunner().invoke(cli.app, ["bench", "model", "--hidden", "100", "--device", "cpu"])
    assert bad.exit_code == 2 and "--hidden must be" in bad.output
