"""What a config says is installed, and run.json as tables take it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.folders import logits, recipe, write

from mxrot.checkpoint import load, read_run
from mxrot.checkpoint.config import check_layout, quantization_config
from mxrot.checkpoint.installed import Installed, check_recipe, read_installed
from mxrot.errors import CheckpointError
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.recipe import builtin_recipes


@pytest.mark.parametrize("name", [name for name in sorted(builtin_recipes()) if "released" not in name])
def test_what_is_written_is_read(name: str) -> None:
    chosen = recipe(name, ignore=["q_proj"])
    ignored = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    table = json.loads(json.dumps(quantization_config(chosen, LLAMA, 2, ignored)))
    installed = read_installed(table)
    assert installed == Installed.by(chosen, tuple(ignored))
    check_layout(table, installed, LLAMA, 2)
    check_recipe(chosen, installed, LLAMA, 2)
    check_layout(table | {"version": "1.0"}, installed, LLAMA, 2)  # of other programs
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj is left as it is in config\.json only"):
        check_recipe(recipe(name), installed, LLAMA, 2)


def test_the_first_checkpoints_had_no_accumulation(source: Path, tmp_path: Path) -> None:
    write(source, tmp_path / "out", recipe("hadamard"))
    expected = logits(load(tmp_path / "out"))
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]["mxrot"]["accumulation"]
    path.write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path / "out", verify=False)), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.pop("size"), "has no 'size'"),
        (lambda run: run.update(seed="x"), "seed: expected int, got 'x'"),
        (lambda run: run.update(seed=True), "seed: expected int, got True"),
        (lambda run: run["blocks"][0].pop("linears"), "blocks: has no 'linears'"),
        (lambda run: run["blocks"][0]["linears"][0].update(shape=[1]), r"a linear has the shape \[1\]"),
        (lambda run: run.update(blocks=[5]), "blocks: expected dict, got 5"),
    ],
)
def test_a_record_that_no_table_can_take(source: Path, tmp_path: Path, change: Any, message: str) -> None:
    write(source, tmp_path / "out", recipe("rtn"))
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert read_run(tmp_path / "out") == run
    change(run)
    (tmp_path / "out" / "run.json").write_text(json.dumps(run))
    with pytest.raises(CheckpointError, match=message):
        read_run(tmp_path / "out")
