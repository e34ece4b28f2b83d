"""Both paths of tuning, on a model of two blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import digests, logits, recipe, without_run, write
from torch import Tensor

from mxrot.calibration import Executor
from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.layers import QuantLinear
from mxrot.quantizing import distilling
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe
from mxrot.tuning import loop, network

WINDOWS = random_windows(40, 32)
OPTIONS = {
    "tuning__steps": 60,
    "tuning__batch_windows": 8,
    "tuning__held_out": 0.2,
    "tuning__offset_rate": 0.01,
    "tuning__checks": 6,
    "calibration__generated": 0.0,
}


def tuned(scope: str, **changes: Any) -> Recipe:
    return recipe("mxrot", rounding__method="rtn", tuning__scope=scope, **(OPTIONS | changes))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("rate", [0.0, 1e-3])
def test_distillation_brings_the_logits_closer(source: Path, rate: float) -> None:
    result = pipeline.quantize(source, tuned("network", tuning__transform_rate=rate), windows=WINDOWS)
    checks = result.record.tuning
    assert checks is not None
    assert min(check.held_out for check in checks) < 0.9 * checks[0].held_out
    assert checks[-1].train is not None and checks[-1].train < 0.8 * checks[0].held_out


def test_reconstruction_brings_blocks_closer(source: Path) -> None:
    chosen = tuned("block", tuning__transform_rate=0.0, tuning__steps=120)
    result = pipeline.quantize(source, chosen, windows=random_windows(160, 32))
    for block in result.record.blocks:
        assert block.tuning is not None
        assert min(check.held_out for check in block.tuning) < 0.95 * block.tuning[0].held_out


@pytest.mark.parametrize("scope", ["network", "block"])
def test_a_tuned_model_is_an_ordinary_quantized_one(source: Path, tmp_path: Path, scope: str) -> None:
    """Reloaded it gives the same bits; a second run too; and nothing of tuning is left in it."""
    chosen = tuned(scope)
    model = pipeline.quantize(source, chosen, windows=WINDOWS).model
    assert model is not None
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14 and all(linear.remainder is None for linear in linears)
    write(source, tmp_path / "one", chosen, windows=WINDOWS)
    assert torch.equal(logits(load(tmp_path / "one")), logits(model))
    write(source, tmp_path / "two", chosen, windows=WINDOWS)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "two"))


@pytest.mark.parametrize(("scope", "at"), [("network", 33), ("block", 1)])
def test_a_killed_run_goes_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: str, at: int
) -> None:
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    chosen = tuned(scope)
    write(source, tmp_path / "whole", chosen, windows=WINDOWS)

    def kill(done: int, total: int, what: str) -> None:
        reached = done == at and what.startswith("distillation")
        if reached if scope == "network" else what == f"model.layers.{at}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "killed", chosen, windows=WINDOWS, resume=True, progress=kill)
    kept = {path.name for path in (tmp_path / "killed.partial").iterdir()}
    assert ("tuning.safetensors" in kept) == (scope == "network")
    steps: list[int] = []

    def note(done: int, total: int, what: str) -> None:
        if what.startswith("distillation, held-out loss "):
            steps.append(done)

    write(source, tmp_path / "killed", chosen, windows=WINDOWS, resume=True, progress=note)
    assert without_run(digests(tmp_path / "killed")) == without_run(digests(tmp_path / "whole"))
    assert scope == "block" or steps[0] == 31  # from the look at step 30


def test_a_seed_decides_about_the_order_of_windows(source: Path) -> None:
    def codes(seed: int) -> Tensor:
        model = pipeline.quantize(source, tuned("network"), windows=WINDOWS, seed=seed).model
        assert model is not None
        return torch.cat([m.weight_packed.flatten() for m in model.modules() if isinstance(m, QuantLinear)])

    assert torch.equal(codes(0), codes(0)) and not torch.equal(codes(0), codes(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights__format": "nvfp4", "weights__rule": "absmax", "rounding__method": "rtn"},
            "tuning cannot hold nvfp4 in bfloat16",
        ),
        ({"tuning__scope": "layer"}, "tuning.scope: 'layer' is not one of network, block"),
        ({"tuning__steps": 0}, "steps must be at least 1"),
        ({"tuning__generated": -1.0}, "generated -1.0 must be finite and not negative"),
        ({"tuning__generated": 1.0, "tuning__scope": "block"}, "generated 1.0 must be .* 0 with scope"),
        ({"tuning__decay": -1.0}, "decay -1.0 is negative"),
    ],
)
def test_what_cannot_be_tuned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe("mxrot", **({"tuning__scope": "network"} | changes))


def test_weights_alone_cannot_be_tuned() -> None:
    table = """
name = "w4"
[weights]
format = "mxfp4"
[tuning]
"""
    with pytest.raises(ConfigError, match="tuning needs quantized activations"):
        Recipe.from_toml(table, "w4")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scope", ["network", "block"])
def test_on_a_gpu_it_gets_better_and_a_seed_gives_the_same_bits(source: Path, scope: str) -> None:
    def run() -> tuple[Tensor, list[float]]:
        chosen = tuned(scope, tuning__steps=120)
        result = pipeline.quantize(source, chosen, windows=random_windows(160, 32), device="cuda")
        assert result.model is not None
        linears = [module for module in result.model.modules() if isinstance(module, QuantLinear)]
        looks = result.record.tuning or result.record.blocks[0].tuning
        assert looks is not None
        return torch.cat([m.weight_packed.flatten() for m in linears]), [look.held_out for look in looks]

    one, two = run(), run()
    assert min(one[1]) < 0.95 * one[1][0]
    assert torch.equal(one[0], two[0]) and one[1] == two[1]


def test_a_block_of_which_everything_is_ignored_is_not_tuned(source: Path) -> None:
    chosen = tuned("block", ignore=["model.layers.0.*"], tuning__steps=1)
    result = pipeline.quantize(source, chosen, windows=WINDOWS)
    assert [bool(block.tuning) for block in result.record.blocks] == [False, True]


@pytest.mark.parametrize("name", ["mxrot", "mxrot-tuned"])
def test_the_last_block_of_the_original_model_is_not_run_for_nothing(
    source: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    advanced: list[str] = []
    advance = Executor.advance
    monkeypatch.setattr(Executor, "advance", lambda self, name: (advanced.append(name), advance(self, name))[1])
    pipeline.quantize(source, recipe(name, **({"tuning__steps": 1} if "tuned" in name else {})), windows=WINDOWS)
    for_orders = ["model.layers.0"] if name == "mxrot" else []
    assert advanced == [*for_orders, "model.layers.0 of the original model", "model.layers.0"]


def test_text_comes_more_often_than_what_the_original_writes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    tune = network.tune
    monkeypatch.setattr(network, "tune", lambda *a: (seen.append(a[0].windows), tune(*a))[1])
    options = {"tuning__generated": 0.2, "tuning__repeats": 3, "tuning__held_out": 0.25, "tuning__steps": 1}
    pipeline.quantize(source, tuned("network", **options), windows=WINDOWS)
    held_out = torch.arange(0, 48, 4)
    counts = torch.bincount(seen[0], minlength=48)
    expected = torch.cat([torch.full((40,), 3), torch.ones(8, dtype=torch.int64)])
    expected[held_out] = 0
    assert torch.equal(counts, expected)


def test_tuning_takes_in_what_the_original_writes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    tune_network = distilling.tune_network
    monkeypatch.setattr(distilling, "tune_network", lambda *a: (seen.append(a[3]), tune_network(*a))[1])
    result = pipeline.quantize(source, tuned("network", tuning__generated=0.2, tuning__steps=2), windows=WINDOWS)
    assert result.record.windows == (40, 32)
    assert seen[0].shape == (48, 32) and torch.equal(seen[0][:40], WINDOWS)
