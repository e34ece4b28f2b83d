"""`mxrot search` as several processes: every bit of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.unit.checkpoint.folders import digests
from tests.unit.ranked import made_by, read_outcomes
from tests.unit.ranked_search import measured


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_by("tests.unit.ranked_search", tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Any]:
    return read_outcomes(folder)


@pytest.mark.slow
def test_several_search_as_one(folder: Path, outcomes: dict[str, Any]) -> None:
    """One test, so that workers that share the tests do not each start all processes."""
    for size in (2, 3):
        look_at_a_whole_search(folder, outcomes, size)
    look_at_another_budget(folder, outcomes)
    look_at_kills(folder, outcomes)
    look_at_broken_mixtures(folder, outcomes)
    look_at_what_is_refused(outcomes)


def look_at_a_whole_search(folder: Path, outcomes: dict[str, Any], size: int) -> None:
    """The quantized model, all other roundings, every figure, and the recipe, to the last bit."""
    assert [one["code"] for one in outcomes[f"whole {size}"]] == [0] * size, outcomes[f"whole {size}"]
    assert not any(one["text"] for one in outcomes[f"whole {size}"][1:])
    assert recipe(folder, f"whole {size}") == recipe(folder, "whole 1")
    assert table(folder, f"whole {size}") == table(folder, "whole 1")
    assert "[[override]]" in recipe(folder, "whole 1") and len(table(folder, "whole 1")["measurements"]) > 15
    alone, together = (tensors(folder / f"work-{count}") for count in (1, size))
    assert alone == together and len(alone) > 16
    alone, together = (measured(folder / f"work-{count}") for count in (1, size))
    assert alone.items() <= together.items()


def look_at_another_budget(folder: Path, outcomes: dict[str, Any]) -> None:
    """What three have measured is taken by one and by two."""
    for size in (1, 2):
        assert [one["code"] for one in outcomes[f"lower {size}"]] == [0] * size, outcomes[f"lower {size}"]
        text = outcomes[f"lower {size}"][0]["text"]
        assert text.count("measurements were made before") == 1 and "model.layers.0" not in text.split("measuring")[0]
    assert recipe(folder, "lower 1") == recipe(folder, "lower 2") != recipe(folder, "whole 1")
    assert table(folder, "lower 1") == table(folder, "lower 2")


def look_at_kills(folder: Path, outcomes: dict[str, Any]) -> None:
    """Of one process in the pass and while measuring; what is kept leads one process to the same end."""
    for name in ("killed in the pass", "killed measuring"):
        first, second = outcomes[name]
        assert (first["code"], second["code"]) == (1, -9) and first["seconds"] < 60
        assert first["text"].count("mxrot: error: ") == 1 and "mxrot: error: rank 1: was lost" in first["text"]
    assert outcomes["resumed"][0]["code"] == 0 and "measurements were made before" in outcomes["resumed"][0]["text"]
    assert recipe(folder, "resumed") == recipe(folder, "whole 1")
    assert table(folder, "resumed") == table(folder, "whole 1")
    assert tensors(folder / "killed") == tensors(folder / "work-1")


def look_at_broken_mixtures(folder: Path, outcomes: dict[str, Any]) -> None:
    """One that is not finite ends a search that needs it, in the same words, and no other."""
    assert outcomes["extra"], "two processes have measured nothing that one does not need"
    assert [one["code"] for one in outcomes["broken, not needed"]] == [0, 0], outcomes["broken, not needed"]
    assert recipe(folder, "broken, not needed") == recipe(folder, "whole 1")
    assert outcomes["extra"][-1] not in measured(folder / "broken, not needed")
    said = [outcomes[f"broken {size}"][0]["text"].splitlines()[-1] for size in (1, 2)]
    assert said[0] == said[1] and "the logits of a mixture hold NaN or Inf" in said[0]
    assert [one["code"] for one in outcomes["broken 2"]] == [2, 2] and not outcomes["broken 2"][1]["text"]


def look_at_what_is_refused(outcomes: dict[str, Any]) -> None:
    """Once, and before anything is read."""
    for name, said in (("refused", "2 processes do not share the training of rotations"), ("no bits", "--bits 4: ")):
        first, *others = outcomes[name]
        assert {one["code"] for one in outcomes[name]} == {2} and not any(one["text"] for one in others)
        assert said in first["text"] and first["text"].count("\n") == 1 and "rank" not in first["text"]


def recipe(folder: Path, name: str) -> str:
    return (folder / f"{name}.toml").read_text()


def table(folder: Path, name: str) -> dict[str, Any]:
    """What --json holds, but for what a run is allowed to differ in."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "processes")}


def tensors(work: Path) -> dict[str, Any]:
    return {name: digest for name, digest in digests(work).items() if name.endswith(".safetensors")}
