"""Two-bit weights that are learned: what they round to, gradients beside autograd's, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomllib
import torch
from tests.tiny_model import random_windows, write_tiny_model
from tests.unit.checkpoint.folders import digests, logits, without_run, write
from torch import Tensor, nn

from mxrot.checkpoint import load
from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer, quantize
from mxrot.layers import QuantLinear
from mxrot.quantizing import run as pipeline
from mxrot.recipe import Recipe, load_recipe
from mxrot.sections import Tuning
from mxrot.tuning import loop
from mxrot.tuning.level_tables import LevelTables
from mxrot.tuning.levels import WINDOW, LevelsLinear, LookUp, codes_under
from mxrot.tuning.straight_inputs import StraightInputs
from mxrot.tuning.straight_through import Divergence, WeightedDivergence

ROWS, K, BLOCK = 6, 64, 32
LEARNED = load_recipe("rcp")
WINDOWS = random_windows(12, 32)
SHORT = {"tuning.steps": 8, "tuning.checks": 2, "tuning.held_out": 0.2, "tuning.norm_rate": 0.01}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(rule: str, blocks: Tensor) -> tuple[LevelTables, Tensor]:
    """Tables as rounding to nearest leaves them, and the weights in units."""
    own = TensorQuantizer.of("lut2", rule, 0.6 if rule == "spaced" else 1.0)
    parts = own.format.grid.choose(blocks, own.rule)
    levels = parts.tensors["scale"].float()[..., None] * parts.tensors["levels"]
    tables = LevelTables([blocks], [levels], rule == "spaced")
    return tables, blocks / tables.unit[:, None]


@pytest.mark.parametrize("rule", ["lloyd", "spaced"])
def test_they_start_where_rounding_has_left_them(rule: str) -> None:
    blocks = random(20, BLOCK).exp()
    blocks[1] = random(BLOCK)
    blocks[2] = -blocks[2]
    own = TensorQuantizer.of("lut2", rule, 0.6 if rule == "spaced" else 1.0)
    tables, weights = started(rule, blocks)
    rounded = own.format.grid.round(blocks, own.format.grid.choose(blocks, own.rule))
    found = LookUp.apply(weights, tables.edges(), tables.values(), tables.unit)
    size = blocks.abs().amax(dim=-1, keepdim=True)
    assert ((found - rounded).abs() <= 0.02 * size).float().mean() > 0.998  # a weight in the middle may go elsewhere


def test_clipped_asymmetric_int2_is_the_start_of_equally_spaced_levels() -> None:
    tables, _ = started("lloyd", torch.linspace(-1, 1, 4).repeat(2, BLOCK // 4))
    shares = torch.sigmoid(tables.boundaries)
    assert torch.allclose(shares[:, 0], torch.tensor([1 / 6, 2 / 5, 2 / 3]), atol=0.01)
    assert torch.allclose(torch.sigmoid(tables.inner)[:, 0], torch.tensor([1 / 3, 1 / 2]), atol=0.01)


@pytest.mark.parametrize("rule", ["lloyd", "spaced"])
def test_levels_and_boundaries_by_the_formula(rule: str) -> None:
    """Block by block in float64, whatever the parameters are; in order, and as a checkpoint will hold them."""
    blocks = random(8, BLOCK)
    tables, _ = started(rule, blocks)
    with torch.no_grad():
        for seed, parameter in enumerate(tables.parameters()):
            parameter.copy_(random(*parameter.shape, seed=seed) * 2)
    assert (tables.middle == 0).sum() >= 6
    torch.testing.assert_close(tables.middle + tables.smallest, blocks.amin(dim=-1), rtol=0.01, atol=0)
    torch.testing.assert_close(tables.middle + tables.largest, blocks.amax(dim=-1), rtol=0.01, atol=0)
    edges, real, values = tables.edges().double(), tables.real_levels().double(), tables.values()
    stored = tables.stored().tensors
    assert torch.equal(values, stored["scale"].float()[..., None] * stored["levels"])
    assert (edges.diff(dim=-1) > 0).all() and (real.diff(dim=-1) > 0).all()
    for g in range(len(blocks)):
        s = [torch.sigmoid(rows[:, g].detach().double()).tolist() for rows in tables.parameters()]
        middle, smallest, largest = (float(one[g]) for one in (tables.middle, tables.smallest, tables.largest))
        low, high = middle + s[0][0] * smallest, middle + s[0][1] * largest
        t, c = [1 / 6, 1 / 2, 5 / 6], [1 / 3, 2 / 3]
        if rule == "lloyd":
            t = [s[1][0], s[1][0] + (1 - s[1][0]) * s[1][1]]
            t.append(t[1] + (1 - t[1]) * s[1][2])
            c = [s[2][0], s[2][0] + (1 - s[2][0]) * s[2][1]]
        expected = torch.tensor([low, *(low + (high - low) * one for one in t), high]) / float(tables.unit[g])
        assert torch.allclose(edges[g], expected.double(), atol=1e-5)
        expected = torch.tensor([low, *(low + (high - low) * one for one in c), high])
        assert torch.allclose(real[g], expected.double(), atol=1e-5)
    step = real.abs().amax(dim=-1, keepdim=True) / 100
    assert ((values - real).abs() <= step).all()


def test_the_gradient_of_levels_is_that_of_autograd_and_weights_pass_inside() -> None:
    tables, weights = started("lloyd", random(10, BLOCK))
    weights.requires_grad_()
    edges, values = tables.edges().detach(), tables.values().detach().requires_grad_()
    direction = random(10, BLOCK, seed=2)
    got = torch.autograd.grad(LookUp.apply(weights, edges, values, tables.unit), (weights, values), direction)
    codes = (weights[..., None] > edges[:, None, 1:-1]).sum(dim=-1)
    assert torch.equal(codes, codes_under(weights, edges))
    assert torch.equal(codes.unique(), torch.arange(4))
    wanted = torch.autograd.grad((nn.functional.one_hot(codes, 4) * values[:, None]).sum(dim=-1), values, direction)
    assert torch.allclose(got[1], wanted[0], atol=1e-5)
    inside = (weights > edges[:, :1]) & (weights <= edges[:, -1:])
    assert 0 < int((~inside).sum()) < weights.numel() / 3
    assert torch.equal(got[0], torch.where(inside, direction * tables.unit[:, None], 0))


def test_the_gradient_of_a_boundary_is_what_moving_it_far_costs() -> None:
    """A boundary that moves over all of its window, from one end to the other, changes the loss by so much."""
    tables, weights = started("lloyd", random(10, BLOCK))
    edges, values = tables.edges().detach().requires_grad_(), tables.values().detach()
    direction = random(10, BLOCK, seed=2)
    (got,) = torch.autograd.grad(LookUp.apply(weights, edges, values, tables.unit), edges, direction)
    assert not got[:, [0, -1]].any()
    for index in (1, 2, 3):
        moved = [edges.detach().clone() for _ in range(2)]
        moved[0][:, index] -= WINDOW
        moved[1][:, index] += WINDOW
        # Without order: one boundary alone, as if the others were far.
        alone = [weights > one[:, index : index + 1] for one in moved]
        change = values[:, index : index + 1] - values[:, index - 1 : index]
        costs = [(direction * is_above * change).sum(dim=-1) for is_above in alone]
        assert torch.allclose(got[:, index], (costs[1] - costs[0]) / (2 * WINDOW), atol=1e-4)


def linear_of(weight: Tensor) -> LevelsLinear:
    own, inputs = TensorQuantizer.of("lut2"), TensorQuantizer.of("int4_row", clip=0.9)
    linear = QuantLinear(K, len(weight), own, inputs)
    linear.set_weight(quantize(weight, own.format, own.rule))
    linear.remainder = (weight - linear.qtensor().dequantize()).to(torch.bfloat16)
    return LevelsLinear(linear, StraightInputs(None, inputs, 1))


def test_inputs_are_quantized_with_a_gradient_as_if_they_were_not() -> None:
    linear = linear_of(random(ROWS, K))
    tables = LevelTables([linear.weights.detach()], [linear.start_levels()], False)
    linear.weights.data.div_(tables.unit[:, None])
    linear.unit, linear.edges, linear.values = tables.unit[:], tables.edges().detach(), tables.values().detach()
    x = random(3, K, seed=4).requires_grad_()
    found = linear(x)
    quantized = TensorQuantizer.of("int4_row", clip=0.9)(x.detach())
    assert torch.equal(found, nn.functional.linear(quantized, linear.weight()))
    (got,) = torch.autograd.grad(found, x, random(3, ROWS, seed=5))
    assert torch.equal(got, random(3, ROWS, seed=5) @ linear.weight())


@pytest.mark.parametrize("reverse", [0.0, 0.3, 1.0])
def test_the_weighted_divergence_and_its_gradient(reverse: float) -> None:
    found, expected = random(7, 50).requires_grad_(), random(7, 50, seed=1)
    own, other = found.double().log_softmax(dim=-1), expected.double().log_softmax(dim=-1)
    kl = nn.functional.kl_div
    there = kl(other, own, reduction="batchmean", log_target=True)
    back = kl(own, other, reduction="batchmean", log_target=True)
    wanted = reverse * there + (1 - reverse) * back
    got = WeightedDivergence.apply(found, expected, reverse)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, found, retain_graph=True)[0] for loss in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    if reverse == 0:
        torch.testing.assert_close(got, Divergence.apply(found, expected), rtol=1e-5, atol=1e-6)


# Whole runs


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"), torch.float16, head_dim=32)


def learned(**changes: Any) -> Recipe:
    return LEARNED.changed(SHORT | {name.replace("__", "."): value for name, value in changes.items()})


@pytest.mark.parametrize("rule", ["lloyd", "spaced"])
def test_distillation_brings_the_logits_closer(source: Path, rule: str) -> None:
    chosen = learned(weights__rule=rule, tuning__steps=60, tuning__offset_rate=0.005, rounding__method="rtn")
    checks = pipeline.quantize(source, chosen, windows=random_windows(80, 32)).record.tuning
    assert checks is not None
    assert min(check.held_out for check in checks) < 0.9 * checks[0].held_out


def test_a_learned_model_is_an_ordinary_quantized_one(source: Path, tmp_path: Path) -> None:
    """Reloaded it gives the same bits; a second run too; and nothing of tuning is left in it."""
    chosen = learned(tuning__steps=24, tuning__offset_rate=0.005, rounding__method="rtn")
    windows = random_windows(40, 32)
    model = pipeline.quantize(source, chosen, windows=windows).model
    assert model is not None
    linears = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(linears) == 14 and all(linear.remainder is None for linear in linears)
    assert not any(parameter.requires_grad for parameter in linears[0].parameters())
    write(source, tmp_path / "one", chosen, windows=windows)
    again = load(tmp_path / "one")
    assert torch.equal(logits(again), logits(model))
    gains = {name: value for name, value in again.named_parameters() if "layernorm" in name}
    assert len(gains) == 4 and all((gain != 1).any() for gain in gains.values())
    write(source, tmp_path / "two", chosen, windows=windows)
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "two"))


def test_a_rate_of_zero_leaves_as_it_is(source: Path) -> None:
    """Norms here; that codes follow the clips alone then shows in nothing that is kept."""
    still = {f"tuning__{name}_rate": 0.0 for name in ("offset", "level", "boundary", "norm")}
    model = pipeline.quantize(source, learned(**still), windows=WINDOWS).model
    assert model is not None
    assert all((value == 1).all() for name, value in model.named_parameters() if "layernorm" in name)


def test_a_killed_run_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "KEEP_SECONDS", 0.0)
    chosen = learned(tuning__checks=4)
    write(source, tmp_path / "whole", chosen, windows=WINDOWS)

    steps = torch.optim.Adam.step
    count = 0

    def interrupted(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            raise KeyboardInterrupt
        return steps(self, *arguments, **keywords)

    monkeypatch.setattr(torch.optim.Adam, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(source, tmp_path / "one", chosen, windows=WINDOWS)
    write(source, tmp_path / "one", chosen, windows=WINDOWS, resume=True)
    assert count > 5
    assert without_run(digests(tmp_path / "one")) == without_run(digests(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tuning.scope": "block"}, 'moves = "levels" needs scope = "network", got \'block\''),
        ({"weights.format": "int4_g32", "weights.rule": ""}, 'moves = "levels" needs look-up tables, and int4_g32 has'),
        (
            {"tuning.moves": "clipping", "tuning.scope": "block", "tuning.loss": "forward"},
            "norm_rate 0.003 has nothing",
        ),
        ({"tuning.moves": "rounding", "tuning.norm_rate": 0.0}, "tuning moves codes under one scale a block, and lut2"),
        ({"tuning.level_rate": -1.0}, "level_rate -1.0 is negative or not finite"),
        ({"activations": "none"}, "tuning needs quantized activations"),
    ],
    ids=str,
)
def test_what_cannot_be_learned(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        LEARNED.changed(changes)
    assert message in str(raised.value)


def test_two_kinds_of_levels_are_refused() -> None:
    table = tomllib.loads(LEARNED.to_toml())
    table["override"].append({"sites": ["o"], "weights": {"rule": "spaced"}})
    with pytest.raises(ConfigError, match="learns equally spaced levels everywhere or nowhere"):
        Recipe.from_table(table, "mixed")


def test_groups_name_what_moves() -> None:
    tables, _ = started("spaced", random(4, BLOCK))
    assert [group.parameters for group in tables.groups(Tuning(moves="levels"))] == [[tables.ends]]
    tables, _ = started("lloyd", random(4, BLOCK))
    assert [group.rate for group in tables.groups(Tuning(moves="levels", boundary_rate=0.0))] == [1e-2, 1e-2]
