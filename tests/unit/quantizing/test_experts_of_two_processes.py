"""Experts that two processes take by turns, one more than they can share, against those of one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_mixture
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.checkpoint.folders import recipe
from torch import Tensor, nn

from mxrot.calibration.world import ONE, World
from mxrot.layers import QuantLinear
from mxrot.quantizing import batches, problems
from mxrot.quantizing import run as pipeline
from mxrot.quantizing.record import LinearReport
from mxrot.recipe import Recipe
from mxrot.surgery import PermutedFfn

pytestmark = pytest.mark.slow

EXPERTS = 5
HANDED = EXPERTS - EXPERTS % 2
"""The first so many are one process's each; the last one is shared."""
WINDOWS = random_windows(60, 32)
TEXT: dict[str, Any] = {"calibration__generated": 0.0}
RECIPES = {
    "rtn": recipe("rtn"),
    "nvfp4": recipe("rtn", weights__format="nvfp4", weights__rule="absmax", activations="none"),
    "duquant++": recipe("duquant++"),
    "mxrot": recipe("mxrot", **TEXT),
    "tuned": recipe("mxrot-tuned", tuning__generated=0.0, tuning__prompted=0.0, **TEXT),
}
"""The first two see no data, and "nvfp4" has a scale of the whole tensor."""
EXACT = ["rtn", "nvfp4"]
WITH_DATA = [name for name in RECIPES if name not in EXACT]
SAME = 0.99
"""Of the codes, where sums differ by float64 rounding."""
ERRORS = 0.01
"""What moves an error at most then: a code that comes out otherwise was nearly as wrong."""
NUMBERS = ("weight_error", "output_error", "damping", "tokens", "target_strength")
"""Of a report."""


@contextmanager
def with_tuned_experts(found: dict[str, Tensor]) -> Iterator[None]:
    """Let experts be tuned, in steps that only note what rounding took away, and take one window at a time."""

    def note(run: object, model: nn.Module, *rest: object) -> list[object]:
        linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        found.update({f"remainder of {name}": x.remainder for name, x in linears.items() if x.remainder is not None})
        return []

    own = batches.BATCH_TOKENS, problems.expert_problems, pipeline.distill
    batches.BATCH_TOKENS = {"cpu": WINDOWS.shape[1]}
    problems.expert_problems = lambda rules: iter(())
    pipeline.distill = note  # type: ignore[assignment]
    try:
        yield
    finally:
        batches.BATCH_TOKENS, problems.expert_problems, pipeline.distill = own


def made(folder: Path, chosen: Recipe, world: World) -> dict[str, Tensor]:
    """The tensors of the model that `world` makes, its remainders, what its reports say, and its orders of channels."""
    found: dict[str, Tensor] = {}
    with with_tuned_experts(found):
        windows = None if chosen.is_data_free else WINDOWS
        quantized = pipeline.quantize(folder / "experts", chosen, windows=windows, world=world)
    assert quantized.model is not None
    found |= quantized.model.state_dict()
    if isinstance(quantized.source, PermutedFfn):
        found |= {f"order of {name}": order for name, order in quantized.source.orders.items()}
    reports = [report for block in quantized.record.blocks for report in block.linears]
    found["names"] = torch.tensor(list(" ".join(said(report) for report in reports).encode()), dtype=torch.uint8)
    return {name: value.clone() for name, value in found.items()} | {
        f"report {report.name}": torch.tensor(
            [torch.nan if (x := getattr(report, key)) is None else x for key in NUMBERS], dtype=torch.float64
        )
        for report in reports
    }


def said(report: LinearReport) -> str:
    """What stands in a report beside its numbers."""
    return f"{report.name}:{report.shape}:{report.site}:{type(report.tokens).__name__}"


def work(folder: Path, world: World) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value for name, chosen in RECIPES.items() for key, value in made(folder, chosen, world).items()
    }


def same_bits(one: Tensor, two: Tensor) -> bool:
    """NaN, which stands for what a report does not have, is equal to itself."""
    bytes_of = [x.contiguous().flatten().view(torch.uint8) for x in (one, two)]
    return (one.dtype, one.shape) == (two.dtype, two.shape) and torch.equal(*bytes_of)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    write_tiny_mixture(found / "experts", "mixtral", num_local_experts=EXPERTS)
    return found


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Tensor]]:
    return of_two_processes(partial(work, folder), folder)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {name: made(folder, chosen, ONE) for name, chosen in RECIPES.items()}


def of_recipe(found: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in found.items() if key.startswith(f"{name}/")}


@pytest.mark.parametrize("name", RECIPES)
def test_both_make_the_same_model_and_say_the_same(both: list[dict[str, Tensor]], name: str) -> None:
    """Weights, remainders, orders and reports."""
    one, two = (of_recipe(found, name) for found in both)
    assert one.keys() == two.keys() and sum(key.startswith("report ") for key in one) == 2 * (4 + 3 * EXPERTS)
    assert [key for key in one if not same_bits(one[key], two[key])] == []


@pytest.mark.parametrize("name", EXACT)
def test_without_data_all_is_that_of_one_process(
    both: list[dict[str, Tensor]], alone: dict[str, dict[str, Tensor]], name: str
) -> None:
    found, expected = of_recipe(both[0], name), alone[name]
    assert found.keys() == expected.keys()
    assert [key for key in found if not same_bits(found[key], expected[key])] == []


@pytest.mark.parametrize("name", WITH_DATA)
def test_nearly_all_is_that_of_one_process(
    both: list[dict[str, Tensor]], alone: dict[str, dict[str, Tensor]], name: str
) -> None:
    """Codes, scales and transforms of every linear, remainders and orders."""
    found, expected = of_recipe(both[0], name), alone[name]
    assert found.keys() == expected.keys()
    for key in (key for key in expected if not key.startswith("report ")):
        assert (found[key] == expected[key]).double().mean() >= SAME, key


@pytest.mark.parametrize("name", WITH_DATA)
def test_reports_say_what_those_of_one_process_say(
    both: list[dict[str, Tensor]], alone: dict[str, dict[str, Tensor]], name: str
) -> None:
    found, expected = of_recipe(both[0], name), alone[name]
    tokens = set()
    for key in (key for key in expected if key.startswith("report ")):
        (*errors, damping, count, strength), (*others, other_damping, other_count, other_strength) = (
            one[key].tolist() for one in (found, expected)
        )
        assert errors == pytest.approx(others, rel=ERRORS), key
        assert (damping, count, strength) == pytest.approx((other_damping, other_count, other_strength), nan_ok=True)
        tokens.add(count)
    assert name == "duquant++" or len(tokens) > EXPERTS, "else experts could be taken for each other"


def test_what_rounding_took_away_is_there_in_both(both: list[dict[str, Tensor]]) -> None:
    """Of most weights of every linear, where tuning follows; else nothing is kept."""
    for found in both:
        remainders = {key: value for key, value in found.items() if "/remainder " in key}
        assert len(remainders) == 2 * (4 + 3 * EXPERTS) and all(key.startswith("tuned/") for key in remainders)
        for name, value in remainders.items():
            assert value.dtype == torch.bfloat16 and value.count_nonzero() > value.numel() / 2, name


def test_orders_of_handed_experts_are_those_of_one_process(
    both: list[dict[str, Tensor]], alone: dict[str, dict[str, Tensor]]
) -> None:
    """To the last bit, because the moments are: a window is a batch."""
    expected = {key: value for key, value in alone["mxrot"].items() if key.startswith("order of ")}
    handed = [key for key in expected if int(key.split(".")[-2]) < HANDED]
    assert len(expected) == 2 * EXPERTS and len(handed) == 2 * HANDED
    assert len({tuple(order.tolist()) for order in expected.values()}) == 2 * EXPERTS
    assert all(torch.equal(found[f"mxrot/{key}"], expected[key]) for found in both for key in handed)
