"""Statistics of two processes, each with half of the windows, against those of one with all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.unit.calibration.two_processes import of_two_processes
from tests.unit.surgery.tiny_llama import VOCABULARY, first_block, tiny_llama
from torch import Tensor

from mxrot.calibration import SideBySide, first_executor
from mxrot.calibration import first_block as beginning
from mxrot.calibration.attention_inputs import HeadMoments
from mxrot.calibration.statistics import (
    BlockMoments,
    ChannelMaxima,
    ChannelSquares,
    Collector,
    CrossMoment,
    Hessian,
    LargestMagnitude,
    MeanWindow,
    PeakBlocks,
    RowSample,
    SpacedBlocks,
    Statistic,
)
from mxrot.calibration.world import ONE, OneProcess, World
from mxrot.errors import DataError, NumericsError
from mxrot.models.families.llama import FAMILY as LLAMA

BLOCK, GROUPS, TOKENS = 8, 3, 35
BEFORE = (0, 20)
BATCHES = ((0, 1), (2, 3))
"""Of each process."""

Made = Callable[[int], Collector]
EXACT: dict[str, Made] = {
    "channel maxima": lambda before: ChannelMaxima(),
    "largest magnitude": lambda before: LargestMagnitude(),
    **{f"peaks {rows}": lambda before, rows=rows: PeakBlocks(BLOCK, rows) for rows in (1, 12, 100)},  # type: ignore[misc]
    **{
        f"spaced {rows}": lambda before, rows=rows: SpacedBlocks(BLOCK, rows, TOKENS, before)  # type: ignore[misc]
        for rows in (1, 4, 11, 35, 100)
    },
    **{f"rows {rows}": lambda before, rows=rows: RowSample(rows) for rows in (3, 10, 100)},  # type: ignore[misc]
}
"""Maxima and what is gathered: the same bits."""
SUMS: dict[str, tuple[Made, float]] = {
    "mean window": (lambda before: MeanWindow(), 2.0**-24),
    "channel squares": (lambda before: ChannelSquares(), 2.0**-53),
    "block moments": (lambda before: BlockMoments(BLOCK), 2.0**-53),
    "Hessian": (lambda before: Hessian(), 2.0**-53),
}
"""With the unit of rounding of what they add up in."""


def batches() -> list[Tensor]:
    """[windows, tokens, K]; the last is smaller."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(count, 5, BLOCK * GROUPS, generator=generator) for count in (2, 2, 2, 1)]


def collected(collector: Collector, positions: tuple[int, ...], world: World = ONE) -> Tensor:
    seen = batches()
    for position in positions:
        collector.update(seen[position])
    return collector.result(world)


def cross(positions: tuple[int, ...], world: World = ONE) -> Tensor:
    collector, seen = CrossMoment(), batches()
    for position in positions:
        collector.update(seen[position][..., :4] * 3, seen[position], seen[position][..., :1].abs())
    return collector.result(world)


def of_heads(positions: tuple[int, ...], world: World = ONE) -> Tensor:
    """Of four heads of queries that share two of keys."""
    collector, seen = HeadMoments(), batches()
    for position in positions:
        collector.update(seen[position].unflatten(-1, (4, -1)).transpose(1, 2), kept=2)
    return collector.result(world)


def raises_of(positions: tuple[int, ...], world: World) -> bool:
    """Does the first block, with a NaN in the last window of all, say so?"""
    windows = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    model = tiny_llama()
    if world.rank == 1:
        model.get_submodule("model.embed_tokens").weight[windows[3, 2]] = torch.nan  # type: ignore[index, operator]
    executor = first_executor(model, LLAMA, windows.split(2)[world.rank], 1, world)
    assert executor.windows == 2 and executor.tokens == 24 and executor.tokens_before == 12 * world.rank
    executor.begin(first_block(model))
    try:
        executor.advance("model.layers.0")
    except NumericsError as error:
        return str(error).startswith("model.layers.0: its output holds NaN or Inf")
    return False


def work(world: World) -> dict[str, Tensor]:
    """Everything that both processes do."""
    mine, before = BATCHES[world.rank], BEFORE[world.rank]
    found = {name: collected(make(before), mine, world) for name, make in EXACT.items()}
    found |= {name: collected(make(before), mine, world) for name, (make, _) in SUMS.items()}
    found["cross"], found["heads"] = cross(mine, world), of_heads(mine, world)
    for name, make in (EXACT | {name: make for name, (make, _) in SUMS.items()}).items():
        alone = (2, 3) if world.rank == 1 else ()
        found[f"{name}, seen by the second alone"] = collected(make(0), alone, world)
    odd = torch.tensor([[1.0, torch.nan, -torch.inf], [-2.0, 5.0, torch.nan]])[world.rank]
    found["largest of odd ones"] = world.max(odd)
    found["sum of odd ones"] = world.sum(odd)
    found["as it was"] = odd
    square = torch.arange(6.0).view(2, 3).t()
    added = [torch.full((2,), 1.0 + world.rank), square * (1 + world.rank), torch.tensor([0.5 - world.rank])]
    added = [tensor.to(world.device) for tensor in added]
    world.add_up(added)
    found |= {f"added {position}": tensor for position, tensor in enumerate(added)}
    found["total"] = torch.tensor([world.total(0.1 + world.rank)], dtype=torch.float64)
    kept = world.hand_out_tensors({"a": square, "b": odd} if world.rank == 0 else None)
    assert kept is not None and world.hand_out_tensors(None) is None
    found |= {f"handed out {name}": tensor.clone() for name, tensor in kept.items()}
    found["nobody has seen anything"] = torch.tensor(raises_data_error(world))
    found["a NaN of one"] = torch.tensor(raises_of((0,), world))
    found["counts"] = torch.tensor([world.count(world.rank + 3), world.before(7), world.largest(world.rank)])
    return found


def raises_data_error(world: World) -> bool:
    try:
        Hessian().result(world)
    except DataError:
        return True
    return False


HAS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, HAS_TWO_GPUS])])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return of_two_processes(work, tmp_path_factory.mktemp("world"), request.param)


@pytest.mark.parametrize("name", EXACT)
def test_maxima_and_what_is_gathered_are_the_same_bits(both: list[dict[str, Tensor]], name: str) -> None:
    expected = collected(EXACT[name](0), (0, 1, 2, 3))
    assert not torch.equal(collected(EXACT[name](0), (2, 3)), expected), "else the test would see nothing"
    assert all(torch.equal(found[name], expected) for found in both)


@pytest.mark.parametrize("name", SUMS)
def test_sums_differ_by_their_order_alone(both: list[dict[str, Tensor]], name: str) -> None:
    """Of four products: three additions either way, each off by half a unit of what is added up, and a division."""
    make, unit = SUMS[name]
    expected = collected(make(0), (0, 1, 2, 3))
    size = sum(collected(make(0), (position,)).abs() for position in range(4))
    for found in both:
        assert ((found[name] - expected).abs() <= 8 * unit * size).all() and found[name].dtype == expected.dtype
    assert torch.equal(both[0][name], both[1][name])


@pytest.mark.parametrize(("name", "make"), [("cross", cross), ("heads", of_heads)])
def test_moments_of_several(both: list[dict[str, Tensor]], name: str, make: Callable[..., Tensor]) -> None:
    expected = make((0, 1, 2, 3))
    size = sum(make((position,)).abs() for position in range(4))
    assert all(((found[name] - expected).abs() <= 8 * 2.0**-53 * size).all() for found in both)


@pytest.mark.parametrize("name", [*EXACT, *SUMS])
def test_a_process_without_tokens_changes_nothing(both: list[dict[str, Tensor]], name: str) -> None:
    make = EXACT[name] if name in EXACT else SUMS[name][0]
    expected = collected(make(0), (2, 3))
    assert all(torch.equal(found[f"{name}, seen by the second alone"], expected) for found in both)


def test_nan_survives(both: list[dict[str, Tensor]]) -> None:
    for rank, found in enumerate(both):
        assert found["largest of odd ones"].isnan().tolist() == [False, True, True]
        assert found["largest of odd ones"][0] == 1 and found["sum of odd ones"][0] == -1
        assert found["as it was"][0] == (1, -2)[rank], "what was given stays"


def test_sums_in_place_and_what_the_first_gives(both: list[dict[str, Tensor]]) -> None:
    square = torch.arange(6.0).view(2, 3).t()
    for found in both:
        assert found["added 0"].tolist() == [3.0, 3.0] and found["added 2"].tolist() == [0.0]
        assert torch.equal(found["added 1"].cpu(), 3 * square)
        assert found["total"].item() == 0.1 + 1.1
        assert torch.equal(found["handed out a"].cpu(), square)
        assert found["handed out b"].tolist()[2] == -torch.inf


def test_both_raise_where_one_has_a_nan(both: list[dict[str, Tensor]]) -> None:
    assert all(found["a NaN of one"] for found in both)


def test_both_raise_where_nobody_has_seen_anything(both: list[dict[str, Tensor]]) -> None:
    assert all(found["nobody has seen anything"] for found in both)
    with pytest.raises(DataError, match="no tokens"):
        Hessian().result()


def test_counts(both: list[dict[str, Tensor]]) -> None:
    assert [found["counts"].tolist() for found in both] == [[7, 0, 1], [7, 7, 1]]


def test_one_process_changes_nothing() -> None:
    x = torch.ones(3)
    assert ONE.sum(x) is x and ONE.max(x) is x and ONE.gather(x)[0] is x
    assert (ONE.count(5), ONE.before(5), ONE.largest(5), ONE.total(0.3)) == (5, 0, 5, 0.3)


def test_a_collector_without_a_stated_reduction_cannot_be_made() -> None:
    class Odd(Collector):
        def update(self, x: Tensor) -> None: ...

    with pytest.raises(TypeError, match=r"abstract.*result"):
        Odd()  # type: ignore[abstract]


def concrete(kind: type) -> list[type]:
    own = [] if kind.__abstractmethods__ or not kind.__module__.startswith("mxrot.") else [kind]  # type: ignore[attr-defined]
    return own + [found for child in kind.__subclasses__() for found in concrete(child)]


def test_every_statistic_is_among_those_above() -> None:
    """A new one is tried in two processes, too."""
    tried = {type(make(0)) for make in [*EXACT.values(), *(make for make, _ in SUMS.values())]} | {
        CrossMoment,
        HeadMoments,
    }
    bases = {"Summed", "Maximum"}
    assert {kind for kind in concrete(Statistic) if kind.__name__ not in bases} == tried


class Four(OneProcess):
    """Says that it is the third of four."""

    rank, size = 2, 4

    def hand_out(self, value: object) -> str:  # type: ignore[override]
        return "of the first"


def test_side_by_side_nothing_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has all windows, as in one process; peers are counted where memory is, and know what the first has."""
    beside, own = SideBySide(Four()), torch.tensor([1.0, 2.0])
    assert (beside.rank, beside.size, beside.count(5), beside.before(5)) == (0, 1, 5, 0)
    assert beside.sum(own) is own and beside.max(own) is own and beside.gather(own) == [own]
    assert beside.peers.rank == 2 and beside.peers.hand_out(None) == "of the first"  # type: ignore[comparison-overlap]
    assert ONE.peers is ONE
    told: list[int] = []
    placed = beginning.Placement.of_states
    monkeypatch.setattr(
        beginning.Placement,
        "of_states",
        lambda device, size, processes: told.append(processes) or placed(device, size, processes),
    )
    windows = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(3))
    executor = first_executor(tiny_llama(), LLAMA, windows, 2, beside)
    assert executor.windows == 4 and executor.tokens == 24 and told == [4]
