"""`python -m tests.contracts.matrix`: what it counts, and that a cell can fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.contracts import matrix as matrix_of
from tests.contracts.matrix import RECIPES, matrix, unsmoothed
from tests.contracts.test_families import TINY_FAMILIES
from transformers.utils import logging as transformers_logging

# Norms of random gains around zero, as in OLMo 2, make inputs smaller than a trained model has.
pytestmark = pytest.mark.filterwarnings("ignore:.*scales of its inputs go from:mxrot.errors.MxrotWarning")


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def test_a_family_with_sites_that_nothing_smooths() -> None:
    said: list[str] = []
    assert matrix(["olmo2"], said.append) == {"yes": 3}
    assert said[1] == "| olmo2 | yes | yes, `qkv`, `gate_up` not smoothed | yes |"
    assert said[-1].startswith("1 families x 3 recipes: 3 of 3 cells hold, 0 failed (")


def test_a_cell_that_fails_is_counted_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that counts one parameter too many, in one recipe."""
    real = matrix_of.make_plan

    def wrong(*arguments: Any) -> Any:
        plan = real(*arguments)
        if arguments[2].name != "rtn":
            return plan
        shape = replace(plan.sizes.shape, parameters=plan.sizes.shape.parameters + 1)
        return replace(plan, sizes=replace(plan.sizes, shape=shape))

    monkeypatch.setattr(matrix_of, "make_plan", wrong)
    said: list[str] = []
    assert matrix(["llama"], said.append) == {"yes": 2, "failed": 1}
    assert said[1] == "| llama | FAILED | yes | yes |"
    assert said[2].startswith("llama, rtn: AssertionError: a plan counts other parameters")


def test_only_a_recipe_that_smooths_leaves_sites_out() -> None:
    family = TINY_FAMILIES["phi3"]
    assert [unsmoothed(family, name) for name in RECIPES] == [[], ["o", "down"], []]


@pytest.mark.nightly
@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_family_by_every_recipe(name: str) -> None:
    said: list[str] = []
    assert matrix([name], said.append) == {"yes": len(RECIPES)}, "\n".join(said)
