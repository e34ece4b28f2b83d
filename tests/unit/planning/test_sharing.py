"""Plans of several processes beside those of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import recipe
from tests.unit.planning.shapes import LLAMA_3_8B, run_of

from mxrot.planning import Machine, estimate_memory, make_plan
from mxrot.planning.memory import INPUTS, OF_EXPERT
from mxrot.planning.rates import Rates
from mxrot.planning.sharing import exchanged_bytes, share_of, shared_memory, shared_seconds
from mxrot.planning.tuning import gradient_bytes

NAMES = Rates.__dataclass_fields__
RATES = Rates(**{name: 1e9 for name in NAMES if name != "rates"})


def test_one_process_is_the_plan_of_one() -> None:
    run = run_of(LLAMA_3_8B, recipe("mxrot"), 128, 2048)
    assert share_of(run, 1) == run
    assert "exchange" not in shared_seconds(run, 1, RATES, 1.0).terms


def test_windows_and_rows_are_shared_and_the_rest_is_not() -> None:
    run = run_of(LLAMA_3_8B, recipe("mxrot"), 128, 2048)
    one, four = (shared_seconds(run, processes, RATES, 1.0).terms for processes in (1, 4))
    for name in ("passes over the calibration text", "statistics of the inputs"):
        assert 0.2 < four[name] / one[name] < 0.45, name  # weights are read and moments folded in each process
    assert four["rounding"] == pytest.approx(one["rounding"] / 4)
    assert four["order of channels"] == pytest.approx(one["order of channels"] / 4)
    assert four["choices by site"] == pytest.approx(
        one["choices by site"] / 3
    )  # six to try, two for the slowest of four
    for name in ("writing calibration text", "factors of the Hessians", "files", "starting"):
        assert four[name] == one[name], name


def test_what_is_exchanged_is_mostly_hessians_and_shifts() -> None:
    run = run_of(
        LLAMA_3_8B,
        recipe("mxrot", calibration__held_out=0.0, rounding__dampings=(), rounding__target_dampings=()),
        128,
        2048,
    )
    hessians = 32 * 8 * (3 * 4096**2 + 14336**2)
    shifts = 32 * 8 * 4096 * (6144 + 4096 + 2 * 14336 + 14336)
    assert hessians + shifts < exchanged_bytes(run) < 1.1 * (hessians + shifts)


@pytest.mark.parametrize(("name", "batch"), [("mxrot-tuned", 8), ("mxrot-light", 8), ("duquant-lwc", 1)])
def test_batches_of_tuning_are_shared_and_their_text_is_not(name: str, batch: int) -> None:
    """What is done to all weights in every step is done by each process; a batch of one window is of one of them."""
    run = run_of(LLAMA_3_8B, recipe(name), 128, 2048, device="cuda")
    one, four = (shared_seconds(run, processes, RATES, 1.0).terms for processes in (1, 4))
    share = share_of(run, 4).recipe.tuning
    assert share is not None and share.batch_windows == max(1, batch // 4)
    assert one["tuning"] * (0.24 if batch > 1 else 0.9) < four["tuning"] < one["tuning"] * (0.5 if batch > 1 else 1.1)
    assert four.get("writing text to tune on") == one.get("writing text to tune on")
    assert ("writing text to tune on" in one) == (name != "duquant-lwc")


def test_gradients_of_every_step_are_exchanged() -> None:
    weights = 32 * (4096 * (4096 + 2 * 1024 + 4096) + 3 * 4096 * 14336)
    matrices = 32 * 32 * (3 * 128 + 448) * 32
    tuned, light = (run_of(LLAMA_3_8B, recipe(name), 128, 2048) for name in ("mxrot-tuned", "mxrot-light"))
    assert gradient_bytes(tuned) == 1500 * 4 * (weights + matrices)
    assert gradient_bytes(light) == 200 * 4 * matrices
    rows = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336 + 4096)
    assert gradient_bytes(run_of(LLAMA_3_8B, recipe("duquant-lwc"), 128, 2048)) == 2300 * 4 * 2 * rows
    assert gradient_bytes(run_of(LLAMA_3_8B, recipe("mxrot"), 128, 2048)) == 0
    assert exchanged_bytes(tuned) > gradient_bytes(tuned) + 2 * weights


def test_memory_of_tuning_is_that_of_a_share_of_the_batch() -> None:
    run = run_of(LLAMA_3_8B, recipe("mxrot-tuned"), 128, 2048, device="cuda")
    one, eight = (
        next(stage for stage in estimate_memory(share_of(run, processes)).stages if stage.name == "tuning").terms
        for processes in (1, 8)
    )
    assert one["tunable weights"] == eight["tunable weights"]
    assert eight["activations"] == pytest.approx(one["activations"] / 8)


def test_memory_of_a_share_but_for_what_the_first_writes() -> None:
    run = replace(run_of(LLAMA_3_8B, recipe("mxrot"), 128, 2048), device="cuda")
    whole, share = estimate_memory(run), estimate_memory(share_of(run, 8))
    found = shared_memory(share, whole)
    by_name = [{stage.name: stage.total for stage in one.stages} for one in (whole, share, found)]
    for name, total in by_name[2].items():
        assert total == by_name[0 if name.startswith("writing") else 1][name]
    assert by_name[2]["writing calibration text"] == by_name[0]["writing calibration text"]


def test_memory_of_an_expert_is_that_of_the_tokens_of_all() -> None:
    """All for the one that a process is handed, and its own for each of as many as there are processes."""
    run = replace(run_of(tiny_mixture("mixtral").config, recipe("mxrot"), 64, 128), device="cuda")
    whole = estimate_memory(run)
    assert shared_memory(whole, whole) == whole
    found = {stage.name: stage for stage in shared_memory(estimate_memory(share_of(run, 4)), whole).stages}
    expected = {stage.name: stage.terms[OF_EXPERT] for stage in whole.stages if OF_EXPERT in stage.terms}
    assert "down: rounding" in expected and all(expected.values())
    assert {name: stage.terms[OF_EXPERT] / 2 for name, stage in found.items() if OF_EXPERT in stage.terms} == expected
    for stage in whole.stages:
        of_expert = OF_EXPERT in stage.terms
        if INPUTS in stage.terms:
            assert found[stage.name].terms[INPUTS] == pytest.approx(stage.terms[INPUTS] / (1 if of_expert else 4))


@pytest.mark.parametrize(
    ("name", "processes", "said"),
    [
        ("mxrot", 2, None),
        ("mxrot-light", 2, None),
        ("spinquant", 2, "2 processes do not share the training of rotations"),
        ("mxrot-vllm", 2, None),
        ("mxrot", 200, "200 processes share 128 calibration windows"),
        ("mxrot-light", 1, None),
    ],
)
def test_what_is_refused_is_in_the_plan(tmp_path: Path, name: str, processes: int, said: str | None) -> None:
    folder = write_tiny_model(tmp_path / "tiny")
    made = make_plan("tiny", folder, recipe(name), Machine(torch.device("cpu")), processes=processes)
    assert made.as_table()["processes"] == processes
    assert [said in problem for problem in made.problems if said] == [True] * bool(said) and bool(
        made.problems
    ) == bool(said)


def test_the_command(tmp_path: Path, capsys: Any) -> None:
    from typer.testing import CliRunner

    from mxrot.commands.app import app

    folder = write_tiny_model(tmp_path / "tiny")
    result = CliRunner().invoke(app, ["plan", str(folder), "--processes", "4", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "memory is that of the first of 4 processes" in result.output and ", 4 like it; an estimate" in result.output
    assert "exchange" in result.output
