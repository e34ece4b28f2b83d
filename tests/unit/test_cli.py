"""The command line on a tiny model: what it writes, what it exits with, and which options it has."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tests.contracts.tiny_configs import auto_class, config_of
from tests.tiny_model import write_tiny_model, write_tokenizer
from tests.unit.evaluation.task_folder import write_scorable_model, write_task_folder
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from mxrot import quantizing
from mxrot.cli import app
from mxrot.commands.selection import chosen_recipes
from mxrot.errors import NumericsError
from mxrot.models import FAMILIES
from mxrot.opening import default_device
from mxrot.recipe import Recipe
from mxrot.recipe_files import builtin_recipes
from mxrot.sections import HeadChoice

HELP = ["-h", "--help"]
OPTIONS = {
    "quantize": [
        *("model", "-o", "--output", "-r", "--recipe", "--for", "--set", "--calib", "--samples", "--seq-len", "--seed"),
        *("--head", "--family", "--revision", "--device", "--force", "--resume", "--json", "--time-limit", "--metrics"),
        "--tensorboard",
    ],
    "eval": [
        *("model", "--text", "--windows", "--seq-len", "--against", "--tasks", "--task-data", "--limit"),
        *("--kv", "--kv-transform", "--kv-first", "--kv-last", "--calib"),
        *("--batch-size", "--resume", "--family", "--revision", "--device", "--verify", "--json"),
    ],
    "compare": [
        *("model", "--recipes", "--checkpoints", "--without", "--set", "--calib", "--samples", "--text", "--windows"),
        *("--seq-len", "--kv", "--kv-transform", "--kv-first", "--kv-last"),
        *("--kl-windows", "--tasks", "--task-data", "--limit", "--seed", "--seeds", "--work", "--resume"),
        *("--revision", "--device", "--json", "--csv", "--plot", "--plots", "--html"),
    ],
    "search": [
        *("model", "--bits", "--input-bits", "--choices", "--inputs-only", "-o", "--output", "-r", "--recipe", "--set"),
        *("--calib", "--samples", "--text", "--windows", "--seq-len", "--seed", "--work", "--resume"),
        *("--revision", "--device", "--json", "--plot"),
    ],
    "inspect": [
        *("model", "--text", "--windows", "--seq-len", "--kernels", "--top", "--sort", "--family"),
        *("--revision", "--device", "--verify", "--json"),
    ],
    "plan": [
        *("model", "-r", "--recipe", "--for", "--set", "--samples", "--seq-len", "--gpu-memory", "--processes"),
        *("--head", "--rates", "--family", "--revision", "--device", "--json"),
    ],
    "generate": [
        *("model", "prompt", "--max-tokens", "--kv", "--kv-transform", "--kv-first", "--kv-last", "--calib"),
        *("--chat", "--system", "--temperature", "--top-p", "--top-k", "--seed", "--stream"),
        *("--revision", "--device", "--verify"),
    ],
    "serve": [
        *("model", "more", "--program", "--stock", "--tensor-parallel", "--max-len", "--dry-run"),
        *("--revision", "--verify"),
    ],
    "push": ["model", "repository", "--private", "--message", "--dry-run"],
    "export": ["model", "--to", "-o", "--output", "--force", "--verify", "--json"],
    "recipes": ["name", "--defaults"],
    "report": [
        *("model", "-o", "--output", "--against", "--text", "--windows", "--seq-len", "--site", "--results"),
        *("--baseline", "--plots", "--surface", "--card", "--revision", "--device", "--verify"),
    ],
    "demo": ["--seed", "--device", "--json"],
    "bench kernels": ["--rows", "--shape", "--tiles", "--lut", "--remember", "--device", "--json"],
    "bench quantize": [
        *("model", "--recipes", "--set", "--calib", "--samples", "--seq-len", "--repeats", "--device", "--json"),
    ],
    "bench cache": [
        *("--kv", "--kv-transform", "--batch", "--context", "--heads", "--kv-heads", "--width", "--device", "--json"),
    ],
    "bench model": [
        *("--kv", "--kv-transform", "--kv-first", "--kv-last"),
        *("-r", "--recipe", "--set", "--blocks", "--hidden", "--ffn", "--heads", "--kv-heads", "--vocabulary"),
        *("--prompt", "--context", "--batch", "--compile", "--breakdown", "--device", "--json"),
    ],
}
QUICK = ("--set", "transform.steps=4", "--samples", "2", "--seq-len", "32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A tiny model, a text of 4,000 characters, one of 10, and a checkpoint of the model."""
    root = tmp_path_factory.mktemp("cli")
    model = write_tiny_model(root / "tiny")
    (root / "words.txt").write_text("".join(f"the number {number} follows {number - 1}; " for number in range(140)))
    (root / "short.txt").write_text("ten bytes.")
    named = {"model": str(model), "text": str(root / "words.txt"), "short": str(root / "short.txt")}
    quantized = root / "quantized"
    run("quantize", named["model"], "-o", str(quantized), "-r", "duquant++", "--calib", named["text"], *QUICK)
    yield named | {"checkpoint": str(quantized)}


@pytest.fixture(scope="module")
def scorable(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that lm-eval can ask, and data of tasks."""
    model = write_scorable_model(tmp_path_factory.mktemp("scorable"))
    data = write_task_folder(tmp_path_factory.mktemp("data"))
    return folders | {"model": str(model), "data": str(data)}


@pytest.fixture(autouse=True)
def without_foreign_progress() -> Iterator[None]:
    """What `main` does before it hands over to the commands."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(*arguments: str) -> Result:
    """A call that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def one_line_error(result: Result, code: int) -> str:
    """The message of a call that must fail with one line; it holds no traceback."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mxrot: error: "), result.stderr
    return lines[0].removeprefix("mxrot: error: ")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# What there is


def commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    for name, sub in group.commands.items():
        if hasattr(sub, "commands"):
            yield from commands(sub, f"{before}{name} ")
        else:
            yield before + name, sub


def test_commands_and_their_options_are_these() -> None:
    found = {
        name: [spelling for param in sub.params for spelling in (param.opts if param.name != "help" else [])]
        for name, sub in commands(typer.main.get_command(app))
    }
    assert {name: sorted(options) for name, options in found.items()} == {
        name: sorted(options) for name, options in OPTIONS.items()
    }


@pytest.mark.parametrize("arguments", [[], *[name.split() for name in OPTIONS]], ids=str)
@pytest.mark.parametrize("spelling", HELP)
def test_help_has_no_line_cut_short(arguments: list[str], spelling: str) -> None:
    shown = run(*arguments, spelling).stdout
    assert "Usage" in shown
    assert "..." not in shown.split("Options:")[1]


def test_no_command_shows_help_and_exits_2() -> None:
    result = call()
    assert result.exit_code == 2
    assert "quantize" in result.output


# What it does


def test_quantize_writes_a_checkpoint_and_says_what_next(folders: dict[str, str], tmp_path: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "run.json"
    result = run("quantize", folders["model"], "-o", str(out), "-r", "rtn", "--json", str(table))
    assert read_json(table) == read_json(out / "run.json")
    assert "2 blocks with rtn" in result.stdout
    assert "4.250 bits a weight" in result.stdout
    assert f"mxrot eval {out}" in result.stdout


def test_quantize_hands_each_option_on(folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    where = ("-o", str(out), "--calib", f"words={folders['text']}", "--seed", "7", "--device", "cpu")
    changes = ("--set", "weights.rule=floor", "--set", 'ignore=["down_proj"]')
    run("quantize", folders["model"], "-r", "duquant++", *where, *QUICK, *changes)
    record = read_json(out / "run.json")
    assert record["seed"] == 7
    assert record["data"]["text"] == "words"
    assert record["windows"] == [2, 32]
    assert 'rule = "floor"' in record["recipe"] and "steps = 4" in record["recipe"]
    assert not [linear for block in record["blocks"] for linear in block["linears"] if "down_proj" in linear["name"]]


def test_quantize_force_replaces_and_resume_recognizes(folders: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("quantize", folders["model"], "-o", str(out), "-r", "rtn")
    run(*command)
    (out / "mine.txt").write_text("")
    run(*command, "--resume")
    assert (out / "mine.txt").exists(), "a finished run was made again"
    assert "not empty" in one_line_error(call(*command), 2)
    run(*command, "--force")
    assert not (out / "mine.txt").exists()


@pytest.mark.parametrize("which", ["model", "checkpoint"])
def test_eval_json(folders: dict[str, str], tmp_path: Path, which: str) -> None:
    table = tmp_path / "table.json"
    texts = ("--text", folders["text"], "--text", f"again={folders['text']}")
    result = run("eval", folders[which], *texts, "--windows", "3", "--seq-len", "64", "--json", str(table))
    found = read_json(table)
    expected = [
        "model",
        "perplexity",
        "texts",
        "cache",
        "against",
        "divergence",
        "tasks",
        "processes",
        "seconds",
        "kernels",
    ]
    assert list(found) == [*expected, "versions"] and found["cache"] is None
    assert found["model"] == folders[which]
    assert list(found["perplexity"]) == ["words", "again"]
    words = found["perplexity"]["words"]
    assert list(words) == ["ppl", "nll", "windows", "tokens", "seq_len"]
    assert (words["windows"], words["tokens"], words["seq_len"]) == (3, 3 * 63, 64)
    assert found["perplexity"]["again"] == words
    assert f"{words['ppl']:.3f}" in result.stdout


def test_eval_against_the_original(folders: dict[str, str], tmp_path: Path) -> None:
    """The perplexity of the table is that of eval alone."""
    options = ("--text", f"words={folders['text']}", "--windows", "3", "--seq-len", "64")
    found = {}
    for name, more in (("alone", ()), ("both", ("--against", folders["model"]))):
        path = tmp_path / f"{name}.json"
        shown = run("eval", folders["checkpoint"], *options, *more, "--json", str(path)).stdout
        found[name] = read_json(path)
        assert ("same top" in shown) == (name == "both")
    assert found["alone"]["divergence"] is None and found["both"]["against"] == folders["model"]
    words = found["both"]["divergence"]["words"]
    assert words["kl"] > 0 and words["ppl"] != words["original_ppl"]
    here, alone = (found[name]["perplexity"]["words"] for name in ("both", "alone"))
    assert here == pytest.approx(alone, rel=1e-9)


def test_eval_tasks_json_and_resume(scorable: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks alone take no text; what an interrupt leaves behind is gone when the result is written."""
    from mxrot.evaluation.harness import Harness

    table = tmp_path / "table.json"
    kept = tmp_path / "table.json.partial"
    command = ("eval", scorable["model"], "--tasks", "piqa, lambada_openai", "--task-data", scorable["data"])
    command = (*command, "--limit", "4", "--batch-size", "1", "--json", str(table))
    tell = Harness._tell

    def stopped(self: Any) -> None:
        tell(self)
        if self._task == "lambada_openai" and self._done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Harness, "_tell", stopped)
    result = call(*command)
    assert result.exit_code == 1 and not table.exists()
    assert result.stderr.splitlines()[-1].endswith("answers to tasks are kept, and --resume continues from them")
    assert len(kept.read_text().splitlines()) == 1 + 8 + 2
    monkeypatch.setattr(Harness, "_tell", tell)
    shown = run(*command, "--resume").stdout
    assert not kept.exists()
    found = read_json(table)
    assert found["perplexity"] == {} and "lm_eval" in found["versions"]
    assert list(found["tasks"]) == ["piqa", "lambada_openai"]
    assert list(found["tasks"]["piqa"]) == ["acc", "acc_norm", "stderr", "acc_norm_stderr", "n", "split", "sha256"]
    assert [score["n"] for score in found["tasks"].values()] == [4, 4]
    assert f"{100 * found['tasks']['piqa']['acc_norm']:.2f} % +- " in shown
    run(*command, "--text", scorable["text"], "--seq-len", "64", "--windows", "1")
    again = read_json(table)
    assert again["tasks"] == found["tasks"] and list(again["perplexity"]) == ["words"]


def test_compare_tasks(scorable: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    text = ("--text", scorable["text"], "--windows", "1", "--seq-len", "32", "--work", str(tmp_path / "work"))
    asked = ("--tasks", "piqa", "--task-data", scorable["data"], "--limit", "3", "--json", str(table))
    shown = run("compare", scorable["model"], "--recipes", "rtn", *text, *asked).stdout
    rows = read_json(table)["rows"]
    assert "acc_norm" in shown and f"{100 * rows[1]['tasks']['piqa']['acc_norm']:.2f} +- " in shown
    assert [row["tasks"]["piqa"]["n"] for row in rows] == [3, 3]


COMPARED = ("--samples", "2", "--seq-len", "32", "--windows", "4")


def test_compare_json(folders: dict[str, str], tmp_path: Path) -> None:
    table, lines = tmp_path / "table.json", tmp_path / "table.csv"
    text = ("--text", folders["text"], "--calib", folders["text"], "--work", str(tmp_path / "work"))
    files = ("--json", str(table), "--csv", str(lines))
    result = run("compare", folders["model"], "--recipes", "rtn, hadamard", *COMPARED, *text, *files)
    found = read_json(table)
    assert {"rows", "model", "seeds", "texts", "device", "kernels", "versions"} <= found.keys()
    rows = found["rows"]
    assert rows[0]["recipe"] == "FP16" and sorted(row["recipe"] for row in rows[1:]) == ["hadamard", "rtn"]
    assert [row["ratio"] for row in rows[1:]] == sorted(row["ratio"] for row in rows[1:])
    for row in rows:
        assert {"recipe", "bits_per_weight", "seconds", "perplexity", "megabytes"} <= row.keys()
        assert f"{row['perplexity']['words']:.2f}" in result.stdout
        assert row["perplexity"]["words"] / rows[0]["perplexity"]["words"] == pytest.approx(row["ratio"])
    assert [row["bits_per_weight"] for row in rows] == [16.0, 4.25, 4.25]
    assert [row["bits_per_kv_element"] for row in rows] == [16.0] * 3
    assert [row["seconds"] is None for row in rows] == [True, False, False]
    assert [row["kl"] is None for row in rows] == [True, False, False]
    with lines.open(newline="") as file:
        read = list(csv.DictReader(file))
    assert [line["recipe"] for line in read] == [row["recipe"] for row in rows]
    assert [float(line["perplexity words"]) for line in read] == [row["perplexity"]["words"] for row in rows]


def test_compare_goes_on_with_what_was_finished(folders: dict[str, str], tmp_path: Path) -> None:
    text = ("--text", folders["text"], "--calib", folders["text"], "--work", str(tmp_path / "work"))
    tables = [tmp_path / "first.json", tmp_path / "second.json"]
    run("compare", folders["model"], "--recipes", "rtn", *COMPARED, *text, "--json", str(tables[0]))
    again = run(
        *("compare", folders["model"], "--recipes", "rtn,hadamard", *COMPARED, *text),
        *("--resume", "--json", str(tables[1])),
    )
    assert "2 of 3 runs were finished before" in again.stderr
    first, second = ({row["recipe"]: row for row in read_json(table)["rows"]} for table in tables)
    assert {name: second[name] for name in first} == first and "hadamard" in second


def test_compare_draws(folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = ("--text", folders["text"], "--work", str(tmp_path / "work"))
    for name, begins in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        run(
            "compare",
            folders["model"],
            "--recipes",
            "rtn",
            *COMPARED,
            *text,
            "--resume",
            "--plot",
            str(tmp_path / name),
        )
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_compare_writes_a_page_and_pictures_with_their_numbers(folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page, plots = tmp_path / "page.html", tmp_path / "plots"
    where = ("--text", folders["text"], "--work", str(tmp_path / "work"), "--html", str(page), "--plots", str(plots))
    asked = ("compare", folders["model"], "--recipes", "rtn", "--checkpoints", folders["checkpoint"], *COMPARED)
    shown = run(*asked, *where).stdout
    assert f"{page}: " in shown and f"{plots}: 5 pictures, each as PNG, SVG and CSV" in shown
    names = {"ratio", "kl", "agreement", "weight_errors", "output_errors"}
    assert {path.name for path in plots.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")
    }
    with (plots / "kl.csv").open(newline="") as file:
        assert sorted(line["recipe"] for line in csv.DictReader(file)) == ["quantized", "rtn"]
    written = page.read_text()
    assert "quantized" in written and "--checkpoints" in written and "--html" not in written


def test_compare_where_a_recipe_cannot_be_taken(folders: dict[str, str], tmp_path: Path) -> None:
    wide = tmp_path / "wide.toml"
    wide.write_text('name = "wide"\n[weights]\nformat = "mxfp4"\n[transform]\nmethod = "hadamard"\nblock = 64\n')
    table = tmp_path / "table.json"
    text = ("--text", folders["text"], "--work", str(tmp_path / "work"), "--json", str(table))
    shown = run("compare", folders["model"], "--recipes", f"{wide},rtn", *COMPARED, *text).stdout
    rows = read_json(table)["rows"]
    assert [row["recipe"] for row in rows] == ["FP16", "rtn", "wide"]
    assert "96 is not a multiple of" in rows[2]["reason"] and rows[2]["reason"] in shown
    message = one_line_error(call("compare", folders["model"], "--recipes", str(wide), *COMPARED, *text), 2)
    assert message == rows[2]["reason"]


def test_compare_takes_checkpoints_beside_recipes(folders: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    where = ("--text", folders["text"], "--work", str(tmp_path / "work"), "--json", str(table))
    shown = run("compare", folders["model"], "--checkpoints", folders["checkpoint"], *COMPARED, *where)
    alone = read_json(table)["rows"]
    assert [row["recipe"] for row in alone] == ["FP16", "quantized"]
    assert f"{100 * alone[1]['agreement']:.1f}" in shown.stdout and "from its run.json" in shown.stdout
    made = read_json(Path(folders["checkpoint"]) / "run.json")
    assert (alone[1]["seconds"], alone[1]["seeds"]) == (made["seconds"], [made["seed"]])
    assert alone[1]["checkpoint"] == folders["checkpoint"] and 'name = "duquant++"' in alone[1]["recipe_toml"]
    mixed = ("--checkpoints", folders["checkpoint"], "--recipes", "rtn", "--resume")
    again = run("compare", folders["model"], *mixed, *COMPARED, *where)
    assert "2 of 3 runs were finished before" in again.stderr
    rows = {row["recipe"]: row for row in read_json(table)["rows"]}
    assert set(rows) == {"FP16", "quantized", "rtn"} and rows["quantized"] == alone[1]


def test_compare_exits_with_2_if_nothing_ran(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(source: Path, recipe: Recipe, **_: object) -> None:
        raise NumericsError(f"model.layers.1 by {recipe.name}: NaN")

    monkeypatch.setattr(quantizing, "quantize", broken)
    text = ("--text", folders["text"], "--work", str(tmp_path / "work"))
    result = call("compare", folders["model"], "--recipes", "rtn,hadamard", *COMPARED, *text)
    assert result.exit_code == 2 and "none of them ran" in result.stderr
    for name in ("rtn", "hadamard"):
        assert f"{name} has no figures: model.layers.1 by {name}: NaN" in result.stdout


def test_all_and_untuned_are_recipes_that_come_with_mxrot() -> None:
    every = [recipe.name for recipe in chosen_recipes("all", "", [])]
    assert every == list(builtin_recipes())
    untuned = [recipe.name for recipe in chosen_recipes("untuned", "rtn", [])]
    assert not {"mxrot-tuned", "duquant-lwc", "spinquant", "rtn"} & set(untuned)
    assert {"mxrot", "quarot", "duquant", "hadamard"} <= set(untuned)
    assert [recipe.name for recipe in chosen_recipes("rtn,all,rtn", "mxrot", [])][:2] == ["rtn", every[0]]


def test_inspect_a_model_and_a_checkpoint(folders: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    options = ("--text", folders["text"], "--windows", "2", "--seq-len", "32", "--json", str(table))
    run("inspect", folders["model"], *options)
    plain = read_json(table)
    assert list(plain) == ["model", "sites", "kept"] and plain["kept"] == []
    assert len(plain["sites"]) == 2 * 4
    assert set(plain["sites"][0]) == {"site", "channels", "largest", "channel", "median", "ratio"}
    shown = run("inspect", folders["checkpoint"], *options).stdout
    found = read_json(table)
    assert list(found) == ["model", "sites", "kept", "blocks", "size", "quantizers", "attention", "cache"]
    assert found["quantizers"] == {"weights mxfp4 even, inputs mxfp4 even": 14}
    assert "14 linears: weights mxfp4 even, inputs mxfp4 even" in shown
    assert "│ 1.mlp.down_proj" in shown and "model.layers" not in shown
    assert f"{found['blocks'][1]['linears'][-1]['output_error']:.4f}" in shown
    shown = run("inspect", folders["checkpoint"], *options, "--kernels", "--device", "cpu").stdout
    assert "What computes the linears" in shown
    choices = read_json(table)["kernels"]
    assert {choice["rows"] for choice in choices} == {1, 16, 128, 2048}
    assert sum(choice["linears"] for choice in choices if choice["rows"] == 1) == 14
    assert all(choice["path"] is None and choice["reason"] == "cpu has no FP4 or FP8 products" for choice in choices)


def test_generate_prints_the_prompt_and_a_continuation_unwrapped(folders: dict[str, str]) -> None:
    prompt = "a word [bold] " * 20
    shown = run("generate", folders["checkpoint"], prompt, "--max-tokens", "3").stdout
    assert shown.startswith(prompt) and len(shown) > len(prompt) + 1


def test_report_writes_a_page_pictures_and_the_card(folders: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    checkpoint = tmp_path / "quantized"
    shutil.copytree(folders["checkpoint"], checkpoint)
    text = ("--text", folders["text"], "--windows", "2", "--seq-len", "32")
    where = ("-o", str(tmp_path / "page.html"), "--plots", str(tmp_path / "plots"), "--site", "1.mlp.down_proj")
    shown = run("report", str(checkpoint), "--against", folders["model"], *text, *where, "--card").stdout
    assert f"{tmp_path / 'page.html'}: " in shown and "10 pictures" in shown and "3 figures" in shown
    page = (tmp_path / "page.html").read_text()
    assert "model.layers.1.mlp.down_proj" in page and "magnitudes-model-layers-0" not in page
    assert len(list((tmp_path / "plots").iterdir())) == 3 * 10
    run("eval", str(checkpoint), *text, "--verify", "--json", str(tmp_path / "own.json"))
    run("eval", folders["model"], *text, "--json", str(tmp_path / "original.json"))
    ppl = [read_json(tmp_path / name)["perplexity"]["words"]["ppl"] for name in ("own.json", "original.json")]
    assert f"| {ppl[1]:.3f} | {ppl[0]:.3f} |" in (checkpoint / "README.md").read_text()
    figures = ("--results", str(tmp_path / "own.json"), "--baseline", str(tmp_path / "original.json"))
    run("report", str(checkpoint), *text, *figures, *where[:2])
    assert f"{ppl[0] - ppl[1]:+.3f}" in (tmp_path / "page.html").read_text()


def test_plan_of_a_folder_and_of_a_config_alone(folders: dict[str, str], tmp_path: Path) -> None:
    config, table = tmp_path / "some.json", tmp_path / "plan.json"
    config.write_text((Path(folders["model"]) / "config.json").read_text())
    for model in (folders["model"], str(config)):
        result = run("plan", model, "-r", "duquant++", *QUICK, "--json", str(table))
        found = read_json(table)
        assert list(found) == [
            *(
                "model",
                "recipe",
                "recipe_toml",
                "windows",
                "processes",
                "refused",
                "warnings",
                "sites",
                "kept",
                "size",
                "cache",
                "memory",
            ),
            *("text_spread", "disk", "seconds", "vllm", "versions", "verdict"),
        ]
        assert (found["model"], found["windows"], found["refused"]) == (model, [2, 32], [])
        assert "nothing would be refused" in result.stdout and "4.250 bits" in result.stdout
        assert "an estimate" in result.stdout


def test_plan_and_inspect_say_what_a_family_keeps(folders: dict[str, str], tmp_path: Path) -> None:
    family = FAMILIES["qwen3_5"]
    torch.manual_seed(0)
    auto_class(family).from_config(config_of(family, vocab_size=320)).save_pretrained(tmp_path / "model")
    write_tokenizer(tmp_path / "model")
    table = tmp_path / "table.json"
    options = ("--text", folders["text"], "--windows", "2", "--seq-len", "32")
    for words in (("inspect", *options), ("plan", "-r", "rtn")):
        shown = run(words[0], str(tmp_path / "model"), *words[1:], "--json", str(table)).stdout
        small, others = read_json(table)["kept"]
        assert small["parts"] == ["linear_attn.in_proj_b", "linear_attn.in_proj_a"] and small["blocks"] == 1
        assert "linear_attn.conv1d" in others["parts"] and "linear_attn.A_log" in others["parts"]
        flat = " ".join(shown.split())
        for kept in (small, others):
            assert f"kept as they are in 1 block: {', '.join(kept['parts'])} ({kept['reason']})" in flat


def test_plan_exits_with_1_if_it_would_be_refused(folders: dict[str, str], tmp_path: Path) -> None:
    table = tmp_path / "plan.json"
    changes = ("-r", "duquant++-released", "--set", 'smoothing.skip=["nosuch"]')
    result = call("plan", folders["model"], *changes, "--json", str(table))
    assert result.exit_code == 1 and not result.stderr
    refused = read_json(table)["refused"]
    assert len(refused) == 2 and all(f"refused: {line}" in result.stdout for line in refused)


def test_recipes_lists_all_and_prints_one_that_can_be_read_again(folders: dict[str, str], tmp_path: Path) -> None:
    from mxrot.recipe import builtin_recipes, load_recipe

    listed = run("recipes").stdout
    assert all(f" {name} " in listed for name in builtin_recipes())
    own = tmp_path / "own.toml"
    own.write_text(run("recipes", "duquant++").stdout)
    assert load_recipe(own) == load_recipe("duquant++")


# How it fails


BAD_INPUT = {
    "no such folder": (("eval", "./nowhere"), "./nowhere: no such model folder"),
    "not a model": (("eval", "{parent}"), "config.json"),
    "plan of no model": (("plan", "./nowhere"), "./nowhere: no such model folder"),
    "plan of no config": (("plan", "{text}"), "is a file; expected a model folder"),
    "plan of an empty folder": (("plan", "{parent}"), "config.json"),
    "bad recipe": (("quantize", "{model}", "-r", "nosuch"), "no recipe 'nosuch'"),
    "bad recipe of compare": (("compare", "{model}", "--recipes", "rtn,nosuch"), "no recipe 'nosuch'"),
    "no checkpoint": (("compare", "{model}", "--checkpoints", "{model}"), "not a checkpoint written by mxrot"),
    "a checkpoint twice": (
        ("compare", "{model}", "--checkpoints", "{checkpoint},{checkpoint}"),
        "--checkpoints: names",
    ),
    "no recipe": (("compare", "{model}", "--recipes", ","), "--recipes"),
    "all left out": (("compare", "{model}", "--recipes", "rtn", "--without", "rtn"), "--recipes: name at least one"),
    "nothing to leave out": (("compare", "{model}", "--without", "hadamrd"), "did you mean 'hadamard'?"),
    "seeds in words": (("compare", "{model}", "--seeds", "few"), "--seeds few: expected a number of seeds"),
    "no seed": (("compare", "{model}", "--seeds", "0"), "--seeds 0: expected 1 to 100"),
    "a seed twice": (("compare", "{model}", "--seeds", "1,1"), "names a seed twice"),
    "pictures into a file": (("compare", "{model}", "--plots", "{short}"), "--plots {short}: is a file; give a folder"),
    "page into a folder": (("compare", "{model}", "--html", "{parent}"), "is a folder; name the file to write"),
    "plot of no kind": (("compare", "{model}", "--plot", "a.jpeg"), "--plot a.jpeg: expected a name that ends in .png"),
    "work in a file": (
        ("compare", "{model}", "--recipes", "rtn", "--text", "{text}", "--seq-len", "32", "--work", "{short}"),
        "is a file; name a folder",
    ),
    "set without value": (("quantize", "{model}", "--set", "weights"), "--set 'weights'"),
    "set unknown key": (("quantize", "{model}", "--set", "weights.colour=1"), "unknown key 'colour'"),
    "set bad value": (("quantize", "{model}", "-r", "duquant++", "--set", "transform.steps=few"), "transform.steps"),
    "set bad rule": (("quantize", "{model}", "--set", "weights.rule=nosuch"), "nosuch"),
    "two texts of one name": (("eval", "{model}", "--text", "{text}", "--text", "{text}"), "the name 'words'"),
    "no text": (("eval", "{model}", "--text", "nowhere.txt"), "nowhere.txt"),
    "short text": (("eval", "{model}", "--text", "{short}"), "10 tokens do not fill one window of 2048"),
    "short calibration": (("quantize", "{model}", "-o", "{out}", "--calib", "{short}"), "10 tokens"),
    "bad device": (("eval", "{model}", "--device", "abacus"), "--device abacus"),
    "nowhere for the JSON": (("eval", "{model}", "--json", "nowhere/table.json"), "nowhere/table.json"),
    "not exportable": (("quantize", "{model}", "-o", "{out}", "-r", "duquant++-released"), "log256"),
    "report of a model": (("report", "{model}"), "not a checkpoint written by mxrot"),
    "report into a folder": (("report", "{checkpoint}", "-o", "{parent}"), "is a folder; name the file to write"),
    "report nowhere": (("report", "{checkpoint}", "-o", "nowhere/page.html"), "does not exist"),
    "plots into a file": (("report", "{checkpoint}", "--plots", "{short}"), "is a file; give a folder"),
    "results that are none": (("report", "{checkpoint}", "--results", "{short}"), "not JSON"),
    "baseline alone": (("report", "{checkpoint}", "--baseline", "{short}"), "with --results, too"),
    "no such site": (
        ("report", "{checkpoint}", "--text", "{text}", "--seq-len", "32", "--site", "x"),
        "no site matches",
    ),
    "resume without answers": (
        ("eval", "{model}", "--resume", "--tasks", "piqa"),
        "needs --tasks and --json",
    ),
    "limit of no task": (("eval", "{model}", "--limit", "3"), "--limit: needs --tasks"),
    "data of no task": (("compare", "{model}", "--task-data", "{parent}"), "--task-data: needs --tasks"),
    "no task": (("eval", "{model}", "--tasks", ","), "--tasks: name at least one"),
    "output is a file": (("quantize", "{model}", "-o", "{short}", "-r", "rtn"), "is a file"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(folders: dict[str, str], tmp_path: Path, case: str) -> None:
    arguments, expected = BAD_INPUT[case]
    if arguments[0] == "report" or {"--html", "--plots"} & set(arguments):
        pytest.importorskip("matplotlib")
    places = folders | {"out": str(tmp_path / "out"), "parent": str(tmp_path)}
    message = one_line_error(call(*(argument.format(**places) for argument in arguments)), 2)
    assert expected.format(**places) in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [("quantise",), ("eval", "--colour"), ("eval", "--windows", "0"), ("eval", "--seq-len", "x"), ("generate",)],
    ids=" ".join,
)
def test_bad_usage_exits_2_and_says_which(arguments: tuple[str, ...]) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr and "Error: " in result.stderr


def test_full_disk_is_one_line_and_exit_code_1(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mxrot.checkpoint import files

    def no_space(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.Path, "replace", no_space)
    result = call("quantize", folders["model"], "-o", str(tmp_path / "out"), "-r", "rtn")
    monkeypatch.undo()
    assert result.exit_code == 1
    errors = [line for line in result.stderr.splitlines() if not line.startswith("Quantizing with rtn: ")]
    assert len(errors) == 1 and "no space left" in errors[0]
    assert not list(tmp_path.iterdir())


def test_a_json_file_that_cannot_be_written_is_found_before_the_work(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "table").mkdir()
    options = ("--windows", "1", "--seq-len", "32", "--text", folders["text"], "--json")
    result = call("eval", folders["model"], *options, str(tmp_path / "table"))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith(f"mxrot: error: --json {tmp_path / 'table'}: is a folder")


def test_a_json_file_for_which_there_is_no_space_is_one_line_and_exit_code_1(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "replace", full)
    file = tmp_path / "table.json"
    options = ("--windows", "1", "--seq-len", "32", "--text", folders["text"], "--json", str(file))
    result = call("eval", folders["model"], *options)
    assert result.exit_code == 1 and "Perplexity" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"mxrot: error: {file}: no space left on the device")


# As a process


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mxrot.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_process_keeps_standard_error_to_its_own_lines(folders: dict[str, str]) -> None:
    process = start("eval", folders["model"], "--text", folders["text"], "--seq-len", "64", "--windows", "2")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "words" in shown
    assert [line for line in errors.splitlines() if not line.startswith("Evaluating: ")] == []
    first = f"Evaluating: {folders['model']}, on {default_device()}, on words\n"
    assert errors.startswith(first) and re.match(r"Evaluating: 0 of \d+ \(", errors.removeprefix(first))


def test_the_command_starts_without_torch_so_that_threads_can_be_told_how_to_wait() -> None:
    program = "import sys, mxrot.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"


def test_process_with_bad_model_exits_2_with_one_line() -> None:
    process = start("eval", "./nowhere")
    shown, errors = process.communicate(timeout=120)
    assert (process.returncode, shown) == (2, "")
    assert errors.count("\n") == 1 and errors.startswith("mxrot: error: ./nowhere: ")


def test_interrupt_exits_1_with_one_line_and_keeps_finished_blocks(folders: dict[str, str], tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "deep", num_hidden_layers=60)
    out = tmp_path / "out"
    options = ("--samples", "8", "--seq-len", "256", "--calib", folders["text"], "--recipe", "duquant++")
    process = start("quantize", str(model), "-o", str(out), *options, "--set", "transform.steps=512")
    first = tmp_path / "out.partial" / "block-00000.json"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1, errors
    own = [line for line in errors.splitlines() if not line.startswith("Quantizing with duquant++: ")]
    assert len(own) == 1 and own[0].startswith("mxrot: error: interrupted; finished blocks are kept"), errors
    assert first.exists() and not out.exists()


def test_export_says_what_vllm_does_and_writes(folders: dict[str, str], tmp_path: Path) -> None:
    output, table = tmp_path / "out", tmp_path / "report.json"
    said = run("export", folders["checkpoint"], "--to", "vllm", "-o", str(output), "--json", str(table)).output
    assert "runs it; tensor parallel 1" in said and f"vllm serve {output}" in said.replace("\n", "")
    found = json.loads(table.read_text())
    assert sorted(found) == ["devices", "folder", "notes", "output", "plugin", "stock", "vllm"]
    assert (output / "config.json").exists()


def test_export_refuses_in_one_line(folders: dict[str, str]) -> None:
    for arguments in (("export", folders["checkpoint"], "--to", "nothing"), ("export", folders["model"])):
        result = call(*arguments)
        assert result.exit_code == 2
        assert len(result.output.strip().splitlines()) == 1


def test_a_head_is_asked_for_planned_and_said(folders: dict[str, str], tmp_path: Path) -> None:
    chosen = ("-r", "rtn", "--head", "mxfp4/mxfp4")
    planned = run("plan", folders["model"], *chosen)
    # 256 rows of 64 numbers, codes of 4 bits and a byte for 32 of them, and one matrix in bfloat16.
    assert "in which the head takes 0.000 GB (weights mxfp4 even, inputs mxfp4 even, block-diagonal)" in planned.stdout
    made = run("quantize", folders["model"], *chosen, "-o", str(tmp_path / "out"))
    assert "in which the quantized head takes 0.0 MB" in made.stdout
    said = "the head lm_head, 256 x 64, is quantized: relative error of its weights 0.1"
    shown = run("inspect", str(tmp_path / "out"), "--text", folders["text"], "--seq-len", "32", "--windows", "1")
    assert said in made.stdout and said in shown.stdout
    found = Recipe.load(tmp_path / "out/recipe.toml").head
    assert found is not None and vars(found) == {
        "format": "mxfp4",
        "rule": "",
        "inputs": "mxfp4",
        "transform": "hadamard",
    }
    assert read_json(tmp_path / "out/run.json")["size"]["head_bytes"] == 256 * 64 // 2 + 256 * 2 + 32 * 32 * 2
    run(
        "quantize",
        str(folders["model"]),
        "-r",
        str(tmp_path / "out/recipe.toml"),
        "--head",
        "none",
        "-o",
        str(tmp_path / "off"),
    )
    assert Recipe.load(tmp_path / "off/recipe.toml") == Recipe.load("rtn")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--head", "mxfp5"), "--head mxfp5: head: format: unknown format 'mxfp5'"),
        (("--head", "mxfp4/"), "--head mxfp4/: expected a format, or WEIGHTS/INPUTS"),
        (("--head", "nvfp4"), "--head nvfp4: head: format: nvfp4 absmax has no power of two a block"),
        (("--head", "mxfp5", "--for", "vllm"), "--head mxfp5: head: format: unknown format 'mxfp5'"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_a_head_that_cannot_be_is_refused(
    folders: dict[str, str], command: str, options: tuple[str, ...], said: str
) -> None:
    assert one_line_error(call(command, folders["model"], *options), 2).startswith(said)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("mxint8", ("mxint8", "", "none")),
        ("mxfp8", ("mxfp8_e4m3", "", "none")),
        ("mxfp4", ("mxfp4", "", "hadamard")),
        ("mxfp8/mxfp8", ("mxfp8_e4m3", "mxfp8_e4m3", "hadamard")),
    ],
)
def test_what_a_name_of_a_head_stands_for(named: str, expected: tuple[str, str, str]) -> None:
    found = HeadChoice.named(named)
    assert (found.format, found.inputs, found.transform) == expected
