from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config
from typer.testing import CliRunner

from mxrot import cli
from mxrot.bench import ModelRow, Seconds, Works, bench_model, cache_scheme, model, model_lines, model_table
from mxrot.errors import ConfigError
from mxrot.layers import HeadLinear, QuantLinear
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
    assert cells[4] == ["bfloat16", "packed"] * 4
    assert cells[6][:2] == ["1.000", "0.266"] and all(cells[7])


def test_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each context, batch and cache. Keys and values of all sequences are in the cache, and it is gone before
    the next one is filled."""
    alive: list[weakref.ref[Any]] = []

    def counted(kind: type) -> type:
        class Counted(kind):  # type: ignore[misc]
            def __init__(self, *arguments: Any) -> None:
                assert not any(one.is_filled for one in (reference() for reference in alive) if one is not None)
                super().__init__(*arguments)
                alive.append(weakref.ref(self))

        return Counted

    for name in ("FixedCache", "FixedPackedCache"):
        monkeypatch.setattr(model, name, counted(getattr(model, name)))
    works = Works(16, (8, 40), cache_scheme("mxfp4", "hadamard", 32, 2, 3), None, (1, 3))
    rows = [row for row in bench_model(WIDE, load_recipe("rtn"), CPU, works) if row.model == "rtn"]
    names = ["token after 8", "3 tokens after 8 each", "token after 40", "3 tokens after 40 each"]
    assert [row.work for row in rows] == ["prompt of 16", *(name for name in names for _ in range(2))]
    assert [row.as_record()["batch"] for row in rows] == [1, 1, 1, 3, 3, 1, 1, 3, 3]
    assert all(row.seconds is not None for row in rows) and len(alive) == 16
    for one, three in zip((*rows[1:3], *rows[5:7]), (*rows[3:5], *rows[7:9]), strict=True):
        # only the places of the newest tokens are shared by the sequences
        assert 0 <= 3 * one.cache_bytes - three.cache_bytes <= (0 if one.cache == "bfloat16" else 200)
    lines = model_lines(rows)
    assert lines == [f"rtn: linears of {rows[0].linear_bytes / 1e9:.3f} GB"]


def test_a_compiled_cache_is_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with torch.compile, whose compiled code would hold it, and which would compile the next size with dimensions
    that vary."""
    caches: list[weakref.ref[Any]] = []
    alive: list[int] = []
    own = model.token_step

    def step(*arguments: Any) -> model.TokenStep:
        alive.append(sum(reference() is not None for reference in caches))
        found = own(*arguments)
        caches.append(weakref.ref(found.cache))
        return found

    def compiler(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    shapes: list[list[tuple[Any, ...]]] = []
    monkeypatch.setattr(model, "token_step", step)
    torch.compiler.reset()
    rows = bench_model(CONFIG, load_recipe("rtn"), CPU, Works(None, (8, 16), None, compiler, (1, 3)))
    assert len(rows) == 8 and alive == [0] * 8
    assert len(shapes) == 8
    assert all(isinstance(size, int) for found in shapes for shape in found for size in shape)


@pytest.mark.parametrize("is_packed", [False, True])
def test_each_sequence_of_a_batch_generates_what_it_would_alone(is_packed: bool) -> None:
    torch.manual_seed(0)
    random = model.random_model(WIDE, CPU).float()
    scheme = cache_scheme("mxfp8", "none", 32)
    steps = [
        model.packed_token_step(random, 8, scheme, batch) if is_packed else model.token_step(random, 8, None, batch)
        for batch in (3, 1)
    ]
    together, _ = (step() for step in steps)
    assert together.shape == (3, 1, 256) and float(together.std(dim=0).min()) > 0
    for index in range(3):
        for many, one in zip(*(step.cache.kept for step in steps), strict=True):
            if is_packed:
                for rows, own in ((many.keys, one.keys), (many.values, one.values)):
                    own.codes.copy_(rows.codes[index : index + 1])
                    for name, part in own.parts.items():
                        part.copy_(rows.parts[name][index : index + 1])
            else:
                for found, own in zip(many, one, strict=True):
                    own.copy_(found[index : index + 1])
        torch.testing.assert_close(steps[1]()[0], together[index], rtol=1e-4, atol=1e-5)


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


def test_all_stages_of_a_transform_are_drawn() -> None:
    """A rotation, a permutation and another rotation keep the length of an input."""
    quantized = model.random_quantized_model(CONFIG, CPU, load_recipe("duquant"))
    linears = [module for module in quantized.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14
    for linear in linears:
        assert linear.transform is not None and len(linear.transform.specs) == 3
        x = torch.randn(5, linear.in_features)
        torch.testing.assert_close(linear.transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("format", "more"),
    [
        ("mxint8", {}),
        ("mxfp4", {}),
        ("mxfp4", {"head.transform": "hadamard"}),
        ("mxfp4", {"head.transform": "hadamard", "head.inputs": "mxfp4"}),
    ],
)
def test_a_quantized_head_is_drawn_too_and_is_no_linear_of_a_block(format: str, more: dict[str, Any]) -> None:
    """As large as that of the model. Its transform keeps the length of an input."""
    recipe = load_recipe("rtn").changed({"head.format": format} | more)
    quantized = model.random_quantized_model(CONFIG, CPU, recipe)
    head = quantized.lm_head
    assert isinstance(head, HeadLinear) and head.weights.format.name == format
    assert 0.25 < float(head.dequantized_weight().square().mean()) * CONFIG.hidden_size < 4
    assert (head.transform is None) is (not more)
    if head.transform is not None:
        x = torch.randn(5, head.in_features)
        torch.testing.assert_close(head.transform(x).norm(dim=-1), x.norm(dim=-1), rtol=1e-2, atol=0)
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

    rows = [row("bf16", 0.2, 100), row("mxrot", 0.1, 27)]
    table = model_table(rows)
    assert list(table.columns[4].cells) == ["1.00", "2.00"]
    assert model_lines(rows) == [
        "mxrot, prompt: 2.00 times as fast as bf16",
        "bf16: linears of 0.000 GB",
        "mxrot: linears of 0.000 GB, 0.270 of those of bf16",
    ]


def test_lines_compare_models_with_the_same_cache() -> None:
    def row(name: str, seconds: float, cache: str) -> ModelRow:
        return ModelRow(name, "token", Seconds(seconds, seconds, seconds), 10**9, cache, 100)

    packed = "keys mxfp4, values mxfp4"
    rows = [row("bf16", 4, "bfloat16"), row("bf16", 3, packed), row("mxrot", 2, "bfloat16"), row("mxrot", 1, packed)]
    assert model_lines(rows)[:2] == [
        "mxrot, token, bfloat16 cache: 2.00 times as fast as bf16",
        "mxrot, token, packed cache: 3.00 times as fast as bf16",
    ]
    assert model_table(rows).title == f"packed: {packed}"


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    shape = ["--blocks", "1", "--hidden", "64", "--ffn", "96", "--heads", "2", "--kv-heads", "1", "--vocabulary", "50"]
    work = ["--prompt", "16", "--context", "8", "--no-compile", "--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *work])
    assert result.exit_code == 0, result.output
    assert len(json.loads(path.read_text())["rows"]) == 4
    parts = [*work[:2], "--batch", "1,3", "--breakdown", *work[2:]]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *parts])
    assert result.exit_code == 0, result.output
    rows = json.loads(path.read_text())["rows"]
    assert [(row["batch"], row["breakdown"] is None) for row in rows] == [(1, True), (1, False), (3, False)] * 2
    for row in rows[1:3]:
        found = row["breakdown"]
        total = sum(part["seconds"] for part in found["parts"].values())
        assert found["step"] == row["seconds"] and found["idle"] == pytest.approx(row["seconds"]["median"] - total)
    assert "3 tokens after 8 each, not compiled: us (launches)" in result.output
    assert "mxrot, 3 tokens after 8 each: " in result.output
    more = ["--prompt", "0", "--context", "8,9", "--kv", "mxfp4", "--kv-first", "2", "--kv-last", "3"]
    more += ["--device", "cpu", "--json", str(path)]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *more])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    assert len(written["rows"]) == 8 and written["compiled"] is False
    head = ["--set", "head.format=mxint8", "--prompt", "0", "--context", "8", "--breakdown", "--no-compile"]
    result = CliRunner().invoke(cli.app, ["bench", "model", *shape, *head, "--device", "cpu", "--json", str(path)])
    assert result.exit_code == 0, result.output
    written = json.loads(path.read_text())
    plain, quantized = (row["breakdown"]["parts"]["head"]["launches"] for row in written["rows"])
    assert plain == 1 < quantized and 'format = "mxint8"' in written["recipe_toml"].partition("[head]")[2]
    wrong = (
        ["--kv", "mxfp4", "--compile"],
        ["--context", "8,x"],
        ["--batch", "0"],
        ["--kv", "mxfp5"],
        ["--kv-last", "3"],
        ["--kv-transform", "x", "--kv", "int4"],
        ["--kv-transform", "second-moment", "--kv", "int4"],
    )
    for options in wrong:
        assert CliRunner().invoke(cli.app, ["bench", "model", *shape, *options, "--device", "cpu"]).exit_code == 2
    bad = CliRunner().invoke(cli.app, ["bench", "model", "--hidden", "100", "--device", "cpu"])
    assert bad.exit_code == 2 and "--hidden must be" in bad.output
