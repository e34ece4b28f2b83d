"""Candidates of a recipe, kept by what they cost on windows that they were not fitted to."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, tiny_config, write_tiny_mixture, write_tiny_model
from tests.unit.checkpoint.folders import digests, without_run, write
from transformers import LlamaForCausalLM

from mxrot.checkpoint import load
from mxrot.errors import ConfigError, DataError
from mxrot.evaluation import divergence
from mxrot.models.families.llama import FAMILY as LLAMA
from mxrot.quantizing import choosing
from mxrot.quantizing.batches import window_groups
from mxrot.quantizing.choosing import Reference, folds_of
from mxrot.quantizing.run import quantize
from mxrot.recipe import Recipe, load_recipe
from mxrot.report import choice_line, recipe_line, sites_choice_line
from mxrot.suited import suited

WINDOWS = random_windows(6, 24)
CANDIDATES = ["rounding.target=own", "rounding.target_damping=3.0; rounding.damping=1.0"]


def chosen(name: str = "mxrot", **changes: Any) -> Recipe:
    settings = {"choice.candidates": CANDIDATES, "permutation": "none"} | {
        key.replace("__", "."): value for key, value in changes.items()
    }
    return load_recipe(name).changed(settings)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("source") / "tiny", num_hidden_layers=1)


def test_divergences_are_those_of_an_evaluation(source: Path) -> None:
    original, other = (LlamaForCausalLM.from_pretrained(source, dtype=torch.float32) for _ in range(2))
    for parameter in other.parameters():
        parameter.data *= 1.1
    expected = divergence(other, original, WINDOWS).kl
    with torch.no_grad():
        found = Reference.of(original, LLAMA, {"text": WINDOWS}).divergences(other, {"text": WINDOWS})["text"]
    positions = WINDOWS.shape[1]
    assert found.shape == (6,) and found.dtype == torch.float64
    # An evaluation leaves out the last position, behind which there is no token.
    assert float(found.mean()) == pytest.approx(expected, rel=3 / positions)


def test_windows_are_fitted_to_or_measured_on_and_never_both() -> None:
    windows = torch.arange(20)[:, None].repeat(1, 4)
    (fold,) = folds_of(windows, 12, chosen(choice__held_out=0.25))
    measured = {kind: of_kind[:, 0].tolist() for kind, of_kind in fold.measured.items()}
    assert measured == {"text": [2, 6, 10], "written": [14, 18]}
    assert fold.fitted(1.0)[:, 0].tolist() == [x for x in range(20) if x not in (2, 6, 10, 14, 18)]
    assert len(fold.fitted(0.5)) == 9 + 3 and len(fold.fitted(0.0)) == len(fold.text) == 9
    first, second = folds_of(windows, 12, chosen(choice__held_out=0.25, choice__unseen="kinds"))
    assert first.fitted(1.0)[:, 0].tolist() == list(range(12)) and list(first.measured) == ["written"]
    assert second.fitted(1.0)[:, 0].tolist() == list(range(12, 20)) and list(second.measured) == ["text"]
    with pytest.raises(DataError, match="of the kind 'written' it needs 2, and has 1"):
        folds_of(windows[:13], 12, chosen())


def test_what_costs_least_on_held_out_text_is_what_is_quantized_with(source: Path) -> None:
    result = quantize(source, chosen(), windows=WINDOWS)
    trials = result.record.choice
    assert trials is not None and [trial.candidate for trial in trials] == ["", *CANDIDATES]
    least = math.inf
    best = chosen()
    for trial in trials:
        product = math.prod(trial.nats_per_token.values())
        assert trial.nats_per_token.keys() == {"text", "written"} and trial.score == pytest.approx(product**0.5)
        assert trial.is_kept == (trial.score < least)
        least = min(least, trial.score)
        if trial.is_kept and trial.candidate:
            best = best.with_candidate(trial.candidate)
    plain = best.changed({"choice": "none"})
    expected = quantize(source, plain, windows=WINDOWS).model
    assert result.model is not None and expected is not None and result.record.recipe == chosen()
    own = expected.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in result.model.state_dict().items())
    line = choice_line({"choice": [vars(trial) for trial in trials]})
    assert line.startswith("chosen among 3 by divergence on held-out text") and f"{least:.4g} as chosen" in line
    assert choice_line({}) == ""


def test_less_generated_text_can_be_chosen(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "LEAST_KL", math.inf)  # all cost the same, and the first is kept
    one = chosen(choice__candidates=["calibration.generated=0.5"], calibration__generated=1.0)
    assert quantize(source, one, windows=WINDOWS).record.windows == (12, 24)


def test_a_resumed_run_measures_nothing_twice(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = chosen(choice__unseen="kinds", choice__candidates=CANDIDATES[:1])
    run = write(source, tmp_path / "whole", one, windows=WINDOWS)
    seen: list[int] = []
    original = Reference.divergences

    def measured(self: Reference, *arguments: Any) -> Any:
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(Reference, "divergences", measured)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "again", one, windows=WINDOWS)
    seen.clear()
    resumed = write(source, tmp_path / "again", one, windows=WINDOWS, resume=True)
    assert len(seen) == 1  # of two folds of two candidates, one is left
    assert resumed["choice"] == run["choice"] == json.loads((tmp_path / "again/run.json").read_text())["choice"]
    assert without_run(digests(tmp_path / "again")) == without_run(digests(tmp_path / "whole"))
    load(tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"choice__candidates": []}, "candidates are none"),
        ({"choice__candidates": ["rounding.target"]}, "expected KEY=VALUE"),
        ({"choice__candidates": ["weights.rule=mse"]}, "weights.rule cannot be chosen"),
        ({"choice__candidates": ["rounding.dampness=1"]}, "unknown key 'dampness'"),
        ({"choice__candidates": ["calibration.generated=2.0"]}, "1, is the most that there can be of it"),
        ({"choice__candidates": ["rounding.damping=1.0"] * 9}, "at most 8 are tried, got 9"),
        ({"choice__held_out": 1.0}, "held_out 1.0 is not between 0 and 1"),
        ({"choice__unseen": "kinds", "calibration__generated": 0.0}, "no other kind is there without"),
        ({"rounding__dampings": [0.1, 1.0], "calibration__held_out": 0.0}, "set calibration.held_out"),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused_at_once(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        chosen(**changes)


def test_candidates_that_do_not_go_together_are_refused(source: Path) -> None:
    candidates = ["rounding.first_column=crossed", "rounding.target=own"]
    with pytest.raises(ConfigError, match="does not go on top of all before it: rounding gptq: first_column"):
        quantize(source, chosen(choice__candidates=candidates), windows=WINDOWS)


def test_a_candidate_that_installs_something_else_is_refused(source: Path) -> None:
    one = chosen(choice__candidates=["transform.sharing=site"])
    with pytest.raises(ConfigError, match=r"'transform.sharing=site' installs another transform"):
        quantize(source, one, windows=WINDOWS)


SITES = {
    "rounding__dampings": [0.01, 1.0],
    "rounding__target_dampings": [1.0, math.inf],
    "calibration__held_out": 0.25,
    "choice": "none",
}


@pytest.mark.parametrize("folds", ["kinds", "windows"])
def test_sites_choose_among_candidates_and_the_record_says_what(source: Path, folds: str) -> None:
    one = chosen(**SITES, rounding__folds=folds)
    assert Recipe.from_toml(one.to_toml(), "here") == one
    found = quantize(source, one, windows=WINDOWS)
    linears = [linear for block in found.record.blocks for linear in block.linears]
    assert {linear.damping for linear in linears} <= {0.01, 1.0}
    assert {linear.target_strength for linear in linears} <= {0.0, 1.0}
    assert {linear.tokens for linear in linears} == {24 * 8}  # 12 windows without 2 of each kind
    run = {"blocks": [{"linears": [vars(linear) for linear in linears]}]}
    assert sites_choice_line(run).startswith("target damping that sites chose on held-out windows")
    assert sites_choice_line({"blocks": []}) == ""
    again = quantize(source, one, windows=WINDOWS)
    assert [b.linears for b in again.record.blocks] == [b.linears for b in found.record.blocks]


def test_held_out_windows_change_nothing_that_is_fitted(source: Path) -> None:
    """With one candidate each there is nothing to choose, and the fit is that of the other windows alone."""
    settings = SITES | {"rounding__dampings": [0.3], "rounding__target_dampings": [1.0], "calibration__generated": 0.0}
    other = WINDOWS.clone()
    held = window_groups(6, 6, 0.25)
    assert held is not None and held["held text"].tolist() == [1, 4]
    other[held["held text"]] = random_windows(2, 24, seed=9)
    states = []
    for windows in (WINDOWS, other):
        model = quantize(source, chosen(**settings), windows=windows).model
        assert model is not None
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_groups_are_of_one_kind_each() -> None:
    assert window_groups(6, 4, 0.0) is None
    found = window_groups(6, 4, 0.25)
    assert found is not None
    assert {name: places.tolist() for name, places in found.items()} == {
        "text": [0, 1, 3],
        "held text": [2],
        "written": [4],
        "held written": [5],
    }


def test_experts_have_no_windows_to_hold_out(tmp_path: Path) -> None:
    """So nothing is chosen by site, and the record says so."""
    mixture = write_tiny_mixture(tmp_path / "mixture", "mixtral")
    one = chosen(**SITES, calibration__generated=0.0)
    plain = one.changed({"rounding.dampings": [], "rounding.target_dampings": [], "calibration.held_out": 0.0})
    found, expected = (quantize(mixture, recipe, windows=WINDOWS) for recipe in (one, plain))
    (said,) = found.record.left_out_of_recipe
    assert said.startswith("rounding: damping and target_damping are not chosen by site: experts get tokens")
    assert recipe_line(found.record.as_table()) == f"left out of the recipe: {said}"
    assert found.record.recipe == plain and expected.record.left_out_of_recipe == []
    assert "left_out_of_recipe" not in expected.record.as_table()
    assert found.model is not None and expected.model is not None
    states = expected.model.state_dict()
    assert all(torch.equal(value, states[name]) for name, value in found.model.state_dict().items())


def test_nothing_is_chosen_where_no_window_can_be_held_out(source: Path) -> None:
    one = chosen(**SITES, calibration__generated=0.0)
    found = quantize(source, one, windows=WINDOWS[:1])
    ordered = one.changed({"permutation.ffn": "correlated"})  # from moments that have the rank of one window
    assert quantize(source, ordered, windows=WINDOWS[:1]).model is not None
    dampings = {linear.damping for block in found.record.blocks for linear in block.linears}
    assert dampings == {one.rounding.damping} and one.rounding.damping not in SITES["rounding__dampings"]


def test_orders_are_left_out_where_channels_cannot_move() -> None:
    orders = {"ffn": "correlated", "value_heads": "correlated"}
    one = load_recipe("rtn").changed({f"permutation.{key}": kind for key, kind in orders.items()})
    config = tiny_config(architectures=["LlamaForCausalLM"], head_dim=48)
    one = one.changed({"transform.method": "moments", "rounding.method": "gptq"})
    found, (said,) = suited(one, LLAMA, config)
    assert "heads are 48 wide, which is not a multiple of the transform's block of 32" in said
    assert found.permutation is not None and found.permutation.spelled == "inner channels of MLPs (correlated)"
    assert suited(one.changed({"permutation.ffn": "none"}), LLAMA, config)[0].permutation is None
    assert suited(one, LLAMA, tiny_config(architectures=["LlamaForCausalLM"], head_dim=64)) == (one, [])
