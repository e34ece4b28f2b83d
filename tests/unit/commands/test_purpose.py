"""--for vllm, and the last line of a plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_model import write_tiny_mixture, write_tiny_model
from typer.testing import CliRunner

from mxrot.cli import app
from mxrot.vllm.verdict import check_for_vllm


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("purpose") / "tiny")


def run(*words: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == code, result.output
    return result


def test_quantize_for_vllm_writes_what_vllm_runs(model: Path, tmp_path: Path) -> None:
    quick = ("--samples", "2", "--seq-len", "32", "--set", "calibration.generated=0")
    shown = run("quantize", model, "--for", "vllm", "-o", tmp_path / "out", *quick).stdout.splitlines()
    assert shown[0].startswith("for vLLM: recipe mxrot-vllm, because vLLM")
    assert shown[1].startswith("  not mxrot: it has one matrix a block")
    assert not check_for_vllm(tmp_path / "out").stock.stops
    assert 'name = "mxrot-vllm"' in (tmp_path / "out" / "recipe.toml").read_text()


def test_plan_for_vllm_plans_that_recipe(model: Path, tmp_path: Path) -> None:
    run("plan", model, "--for", "vllm", "--json", tmp_path / "plan.json")
    table = json.loads((tmp_path / "plan.json").read_text())
    assert table["recipe"] == "mxrot-vllm" and not table["vllm"]["stock"]["stops"]


def test_a_head_for_vllm_gets_a_recipe_for_the_plugin(model: Path, tmp_path: Path) -> None:
    shown = run("plan", model, "--for", "vllm", "--head", "mxint8", "--json", tmp_path / "plan.json").stdout
    assert shown.startswith("for vLLM: recipe mxrot, because vLLM 0.32.0 with mxrot installed runs the folder as it is")
    table = json.loads((tmp_path / "plan.json").read_text())
    assert table["recipe"] == "mxrot" and not table["vllm"]["plugin"]["stops"] and table["vllm"]["stock"]["stops"]
    run("plan", model, "--for", "vllm", "--head", "none", "--json", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["recipe"] == "mxrot-vllm"


@pytest.mark.parametrize("head", [(), ("--head", "mxint8")])
def test_what_vllm_does_not_run_at_all_is_refused(tmp_path: Path, head: tuple[str, ...]) -> None:
    mixture = write_tiny_mixture(tmp_path / "experts", "mixtral")
    said = run("plan", mixture, "--for", "vllm", *head, code=2).stderr
    assert "with none of mxrot, mxrot-vllm, w4a16, rtn: it has experts" in said


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--for", "vlm"], "vllm"), (["--for", "vllm", "-r", "rtn"], "leave out --recipe rtn or --for")],
)
def test_wrong_purposes_are_one_line(model: Path, options: list[str], says: str) -> None:
    assert says in run("plan", model, *options, code=2).stderr


def test_the_last_line_of_a_plan_is_the_verdict(model: Path, tmp_path: Path) -> None:
    def last(*options: str, code: int = 0) -> str:
        shown = run("plan", model, "-r", "rtn", *options, "--json", tmp_path / "p.json", code=code).stdout
        line = shown.splitlines()[-1]
        assert line == f"verdict: {json.loads((tmp_path / 'p.json').read_text())['verdict']}"
        return line

    fits = last("--gpu-memory", "80")
    assert fits.startswith("verdict: fits: ") and "80.0 GB are free; about " in fits and fits.endswith(" on cpu")
    assert "of main memory" in last()
    assert last("--set", 'ignore=["nothing"]', code=1).startswith("verdict: refused: ")


def test_a_plan_that_does_not_fit_says_where(model: Path) -> None:
    shown = run("plan", model, "-r", "rtn", "--gpu-memory", "0.1").stdout.splitlines()
    assert shown[-1].startswith("verdict: ")
    taken = float(shown[-1].split()[2 if "fits:" in shown[-1] else 4])
    assert ("does not fit" in shown[-1]) == (taken > 0.1)
