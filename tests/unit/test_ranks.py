"""`mxrot quantize` as several processes: the same codes, errors that end all, and kills that --resume goes on from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.unit.checkpoint.folders import all_tensors, recipe
from tests.unit.ranked import made_by, read_outcomes
from torch import Tensor

from mxrot.calibration.site_weights import Rows
from mxrot.calibration.world import ONE, OneProcess
from mxrot.checkpoint.fingerprint import differences, going_on
from mxrot.errors import ConfigError, RankError
from mxrot.quantizing.shared import check_shared, own_windows
from mxrot.ranks import joined


class Numbered(OneProcess):
    """Only says which of several processes it is."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size  # type: ignore[misc]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by("tests.unit.ranked", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    return read_outcomes(folder)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny", "experts"])
def test_codes_of_two_are_those_of_one(folder: Path, outcomes: dict[str, Any], model: str) -> None:
    assert [one["code"] for one in outcomes[f"two {model}"]] == [0, 0], outcomes[f"two {model}"]
    one, two = (codes(all_tensors(folder / f"{name}-{model}")) for name in ("one", "two"))
    assert float((one == two).double().mean()) >= 0.999


def codes(tensors: dict[str, Tensor]) -> Tensor:
    packed = torch.cat([value.flatten() for name, value in sorted(tensors.items()) if name.endswith("_packed")])
    return torch.stack([packed & 15, packed >> 4])


@pytest.mark.slow
def test_runs_of_two_are_equal(outcomes: dict[str, Any]) -> None:
    assert outcomes["bytes"]["two-tiny"] == outcomes["bytes"]["again"]


@pytest.mark.slow
def test_the_first_alone_speaks(outcomes: dict[str, Any]) -> None:
    first, second = outcomes["two tiny"]
    assert "2 blocks with mxrot" in first["text"] and second["text"] == ""


@pytest.mark.slow
def test_an_error_of_one_ends_both(folder: Path, outcomes: dict[str, Any]) -> None:
    first, second = outcomes["raised"]
    assert first["code"] == second["code"] == 2 and max(first["seconds"], second["seconds"]) < 30
    assert "mxrot: error: rank 1: model.layers.1: of this process alone; finished blocks are kept" in first["text"]
    assert "--resume continues" in first["text"] and second["text"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_of_one_ends_both(outcomes: dict[str, Any], rank: int) -> None:
    found = outcomes[f"killed {rank}"]
    assert found[rank]["code"] == -9 and found[1 - rank]["code"] == 1 and found[1 - rank]["seconds"] < 60
    assert found[1 - rank]["text"].count("mxrot: error: ") == 1
    assert f"mxrot: error: rank {rank}: " in found[1 - rank]["text"]


@pytest.mark.slow
def test_resumed_after_a_kill_to_the_same_bytes(folder: Path, outcomes: dict[str, Any]) -> None:
    assert [one["code"] for one in outcomes["resumed"]] == [0, 0]
    assert outcomes["bytes"]["killed-1"] == outcomes["bytes"]["two-tiny"]
    assert json.loads((folder / "killed-1" / "run.json").read_text())["fingerprint"]["ranks"] == [2]


@pytest.mark.slow
def test_resumed_by_another_number_of_processes(folder: Path, outcomes: dict[str, Any]) -> None:
    assert outcomes["resumed by one"][0]["code"] == 0
    assert json.loads((folder / "fewer" / "run.json").read_text())["fingerprint"]["ranks"] == [2, 1]


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["block", "network"])
def test_tuning_goes_on_after_a_kill_to_the_same_bytes(folder: Path, outcomes: dict[str, Any], scope: str) -> None:
    assert [one["code"] for one in outcomes[f"tuned {scope}"]] == [0, 0], outcomes[f"tuned {scope}"]
    assert [one["code"] for one in outcomes[f"tuned {scope} killed"]] == [1, -9]
    assert [one["code"] for one in outcomes[f"tuned {scope} resumed"]] == [0, 0]
    assert outcomes["bytes"][f"tuned-{scope}-killed"] == outcomes["bytes"][f"tuned-{scope}"]
    assert outcomes[f"tuned {scope} by one"][0]["code"] == 0
    fewer = json.loads((folder / f"tuned-{scope}-fewer" / "run.json").read_text())
    assert fewer["fingerprint"]["ranks"] == [2, 1]
    run = json.loads((folder / f"tuned-{scope}" / "run.json").read_text())
    looks = run["tuning"] or run["blocks"][1]["tuning"]
    assert looks[-1]["step"] == (6 if scope == "network" else 3)


@pytest.mark.slow
def test_a_time_limit_in_tuning_waits_until_the_first_has_kept_its_state(outcomes: dict[str, Any]) -> None:
    assert [one["code"] for one in outcomes["tuned over"]] == [75, 75], outcomes["tuned over"]
    assert "stopped after step 2 of 6 of distillation" in outcomes["tuned over"][0]["text"]
    assert "tuning.safetensors" in outcomes["kept"]
    assert [one["code"] for one in outcomes["tuned over resumed"]] == [0, 0]
    assert outcomes["bytes"]["tuned-over"] == outcomes["bytes"]["tuned-network"]


@pytest.mark.slow
def test_one_that_stands_still_is_lost(outcomes: dict[str, Any]) -> None:
    first, _ = outcomes["stopped"]
    assert first["code"] == 1 and "mxrot: error: rank 1: was lost" in first["text"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [("refused", "do not share the training of rotations"), ("taken", "exists and is not empty")],
)
def test_what_is_refused_is_said_once(outcomes: dict[str, Any], name: str, said: str) -> None:
    first, second = outcomes[name]
    assert first["code"] == second["code"] == 2
    assert said in first["text"] and first["text"].count("\n") == 1 and second["text"] == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rtn", "finished"])
def test_a_recipe_without_text_and_once_more(outcomes: dict[str, Any], name: str) -> None:
    assert [one["code"] for one in outcomes[name]] == [0, 0]


@pytest.mark.slow
def test_an_interrupt_while_the_lost_one_is_looked_for(outcomes: dict[str, Any]) -> None:
    first, _ = outcomes["ended"]
    assert first["code"] == 143 and "interrupted by SIGTERM; finished blocks are kept" in first["text"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_windows_are_shared_whole_and_evenly(size: int, at_once: int) -> None:
    places = torch.arange(40)
    groups = {"text": places[:17], "held text": places[17:18], "written": places[18:]}
    shares = [own_windows(groups, at_once, Numbered(rank, size)) for rank in range(size)]
    for name, whole in groups.items():
        assert torch.equal(torch.cat([share[name] for share in shares]), whole)
    counts = [sum(map(len, share.values())) for share in shares]
    assert min(counts) > 0 and max(counts) - min(counts) <= 1 + 2 * (40 // size) // 8


def test_shares_end_with_batches_where_these_are_near() -> None:
    groups = {"": torch.arange(112)}
    assert [len(own_windows(groups, 9, Numbered(rank, 2))[""]) for rank in (0, 1)] == [54, 58]
    assert [len(own_windows(groups, 80, Numbered(rank, 2))[""]) for rank in (0, 1)] == [56, 56]


def test_rows_are_shared_whole() -> None:
    rows = Rows((("q", 0, 7), ("k", 2, 4), ("v", 0, 5)), slice(10, 24))
    shares = [rows.share(rank, 3) for rank in range(3)]
    taken = [(name, row) for share in shares for name, first, last in share.pieces for row in range(first, last)]
    assert taken == [(name, row) for name, first, last in rows.pieces for row in range(first, last)]
    assert [share.place for share in shares] == [slice(10, 14), slice(14, 19), slice(19, 24)]
    assert [sum(share.counts) for share in shares] == [4, 5, 5]


@pytest.mark.parametrize(
    ("chosen", "windows", "said"),
    [
        (recipe("spinquant"), 128, "rotation.steps = 0"),
        (recipe("mxrot", choice__candidates=["rounding.target=own"]), 128, "choice = none"),
        (recipe("mxrot"), 3, "4 processes share 3 calibration windows"),
    ],
)
def test_refused(chosen: Any, windows: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_shared(chosen, windows, 4)
    check_shared(chosen, windows, 1)


def test_fingerprints_name_the_numbers_of_processes() -> None:
    two, one = {"format": 2, "seed": 0, "ranks": [2]}, {"format": 2, "seed": 0, "ranks": [1]}
    assert differences(two, one) == []
    assert going_on(two, one)["ranks"] == [2, 1] and going_on(two, two)["ranks"] == [2]
    assert going_on({"format": 2, "seed": 0}, two)["ranks"] == [1, 2]


def set_up(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("variables", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "4"}])
def test_one_process_joins_nothing(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    set_up(monkeypatch, **variables)
    with joined() as world:
        assert world is ONE


PLACE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2", **PLACE}, "not the number of a process"),
        ({"RANK": "x", "WORLD_SIZE": "2", **PLACE}, "not the number of a process"),
    ],
)
def test_odd_variables(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str) -> None:
    set_up(monkeypatch, **variables)
    with pytest.raises(ConfigError, match=said), joined():
        pass


def test_those_who_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    from mxrot import ranks

    set_up(monkeypatch, RANK="1", WORLD_SIZE="2", **PLACE)
    monkeypatch.setattr(ranks, "JOIN", timedelta(seconds=1))
    with pytest.raises(RankError, match=r"the 2 processes did not meet at 127\.0\.0\.1:1 within 1 s"), joined():
        pass
