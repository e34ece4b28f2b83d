"""A comparison equals its parts done by hand, goes on where it was killed, and holds one model; what a model weighs."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_config, write_tiny_model
from transformers import LlamaForCausalLM, PreTrainedModel

import mxrot
from mxrot import api, quantizing
from mxrot.errors import CheckpointError, ConfigError, NumericsError
from mxrot.evaluation import divergence, perplexity
from mxrot.layers import ModelSize
from mxrot.recipe import Recipe, load_recipe
from mxrot.report import ComparedRow
from mxrot.report import trials as making
from mxrot.report.checkpoints import labels_of
from mxrot.report.comparing import compare_recipes
from mxrot.report.trials import model_size
from mxrot.report.work_folder import WorkFolder
from mxrot.text import load_text, token_windows

BLOCK_WEIGHTS = 64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96
"""Weights of the linears of one block of the tiny model: q and o, k and v, the three of the MLP."""
OUTER = 2 * 256 * 64 + 64 + 2 * (64 + 64)
"""Embedding, head, and norms of two blocks."""
RECIPE = load_recipe("duquant++").changed({"transform.steps": 4})
RTN, HADAMARD = load_recipe("rtn"), load_recipe("hadamard")
TOO_WIDE = HADAMARD.changed({"transform.block": 64, "name": "too-wide"})
"""For the tiny model, whose down_proj reads 96 channels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"the number {number} follows {number - 1}; " for number in range(60)))
    return str(path)


@pytest.fixture(scope="module")
def whole(folder: Path, words: str) -> list[ComparedRow]:
    """Of a comparison that nothing disturbs."""
    return compared(folder, words, [RTN, RECIPE, HADAMARD])


def compared(folder: Path, words: str, recipes: Sequence[Recipe], **more: Any) -> list[ComparedRow]:
    options: dict[str, Any] = {"calib": words, "samples": 2, "seq_len": 32, "texts": [words], "windows": 3}
    return compare_recipes(str(folder), recipes, **(options | more))


def figures(rows: Sequence[ComparedRow]) -> list[tuple[Any, ...]]:
    """What of rows does not depend on the clock, to the last bit."""
    return [
        (row.recipe, row.reason, [(run.seed, run.size, run.perplexity, _kl(run)) for run in row.runs]) for row in rows
    ]


def _kl(run: Any) -> dict[str, float]:
    return {name: one.kl for name, one in run.divergence.items()}


def test_rows_are_what_the_parts_give_alone(folder: Path, words: str) -> None:
    options = {"calib": words, "samples": 2, "seq_len": 32, "seed": 3}
    recipes = [RTN, RECIPE, load_recipe("quarot")]  # the last one with a head of its own
    rows = compare_recipes(str(folder), recipes, texts=[words], windows=3, **options)  # type: ignore[arg-type]
    windows = token_windows(load_text(words, "evaluation"), api.load_tokenizer(folder), 32, 3)
    original = api.open_model(folder)[0]
    alone = {
        "FP16": original,
        "rtn": mxrot.quantize(folder, "rtn"),
        "duquant++": mxrot.quantize(folder, RECIPE, **options),  # type: ignore[arg-type]
        "quarot": mxrot.quantize(folder, "quarot", **options),  # type: ignore[arg-type]
    }
    batch = api.EVALUATION_TOKENS["cpu"] // 32
    assert rows[0].recipe == "FP16" and {row.recipe for row in rows} == set(alone)
    for row in rows:
        model: Any = alone[row.recipe]
        assert row.perplexity == {"words": perplexity(model, windows, batch)}
        if row.original is not None:
            assert row.runs[0].divergence == {"words": divergence(model, original, windows, batch)}
            assert row.ratio().value == pytest.approx(row.perplexity["words"].ppl / rows[0].perplexity["words"].ppl)
    ratios = [row.ratio().value for row in rows[1:]]
    assert ratios == sorted(ratios) and len(set(ratios)) == 3
    assert rows[0].quantize_seconds is None and all(row.quantize_seconds > 0 for row in rows[1:])  # type: ignore[operator]
    if sys.platform == "linux":
        assert rows[0].peak_bytes is None and all(row.peak_bytes > 1e8 for row in rows[1:])  # type: ignore[operator]


def test_tells_what_it_is_at_and_never_goes_back(folder: Path, words: str) -> None:
    told: list[tuple[float, int, str]] = []
    compared(folder, words, [RTN], progress=lambda *what: told.append(what))
    linears = [f"self_attn.{name}_proj" for name in "qo"] + ["mlp.gate_proj", "mlp.down_proj"]
    blocks = [(f"rtn, model.layers.{index}", linears) for index in range(2)]
    inside = [name for block, parts in blocks for name in (block, *(f"{block}.{part}" for part in parts))]
    names = list(dict.fromkeys(what for _, _, what in told))
    assert [name for name in names if name not in inside] == [
        *("perplexity of FP16, tokens", "rtn, done", "perplexity of rtn, tokens"),
    ]
    assert [name for name in names if name in inside] == inside
    assert {total for _, total, _ in told} == {100}
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[0][0] == 0 and told[-1][0] == pytest.approx(100)


def test_with_a_prompt_each_row_says_something(folder: Path, words: str) -> None:
    rows = compare_recipes(str(folder), [RTN], texts=[words], windows=1, seq_len=32, prompt="one two", kl_windows=0)
    assert all(row.extra["generated"].startswith("one two ") for row in rows)
    assert all("\n" not in row.extra["generated"] for row in rows)
    assert all(not row.runs[0].divergence and row.kl() is None for row in rows)


def test_a_model_that_does_not_fit_is_an_error_before_anything_is_told(tmp_path: Path, words: str) -> None:
    odd = write_tiny_model(tmp_path / "odd", intermediate_size=100)

    def never(done: int, total: int, what: str) -> None:
        raise AssertionError("work began")

    for recipes in ([RTN], [RTN, HADAMARD]):
        with pytest.raises(ConfigError, match=r"down_proj.*100"):
            compare_recipes(str(odd), recipes, texts=[words], windows=1, seq_len=32, progress=never)


def test_two_recipes_of_one_name_are_refused(folder: Path, words: str) -> None:
    with pytest.raises(ConfigError, match="two recipes have the name 'rtn'"):
        compared(folder, words, [RTN, RTN.changed({"weights.rule": "floor"})])


# Recipes that have no figures


def test_a_recipe_that_cannot_be_taken_has_a_reason(folder: Path, words: str) -> None:
    rows = compared(folder, words, [TOO_WIDE, RTN])
    assert [row.recipe for row in rows] == ["FP16", "rtn", "too-wide"]
    assert rows[2].reason is not None and "mlp.down_proj" in rows[2].reason and "96" in rows[2].reason
    assert not rows[2].runs and rows[1].reason is None


def test_so_has_one_that_fails_while_it_runs(
    folder: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _quantize_with(monkeypatch, {"hadamard": NumericsError("model.layers.1: NaN")})
    rows = compared(folder, words, [HADAMARD, RTN], work=tmp_path)
    assert [(row.recipe, row.reason) for row in rows[1:]] == [("rtn", None), ("hadamard", "model.layers.1: NaN")]
    compared(folder, words, [HADAMARD, RTN], work=tmp_path, resume=True)
    assert asked == ["hadamard", "rtn"]  # what is wrong with it is known


def test_one_that_lacked_memory_is_tried_again(
    folder: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _quantize_with(monkeypatch, {"hadamard": torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")})
    rows = compared(folder, words, [HADAMARD, RTN], work=tmp_path)
    assert "out of GPU memory (2.00 GiB more wanted)" in str(rows[2].reason)
    compared(folder, words, [HADAMARD, RTN], work=tmp_path, resume=True)
    assert asked == ["hadamard", "rtn", "hadamard"]


def _quantize_with(monkeypatch: pytest.MonkeyPatch, errors: dict[str, Exception]) -> list[str]:
    """Let `quantize` raise these errors for recipes of these names; the names it will be asked for."""
    asked: list[str] = []
    real = quantizing.quantize

    def quantize(source: Path, recipe: Recipe, **options: Any) -> quantizing.QuantizedModel:
        asked.append(recipe.name)
        if recipe.name in errors:
            raise errors[recipe.name]
        return real(source, recipe, **options)

    monkeypatch.setattr(quantizing, "quantize", quantize)
    return asked


# Seeds


def test_seeds_are_runs_and_chance_is_found_out(folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _quantize_with(monkeypatch, {})
    rows = {row.recipe: row for row in compared(folder, words, [RTN, RECIPE], seeds=[4, 7, 9, 11])}
    assert asked == ["rtn"] * 2 + ["duquant++"] * 4
    assert rows["rtn"].is_alike and [run.seed for run in rows["rtn"].runs] == [4, 7]
    assert not rows["duquant++"].is_alike and [run.seed for run in rows["duquant++"].runs] == [4, 7, 9, 11]
    two = compared(folder, words, [RTN, RECIPE], seeds=[4, 7])
    assert {row.recipe: row.is_alike for row in two[1:]} == {"rtn": True, "duquant++": False}
    alone = compared(folder, words, [RECIPE], seed=9)[1]
    assert rows["duquant++"].runs[2].perplexity == alone.perplexity
    assert rows["rtn"].ratio().error == 0 and rows["duquant++"].ratio().error > 0  # type: ignore[operator]


# Going on


@pytest.mark.parametrize("runs", [0, 1, 2])
def test_killed_between_runs_it_goes_on_to_the_same_table(
    folder: Path, words: str, whole: list[ComparedRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    recipes = [RTN, RECIPE, HADAMARD]
    real, count = making.Trials.made, 0

    def ends(*arguments: Any) -> Any:
        nonlocal count
        if count == runs:
            raise KeyboardInterrupt
        count += 1
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(making.Trials, "made", ends)
        with pytest.raises(KeyboardInterrupt):
            compared(folder, words, recipes, work=tmp_path)
    asked = _quantize_with(monkeypatch, {})
    said: list[str] = []
    resumed = compared(folder, words, recipes[::-1], work=tmp_path, resume=True, announce=said.append)
    assert asked == [recipe.name for recipe in recipes[runs:]][::-1]
    assert figures(resumed) == figures(whole)
    assert said == [f"{1 + runs} of 4 runs were finished before, and are taken from {tmp_path}"]
    assert not (tmp_path / "original").exists() and not (tmp_path / "lock").exists()


def test_sigkill_leaves_what_was_finished(folder: Path, words: str, whole: list[ComparedRow], tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from mxrot.recipe import load_recipe
from mxrot.report.checkpoints import labels_of
from mxrot.report.comparing import compare_recipes
def killed(done, total, what):
    if what.startswith("hadamard"):
        os.kill(os.getpid(), signal.SIGKILL)
recipes = [load_recipe("rtn"), load_recipe("hadamard")]
options = dict(texts=[{words!r}], windows=3, seq_len=32, work=Path({str(tmp_path)!r}))
compare_recipes({str(folder)!r}, recipes, progress=killed, **options)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == -signal.SIGKILL, found.stderr
    said: list[str] = []
    resumed = compared(folder, words, [RTN, HADAMARD], work=tmp_path, resume=True, announce=said.append)
    assert said and said[0].startswith("2 of 3 runs were finished before")
    assert figures(resumed) == figures([row for row in whole if row.recipe != "duquant++"])


def test_without_resume_everything_is_done_anew(
    folder: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = _quantize_with(monkeypatch, {})
    for _ in range(2):
        compared(folder, words, [RTN], work=tmp_path)
    assert asked == ["rtn", "rtn"]


@pytest.mark.parametrize(
    "change",
    [
        {"windows": 2},
        {"seq_len": 16},
        {"seed": 1},
        {"kl_windows": 2},
        {"recipes": [RTN.changed({"weights.rule": "floor"})]},
    ],
    ids=str,
)
def test_what_decides_the_figures_is_part_of_the_key(
    folder: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    asked = _quantize_with(monkeypatch, {})
    compared(folder, words, [RTN], work=tmp_path)
    rows = compared(folder, words, work=tmp_path, resume=True, **({"recipes": [RTN]} | change))
    assert asked == ["rtn", "rtn"]
    assert [row.recipe for row in rows] == ["FP16", "rtn"]


def test_so_are_the_bytes_of_the_model(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_model(tmp_path / "model")
    asked = _quantize_with(monkeypatch, {})
    first = compared(model, words, [RTN], work=tmp_path / "work")
    write_tiny_model(model, seed=1)
    second = compared(model, words, [RTN], work=tmp_path / "work", resume=True)
    assert asked == ["rtn", "rtn"] and figures(first) != figures(second)


def test_a_file_that_is_damaged_counts_as_none(folder: Path, words: str, tmp_path: Path) -> None:
    first = compared(folder, words, [RTN], work=tmp_path)
    for number, path in enumerate(sorted((tmp_path / "runs").iterdir())):
        path.write_text(["{", '{"format": 2}'][number])
    assert figures(compared(folder, words, [RTN], work=tmp_path, resume=True)) == figures(first)


def test_one_comparison_at_a_time_works_in_a_folder(folder: Path, words: str, tmp_path: Path) -> None:
    with WorkFolder.opened(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} on"):
        compared(folder, words, [RTN], work=tmp_path)


# Checkpoints


def test_a_checkpoint_measures_as_what_is_quantized_here(folder: Path, words: str, tmp_path: Path) -> None:
    options = {"calib": words, "samples": 2, "seq_len": 32}
    mxrot.quantize(folder, RECIPE, tmp_path / "a" / "out", **options)  # type: ignore[call-overload]
    mxrot.quantize(folder, RTN, tmp_path / "b" / "out")
    given = [str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out")]
    rows = {row.recipe: row for row in compared(folder, words, [RECIPE, RTN], checkpoints=given)}
    assert set(rows) == {"FP16", "duquant++", "rtn", "a/out", "b/out"}
    for recipe, checkpoint in (("duquant++", "a/out"), ("rtn", "b/out")):
        here, read = rows[recipe].runs[0], rows[checkpoint].runs[0]
        assert here.measures_as(read) and here.size.bits_per_weight == read.size.bits_per_weight
        assert here.weight_errors == pytest.approx(read.weight_errors, rel=1e-9) and len(read.weight_errors) == 2
        assert rows[checkpoint].agreement() == rows[recipe].agreement()
        assert f'name = "{recipe}"' in str(rows[checkpoint].recipe_toml)
    assert len(rows["a/out"].runs[0].output_errors) == 2 and rows["b/out"].runs[0].output_errors == []


def test_a_checkpoint_of_another_vocabulary_is_refused_and_a_damaged_one_has_a_reason(
    folder: Path, words: str, tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", vocab_size=300)
    mxrot.quantize(other, RTN, tmp_path / "far")
    with pytest.raises(ConfigError, match="300 tokens in its vocabulary, and the original 256"):
        compared(folder, words, [], checkpoints=[str(tmp_path / "far")])
    mxrot.quantize(folder, RTN, tmp_path / "damaged")
    weights = max((tmp_path / "damaged").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    rows = compared(folder, words, [RTN], checkpoints=[str(tmp_path / "damaged")])
    assert [(row.recipe, row.reason is None) for row in rows] == [("FP16", True), ("rtn", True), ("damaged", False)]


@pytest.mark.parametrize(
    ("paths", "taken", "expected"),
    [
        (["/x/a", "/x/b"], [], ["a", "b"]),
        (["/x/a", "/y/a"], [], ["x/a", "y/a"]),
        (["/x/rtn", "/y/b"], ["rtn"], ["x/rtn", "b"]),
        (["/x/z/a", "/y/z/a", "/y/c"], [], ["x/z/a", "y/z/a", "c"]),
    ],
)
def test_checkpoints_are_called_by_what_is_their_own(paths: list[str], taken: list[str], expected: list[str]) -> None:
    assert labels_of([Path(path) for path in paths], taken) == expected


# Memory


def test_one_model_at_a_time(folder: Path, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after one that failed while it was measured."""
    alive: list[weakref.ref[PreTrainedModel]] = []
    measured, quantize = making.Trials._measured, quantizing.quantize

    def checked(source: Path, recipe: Recipe, **options: Any) -> quantizing.QuantizedModel:
        gc.collect()
        assert alive and all(reference() is None for reference in alive)
        return quantize(source, recipe, **options)

    def noted(self: making.Trials, model: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        alive.append(weakref.ref(model))
        if len(alive) == 2:
            raise NumericsError("logits hold NaN")
        return measured(self, model, *arguments, **options)

    monkeypatch.setattr(quantizing, "quantize", checked)
    monkeypatch.setattr(making.Trials, "_measured", noted)
    rows = compared(folder, words, [RTN, HADAMARD, RECIPE])
    assert len(alive) == 4 and [row.reason for row in rows] == [None, None, None, "logits hold NaN"]


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


def test_stages_are_counted_apart_whatever_their_tensors_are_called(words: str, tmp_path: Path) -> None:
    """The first of two block diagonals is kept as `weight_0`, and scales are `weight_scale`."""
    model = write_tiny_model(tmp_path, hidden_size=128, intermediate_size=128, head_dim=32)
    recipe = load_recipe("duquant").changed({"transform.steps": 2})
    size = model_size(mxrot.quantize(model, recipe, calib=words, samples=1, seq_len=32), torch.float16)  # type: ignore[arg-type]
    sites, rows = 2 * 4, 2 * (2 * 128 + 2 * 64 + 3 * 128)
    assert size.transform_bytes == sites * (2 * 128 * 128 * 2 + 128 * 4)
    assert size.scale_bytes == rows * (2 + 1)


def test_a_model_that_is_not_quantized_has_no_bits_per_weight() -> None:
    size = model_size(LlamaForCausalLM(tiny_config(architectures=["LlamaForCausalLM"])), torch.bfloat16)
    assert size.bits_per_weight is None and size.transform_bits_per_weight is None
    assert size.total_bytes == 2 * (OUTER + 2 * BLOCK_WEIGHTS)


def test_a_tied_head_is_counted_once() -> None:
    apart, tied = (
        model_size(
            LlamaForCausalLM(tiny_config(architectures=["LlamaForCausalLM"], tie_word_embeddings=tie)), torch.bfloat16
        ).total_bytes
        for tie in (False, True)
    )
    assert apart - tied == 2 * 256 * 64


def test_sizes_add_up() -> None:
    assert ModelSize(1, 2, 3, 4, 5) + ModelSize(10, 20, 30, 40, 50) == ModelSize(11, 22, 33, 44, 55)
