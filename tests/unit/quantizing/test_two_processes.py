"""A model quantized by two processes, each of which sees half of the windows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_mixture, write_tiny_model
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.checkpoint.folders import recipe
from torch import Tensor

from mxrot.calibration import first_block
from mxrot.calibration.world import ONE, World
from mxrot.errors import NumericsError
from mxrot.quantizing import batches
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe

pytestmark = pytest.mark.slow

WINDOWS = random_windows(8, 24)
MANY = random_windows(60, 32)
"""For experts."""
PLAIN: dict[str, Any] = {"calibration__generated": 0.0, "permutation": "none"}
EXACT = ["smoothquant", "duquant++", "duquant"]
"""Recipes whose statistics are maxima and samples."""


def mixed() -> Recipe:
    """With statistics that are sums, those of a cache's transforms included."""
    rows = {"cache__keys": "int4_row_asym", "cache__values": "int4_row_asym"}
    return recipe("mxrot", calibration__generated=0.0, cache__transform="second_moment", **rows)


def state(folder: Path, chosen: Recipe, windows: Tensor, world: World) -> dict[str, Tensor]:
    """The model that `world` makes of all these windows, one of which passes through a block at a time."""
    batch_tokens, batches.BATCH_TOKENS = batches.BATCH_TOKENS, {"cpu": windows.shape[1]}
    try:
        model = pipeline.quantize(folder, chosen, windows=windows, world=world).model
    finally:
        batches.BATCH_TOKENS = batch_tokens
    assert model is not None
    return dict(model.state_dict())


def all_states(folder: Path, world: World) -> Iterator[tuple[str, Tensor]]:
    for name in EXACT:
        yield from (
            (f"{name}/{key}", value) for key, value in state(folder / "tiny", recipe(name), WINDOWS, world).items()
        )
    yield from ((f"mxrot/{key}", value) for key, value in state(folder / "tiny", mixed(), WINDOWS, world).items())
    yield from ((f"experts/{key}", value) for key, value in state(folder / "experts", mixed(), MANY, world).items())


def message_of(folder: Path, chosen: Recipe, world: World) -> Tensor:
    """What the NumericsError says where the second process alone meets a NaN."""
    own = first_block.first_hidden

    def with_a_nan(*arguments: Any) -> Tensor:
        found = own(*arguments).clone()
        found[0, 5, 7] = torch.nan if world.rank == 1 else 0.0
        return found

    first_block.first_hidden = with_a_nan
    try:
        state(folder / "tiny", chosen, WINDOWS, world)
    except NumericsError as error:
        return torch.tensor(list(str(error).encode()), dtype=torch.uint8)
    finally:
        first_block.first_hidden = own
    return torch.zeros(1, dtype=torch.uint8)


def work(folder: Path, world: World) -> dict[str, Tensor]:
    found = {key: value.clone() for key, value in all_states(folder, world)}
    for name in ("smoothquant", "mxrot"):
        found[f"message of {name}"] = message_of(folder, recipe(name, **(PLAIN if name == "mxrot" else {})), world)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    write_tiny_model(found / "tiny")
    write_tiny_mixture(found / "experts", "mixtral")
    return found


@pytest.fixture(scope="module")
def both(folder: Path) -> list[dict[str, Tensor]]:
    return of_two_processes(partial(work, folder), folder)


def test_both_make_the_same_model(both: list[dict[str, Tensor]]) -> None:
    """Hessians, shifts, routing and all: no bit differs."""
    one, two = both
    assert one.keys() == two.keys() and len(one) > 100
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", EXACT)
def test_maxima_and_samples_give_the_model_of_one_process(
    folder: Path, both: list[dict[str, Tensor]], name: str
) -> None:
    expected = state(folder / "tiny", recipe(name), WINDOWS, ONE)
    of_half = state(folder / "tiny", recipe(name), WINDOWS[:4], ONE)
    assert any(not torch.equal(of_half[key], expected[key]) for key in expected), "else the test would see nothing"
    assert all(torch.equal(both[0][f"{name}/{key}"], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["mxrot", "experts"])
def test_sums_give_nearly_that_of_one_process(folder: Path, both: list[dict[str, Tensor]], name: str) -> None:
    """Moments that differ by float64 rounding move a transform by less than bfloat16 keeps, but for ties."""
    expected = state(folder / ("tiny" if name == "mxrot" else name), mixed(), WINDOWS if name == "mxrot" else MANY, ONE)
    same = sum(int((both[0][f"{name}/{key}"] == value).sum()) for key, value in expected.items())
    assert same > 0.99 * sum(value.numel() for value in expected.values())


@pytest.mark.parametrize("name", ["smoothquant", "mxrot"])
def test_both_raise_where_one_meets_a_nan(both: list[dict[str, Tensor]], name: str) -> None:
    """Smoothing looks at maxima, and collecting for a transform at the largest magnitude."""
    texts = [bytes(found[f"message of {name}"].tolist()).decode() for found in both]
    assert texts[0] == texts[1]
    assert texts[0].startswith("model.layers.0.self_attn.q_proj: its input holds NaN or Inf on the calibration text")
