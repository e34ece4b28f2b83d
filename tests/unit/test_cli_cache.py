"""`--kv` of eval, generate and compare: what it changes, what it says, and what it refuses in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_model
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from mxrot.cli import app
from mxrot.planning import rates

MEASURE = ("--windows", "2", "--seq-len", "32")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A tiny model with heads of 32, one with heads of 16, a text, and a checkpoint with a cache of its own."""
    root = tmp_path_factory.mktemp("cli")
    model, narrow = write_tiny_model(root / "tiny", head_dim=32), write_tiny_model(root / "narrow")
    text = root / "words.txt"
    text.write_text("".join(f"the number {number} follows {number - 1}; " for number in range(140)))
    cached = root / "cached"
    run("quantize", str(model), "-o", str(cached), "-r", "rtn", "--set", "cache.keys=int4_row_asym")
    yield {"model": str(model), "narrow": str(narrow), "text": str(text), "cached": str(cached)}


@pytest.fixture(autouse=True)
def without_foreign_progress() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def run(*arguments: str) -> Result:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def evaluated(path: Path, model: str, folders: dict[str, str], *options: str) -> dict[str, Any]:
    run("eval", model, "--text", folders["text"], *MEASURE, "--json", str(path), *options)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def test_eval_reads_through_the_cache_and_says_which(folders: dict[str, str], tmp_path: Path) -> None:
    def ppl(*options: str) -> float:
        table = evaluated(tmp_path / "e.json", folders["model"], folders, *options)
        return float(table["perplexity"]["words"]["ppl"])

    plain, coarse, fine = ppl(), ppl("--kv", "int2", "--kv-transform", "none"), ppl("--kv", "mxfp8")
    assert plain == ppl("--kv", "none")
    assert abs(coarse / plain - 1) > 10 * abs(fine / plain - 1) > 0
    assert ppl("--kv", "int2", "--kv-transform", "none", "--kv-last", "32") == pytest.approx(plain, rel=1e-4)
    table = evaluated(tmp_path / "e.json", folders["model"], folders, "--kv", "mxfp4", "--kv-first", "2")
    assert table["cache"]["bits_per_element"] == 4.25
    assert "mxfp4 even under hadamard" in table["cache"]["scheme"] and "the first 2 tokens" in table["cache"]["scheme"]
    assert evaluated(tmp_path / "e.json", folders["model"], folders)["cache"] is None


def test_eval_fits_on_a_text_and_compares_with_the_original(folders: dict[str, str], tmp_path: Path) -> None:
    options = ("--kv", "int2", "--kv-transform", "second-moment", "--calib", folders["text"])
    table = evaluated(tmp_path / "e.json", folders["model"], folders, *options, "--against", folders["model"])
    apart = table["divergence"]["words"]
    assert apart["kl"] > 0 and apart["ppl"] != apart["original_ppl"]
    assert "under stored" in table["cache"]["scheme"]


def test_a_checkpoints_own_cache_is_used_replaced_and_taken_away(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    own = evaluated(path, folders["cached"], folders)
    assert own["cache"]["scheme"].startswith("keys int4_row_asym")
    result = run("eval", folders["cached"], "--text", folders["text"], *MEASURE, "--kv", "int2", "--json", str(path))
    assert "--kv int2 hadamard replaces the cache of" in result.stderr and "keys int4_row_asym" in result.stderr
    assert "read through a cache: keys int2_g32_asym" in result.stdout
    other = json.loads(path.read_text())
    without = evaluated(path, folders["cached"], folders, "--kv", "none")
    assert without["cache"] is None
    assert len({table["perplexity"]["words"]["ppl"] for table in (own, other, without)}) == 3


def test_generate_writes_through_the_cache(folders: dict[str, str]) -> None:
    def said(*options: str) -> str:
        return run("generate", folders["model"], "one two", "--max-tokens", "24", *options).stdout

    assert said() == said("--kv", "none")
    assert said("--kv", "int2", "--kv-transform", "none") != said()
    assert said("--kv", "int2", "--kv-transform", "none", "--kv-last", "64") == said()


def test_compare_prints_the_cache_alone(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    options = ["--recipes", "none", "--kv", "mxfp8,int2,none", "--kv-transform", "none,second-moment"]
    options += ["--text", folders["text"], "--calib", folders["text"], *MEASURE, "--work", str(tmp_path / "work")]
    result = run("compare", folders["model"], *options, "--json", str(path), "--csv", str(tmp_path / "c.csv"))
    rows = {row["recipe"]: row for row in json.loads(path.read_text())["rows"]}
    kinds = [f"{name}{kind}" for name in ("mxfp8", "int2") for kind in ("", " second-moment")]
    assert set(rows) == {"FP16", "FP16 KV 16 bit", *(f"FP16 KV {kind}" for kind in kinds)}
    assert rows["FP16"]["bits_per_kv_element"] == 16 and "cache" not in rows["FP16"]
    assert rows["FP16 KV 16 bit"]["ratio"] == 1 and rows["FP16 KV 16 bit"]["kl"] == 0
    for kind in kinds:
        row = rows[f"FP16 KV {kind}"]
        assert row["bits_per_kv_element"] == (8.25 if "mxfp8" in kind else 2.75)
        assert row["cache"]["tokens"] == 512 and row["cache"]["ratio"] == pytest.approx(
            row["bits_per_kv_element"] / 16, rel=0.2
        )
        assert row["kl"] > 0 and row["bits_per_weight"] == 16
    assert rows["FP16 KV int2"]["kl"] > 10 * rows["FP16 KV mxfp8"]["kl"]
    assert (
        "x of 16 bit: bytes of a cache with 512 tokens" in result.stdout
        and "FP16 KV int2 second-moment" in result.stdout
    )
    again = run("compare", folders["model"], *options, "--resume")
    assert "6 of 6 runs were finished before" in again.stderr
    less = [*options, "--resume", "--kv", "int2", "--kv-transform", "none"]
    assert "2 of 2 runs were finished before" in run("compare", folders["model"], *less).stderr
    assert "1 of 2 runs were finished before" in run("compare", folders["model"], *less, "--kv-first", "1").stderr


def test_compare_gives_every_recipe_the_cache(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    options = [
        "--recipes",
        "rtn",
        "--kv",
        "int2",
        "--text",
        folders["text"],
        *MEASURE,
        "--work",
        str(tmp_path / "work"),
    ]
    run("compare", folders["model"], *options, "--json", str(path))
    rows = {row["recipe"]: row for row in json.loads(path.read_text())["rows"]}
    assert set(rows) == {"FP16", "FP16 KV int2 hadamard", "rtn KV int2 hadamard"}
    assert rows["rtn KV int2 hadamard"]["recipe_toml"].startswith('name = "rtn"')
    assert rows["rtn KV int2 hadamard"]["kl"] > rows["FP16 KV int2 hadamard"]["kl"] > 0
    assert rows["rtn KV int2 hadamard"]["bits_per_weight"] == 4.25


def test_a_recipes_own_cache_counts_in_a_comparison(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    options = ["--recipes", "rtn", "--set", "cache.keys=int4_row_asym", "--text", folders["text"], *MEASURE]
    run("compare", folders["model"], *options, "--work", str(tmp_path / "work"), "--json", str(path))
    row = json.loads(path.read_text())["rows"][1]
    assert row["bits_per_kv_element"] == (4.75 + 4.25) / 2 and row["cache"]["scheme"].startswith("keys int4_row_asym")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("eval", "{model}", "--kv", "mxpf4"), "--kv: unknown format 'mxpf4'; did you mean 'mxfp4'"),
        (("eval", "{model}", "--kv", "mxfp4,int4"), "only compare takes several"),
        (("eval", "{model}", "--kv", ","), "--kv: names nothing"),
        (("eval", "{model}", "--kv-transform", "hadamard"), "--kv-transform: needs --kv"),
        (("eval", "{model}", "--kv-last", "4"), "--kv-last: needs --kv"),
        (("eval", "{narrow}", "--kv", "mxfp4"), "heads are 16 wide, which is not a multiple of 32"),
        (("eval", "{model}", "--kv", "mxfp4", "--kv-transform", "wush"), "--kv-transform: unknown transform 'wush'"),
        (("eval", "{model}", "--kv", "mxfp4", "--kv-transform", "second-moment"), "name one with --calib"),
        (
            ("eval", "{model}", "--kv", "mxfp4", "--calib", "{text}"),
            "--calib: only --kv-transform second-moment needs it",
        ),
        (
            ("eval", "{cached}", "--kv", "mxfp4", "--kv-transform", "second-moment", "--calib", "{text}"),
            "second-moment: is fitted to the weights that read values",
        ),
        (("generate", "{narrow}", "hello", "--kv", "mxfp8"), "heads are 16 wide"),
        (("compare", "{narrow}", "--recipes", "none", "--kv", "mxfp4", "--text", "{text}"), "heads are 16 wide"),
        (("compare", "{model}", "--recipes", "none", "--text", "{text}"), "--recipes none: compares nothing"),
        (
            (
                "compare",
                "{model}",
                "--recipes",
                "rtn",
                "--kv",
                "int4",
                "--kv-transform",
                "second-moment",
                "--text",
                "{text}",
            ),
            "is fitted to the original only; take --recipes none",
        ),
    ],
)
def test_what_cannot_be_meant_is_one_line(folders: dict[str, str], arguments: tuple[str, ...], said: str) -> None:
    result = call(*(argument.format(**folders) for argument in arguments))
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("mxrot: error: ")]
    assert len(errors) == 1 and said in errors[0], result.stderr


@pytest.mark.parametrize("option", ["--kv-first", "--kv-last"])
def test_numbers_below_zero_are_bad_usage(folders: dict[str, str], option: str) -> None:
    result = call("eval", folders["model"], "--kv", "mxfp4", option, "-1")
    assert result.exit_code == 2 and option in result.stderr


def test_plan_and_inspect_and_the_card_name_it(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SECONDS", 0.0)
    path = tmp_path / "p.json"
    planned = run("plan", folders["model"], "-r", "rtn", "--set", "cache.keys=int4_row_asym", "--json", str(path))
    assert "cache: keys and values in 4.5 bits (keys int4_row_asym" in planned.stdout
    assert json.loads(path.read_text())["cache"]["bits_per_element"] == 4.5
    plain = run("plan", folders["model"], "-r", "rtn", "--json", str(path))
    assert "cache: keys and values in 16 bits (as they are)" in plain.stdout
    looked = run("inspect", folders["cached"], "--text", folders["text"], *MEASURE, "--json", str(path))
    assert "cache of 2 decoder blocks: keys int4_row_asym" in looked.stdout
    assert list(json.loads(path.read_text())["cache"].values()) == [2]
    card = (Path(folders["cached"]) / "README.md").read_text()
    assert "keys and values in int4_row_asym and mxfp4 with mxrot (rtn)" in card
    assert "Attention reads quantized keys and values, from the cache and without one: keys int4_row_asym" in card
    assert "With vLLM: not with this cache" in card


def test_export_says_what_vllm_has_instead(folders: dict[str, str], tmp_path: Path) -> None:
    result = run("export", folders["cached"], "--to", "vllm")
    assert "--kv-cache-dtype fp8" in result.stdout and "runs it" not in result.stdout
    refused = call("export", folders["cached"], "--to", "vllm", "-o", str(tmp_path / "out"))
    assert refused.exit_code == 2 and not (tmp_path / "out").exists()
