"""Tuning in two processes: the same parameters in both, the gradients of one, and decisions that are taken alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.checkpoint.folders import recipe
from torch import Tensor, nn

from mxrot.calibration import world as worlds
from mxrot.calibration.world import ONE, World
from mxrot.errors import NumericsError
from mxrot.quantizing import batches
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe
from mxrot.tuning import loop, network, reconstruction
from mxrot.tuning.loop import Check, Group, Problem, Tuning, tune
from mxrot.tuning.shares import average

pytestmark = pytest.mark.slow

FEW = random_windows(20, 24)
SHORT: dict[str, Any] = {
    "tuning__steps": 12,
    "tuning__checks": 4,
    "tuning__held_out": 0.2,
    "calibration__generated": 0.0,
}
ROUNDING: dict[str, Any] = {"rounding__method": "rtn", "tuning__offset_rate": 0.01, "tuning__batch_windows": 8}
FALLING: dict[str, tuple[Recipe, Tensor]] = {
    "block": (
        recipe("hadamard", **SHORT | ROUNDING | {"tuning__scope": "block", "tuning__steps": 120}),
        random_windows(160, 32),
    ),
    "network": (
        recipe("hadamard", **SHORT | ROUNDING | {"tuning__scope": "network", "tuning__steps": 60}),
        random_windows(40, 32),
    ),
}
"""With enough windows and steps for the loss to fall."""
OTHERS: dict[str, tuple[Recipe, Tensor]] = {
    "walked": (recipe("mxrot", tuning__scope="block", tuning__batch_windows=3, permutation="none", **SHORT), FEW),
    "clipping": (recipe("duquant-lwc", **SHORT), FEW),
    "light steps": (recipe("mxrot-tuned", tuning__light_steps=4, **SHORT | {"tuning__generated": 0.2}), FEW),
    "light": (recipe("mxrot-light", **SHORT | {"tuning__generated": 0.2, "tuning__batch_windows": 3}), FEW),
    "levels": (recipe("rcp", **SHORT), FEW),
}
AGAIN = ("walked", "light steps")
ALIKE: dict[str, tuple[Recipe, Tensor]] = {
    scope: (
        recipe(
            "hadamard",
            **SHORT | ROUNDING | {"tuning__scope": scope, "tuning__batch_windows": 100, "tuning__steps": 3},
        ),
        FEW,
    )
    for scope in ("block", "network")
}
"""All windows in every step, and no statistics that could differ: what two processes do, one can do, too."""
NOTED_STEPS = 6


def looks(record: Any) -> Tensor:
    """The losses of all looks, [looks, 2]: held out, and of training."""
    checks = record.tuning or [check for block in record.blocks for check in block.tuning]
    return torch.tensor([[check.held_out, -1.0 if check.train is None else check.train] for check in checks]).double()


def tuned(folder: Path, chosen: Recipe, windows: Tensor, world: World) -> dict[str, Tensor]:
    """The model, its looks, and the gradients of the first steps."""
    seen: list[Tensor] = []
    step, batch_tokens = torch.optim.Adam.step, batches.BATCH_TOKENS

    def noted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if len(seen) < NOTED_STEPS:
            own = [parameter for group in self.param_groups for parameter in group["params"]]
            seen.append(torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in own]))
        return step(self, *arguments, **keywords)

    torch.optim.Adam.step, batches.BATCH_TOKENS = noted, {"cpu": windows.shape[1]}  # type: ignore[method-assign]
    try:
        result = pipeline.quantize(folder, chosen, windows=windows, world=world)
    finally:
        torch.optim.Adam.step, batches.BATCH_TOKENS = step, batch_tokens  # type: ignore[method-assign]
    assert result.model is not None
    found = {f"state/{key}": value.clone() for key, value in result.model.state_dict().items()}
    return found | {"looks": looks(result.record), "gradients": torch.cat(seen)}


def by_one(problem: Problem, options: Tuning, generator: torch.Generator, *rest: Any, **more: Any) -> list[Check]:
    """`tune` in one process that does the parts of two, one after the other, and adds up what they give."""
    parameters = [parameter for group in problem.groups for parameter in group.parameters]
    half = len(problem.windows) // 2

    def backward(chosen: Tensor) -> float:
        losses, sums = [], [torch.zeros_like(parameter) for parameter in parameters]
        for part in (chosen, chosen + half) if problem.are_own else chosen.tensor_split(2):
            for parameter in parameters:
                parameter.grad = None
            losses.append(problem.backward(part))
            for total, parameter in zip(sums, parameters, strict=True):
                if parameter.grad is not None:
                    total += parameter.grad * 0.5
        for total, parameter in zip(sums, parameters, strict=True):
            parameter.grad = total
        return sum(losses) / 2

    windows = problem.windows[:half] if problem.are_own else problem.windows
    return tune(replace(problem, backward=backward, windows=windows), options, generator, *rest, **more)


class Line:
    """Least squares in one dimension on points of this process, in float64."""

    def __init__(self, world: World) -> None:
        self.slope = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.x = torch.linspace(-1, 1, 10).double().split([6, 4])[world.rank]
        self.world, self.steps = world, 0

    def backward(self, chosen: Tensor) -> float:
        x = self.x[chosen]
        loss = ((self.slope[0] * x + self.slope[1] - 2 * x) ** 2).mean()
        with torch.enable_grad():
            ((self.slope[0] * x + self.slope[1] - 2 * x) ** 2).mean().backward()
        self.steps += 1
        return float(loss.detach())

    def held_out(self) -> float:
        return self.world.total(float((self.slope.detach()[0] - 2).abs()) / 2)

    def problem(self, **changes: Any) -> Problem:
        plain: dict[str, Any] = {"backward": self.backward, "held_out_loss": self.held_out, "settle": lambda: None}
        groups, places = [Group([self.slope], 0.1)], torch.arange(len(self.x))
        return Problem(groups=groups, windows=places, name="a line", are_own=True, **(plain | changes))


OPTIONS = Tuning(steps=20, batch_windows=3, offset_rate=0.1, transform_rate=0.0, checks=5, patience=2)


class Memory:
    """A checkpoint in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.kept

    def save(self, tensors: dict[str, Tensor]) -> None:
        self.kept = {name: tensor.clone() for name, tensor in tensors.items()}


def held(checks: list[Check]) -> Tensor:
    return torch.tensor([[check.step, check.held_out] for check in checks], dtype=torch.float64)


def lines(world: World) -> Iterator[tuple[str, Tensor]]:
    """Decisions of the loop where one process alone meets something, and a run that goes on."""

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def broken(line: Line, chosen: Tensor) -> float:
        loss = line.backward(chosen)
        return math.nan if world.rank == 1 and line.steps == 9 else loss

    back, line = Line(world), Line(world)
    checks = tune(back.problem(backward=partial(broken, back), rolls_back=True), OPTIONS, generator(), world=world)
    yield from (("back/looks", held(checks)), ("back/slope", back.slope.detach()))
    try:
        tune(line.problem(backward=partial(broken, line)), OPTIONS, generator(), world=world)
    except NumericsError as error:
        yield "message", torch.tensor(list(str(error).encode()), dtype=torch.uint8)

    whole, first, second = Line(world), Line(world), Line(world)
    checks = tune(whole.problem(), OPTIONS, generator(), world=world)
    yield from (("whole/looks", held(checks)), ("whole/slope", whole.slope.detach()))
    loop.KEEP_SECONDS, memory = 0.0, Memory() if world.rank == 0 else None

    def stop(done: int, total: int, what: str) -> None:
        if done == 10:
            raise KeyboardInterrupt

    try:
        tune(first.problem(), OPTIONS, generator(), memory, stop, world=world)
    except KeyboardInterrupt:
        checks = tune(second.problem(), OPTIONS, generator(), memory, world=world)
        yield from (("resumed/looks", held(checks)), ("resumed/slope", second.slope.detach()))
    yield "resumed/steps", torch.tensor([whole.steps, second.steps])


def averaged(world: World) -> dict[str, Tensor]:
    """Gradients of the mean over five points in float64, of which the first process has two, in pieces of any size."""
    parts = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).split([2, 3])
    mine = parts[world.rank]
    found = {}
    for bucket in (1, 20, 1 << 24):
        worlds.BUCKET_ELEMENTS = bucket
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
        with torch.enable_grad():
            loss = model(mine).square().mean()
            loss.backward()
        mean = average([*model.parameters(), unused], float(loss.detach()), len(mine) / 5, world)
        gradients = [parameter.grad.flatten() for parameter in (*model.parameters(), unused)]  # type: ignore[union-attr]
        found[f"averaged/{bucket}"] = torch.cat([torch.tensor([mean], dtype=torch.float64), *gradients])
        whole = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        whole.load_state_dict(model.state_dict())
        with torch.enable_grad():
            loss = whole(torch.cat(parts)).square().mean()
            loss.backward()
        gradients = [parameter.grad.flatten() for parameter in whole.parameters()]  # type: ignore[union-attr]
        found[f"expected/{bucket}"] = torch.cat([loss.detach()[None], *gradients, torch.zeros(3)])
    worlds.BUCKET_ELEMENTS = 1 << 24
    return found


def work(folder: Path, world: World) -> dict[str, Tensor]:
    found = averaged(world) | dict(lines(world))
    jobs = FALLING | OTHERS | {f"{name} again": OTHERS[name] for name in AGAIN}
    jobs |= {f"alike {name}": job for name, job in ALIKE.items()}
    for name, (chosen, windows) in jobs.items():
        found |= {f"{name}/{key}": value for key, value in tuned(folder, chosen, windows, world).items()}
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def both(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return of_two_processes(partial(work, source), tmp_path_factory.mktemp("two"))


def test_both_have_the_same_bits(both: list[dict[str, Tensor]]) -> None:
    """Of weights, gains, losses and the gradients of a step."""
    one, two = both
    assert one.keys() == two.keys() and len(one) > 100
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


@pytest.mark.parametrize("bucket", [1, 20, 1 << 24])
def test_the_mean_of_gradients_is_that_of_the_whole_batch(both: list[dict[str, Tensor]], bucket: int) -> None:
    """Sums of five products: each side is off by a few units of float64."""
    found, expected = both[0][f"averaged/{bucket}"], both[0][f"expected/{bucket}"]
    assert expected.norm() > 0.1 and (expected[-3:] == 0).all() and (found[-3:] == 0).all()
    assert ((found - expected).abs() <= 64 * 2.0**-53 * expected.abs().max()).all()


@pytest.mark.parametrize("name", FALLING)
def test_the_loss_falls(both: list[dict[str, Tensor]], name: str) -> None:
    held_out, train = both[0][f"{name}/looks"].unbind(dim=1)
    starts = (train < 0).nonzero().flatten().tolist()
    assert len(starts) == (2 if name == "block" else 1)
    for start, end in zip(starts, [*starts[1:], len(train)], strict=True):
        assert held_out[start:end].min() < 0.95 * held_out[start]


@pytest.mark.parametrize("name", AGAIN)
def test_again_it_is_the_same(both: list[dict[str, Tensor]], name: str) -> None:
    of_name = [key for key in both[0] if key.startswith(f"{name}/")]
    assert len(of_name) > 10
    assert all(torch.equal(both[0][key], both[0][key.replace(name, f"{name} again", 1)]) for key in of_name)


@pytest.mark.parametrize("scope", ALIKE)
def test_what_two_do_one_can_do_part_by_part(
    source: Path, both: list[dict[str, Tensor]], scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit of the gradients of every step and of the model; a whole batch at once is rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole = tuned(source, *ALIKE[scope], ONE)
        monkeypatch.setattr(reconstruction if scope == "block" else network, "tune", by_one)
        expected = tuned(source, *ALIKE[scope], ONE)
    finally:
        torch.set_num_threads(threads)
    found = {key.removeprefix(f"alike {scope}/"): value for key, value in both[0].items() if f"alike {scope}/" in key}
    assert found.keys() == expected.keys() and len(expected["gradients"]) > 100_000
    assert [key for key in found if key != "looks" and not torch.equal(found[key], expected[key])] == []
    assert torch.allclose(found["looks"], expected["looks"], rtol=1e-3)
    assert not torch.equal(found["gradients"], whole["gradients"])


def test_a_loss_of_one_that_is_not_finite_ends_both(both: list[dict[str, Tensor]]) -> None:
    for found in both:
        assert bytes(found["message"].tolist()).decode() == "a line: the loss of tuning is nan at step 8"
        assert found["back/looks"][:, 0].tolist() == [0, 4, 8, 8]
        assert found["back/looks"][2, 1] == found["back/looks"][3, 1] == abs(found["back/slope"][0] - 2)


def test_a_run_goes_on_from_what_the_first_has_kept(both: list[dict[str, Tensor]]) -> None:
    for found in both:
        assert torch.equal(found["resumed/slope"], found["whole/slope"])
        assert torch.equal(found["resumed/looks"], found["whole/looks"])
        assert found["resumed/steps"].tolist() == [20, 12], "from the look at step 8"
