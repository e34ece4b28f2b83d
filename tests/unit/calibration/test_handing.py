"""Tokens of two processes, handed to one of them, against those of one process that has them all."""

from __future__ import annotations

import pytest
import torch
from tests.unit.calibration.two_processes import of_two_processes
from torch import Tensor, nn

from mxrot.calibration import Executor, Hessian, handed_out
from mxrot.calibration.placement import Placement
from mxrot.calibration.world import ONE, World

WIDTH = 24
TOKENS = {
    "both": [[(5, 300), (200, 7, 1)], [(4, 90), (600, 30)]],
    "one": [[(), (3, 5)], [(6, 2, 7), ()]],
    "nobody": [[(), ()], [(1,), (2, 3)]],
}
"""Of two modules, by process, how many tokens each batch holds; of the third case nobody has any for the first."""
ROWS = [((0, 3), torch.float32), ((4, 0), torch.bfloat16), ((0, 0), torch.float32), ((2, 5), torch.float16)]
"""Of each process."""
each_case = pytest.mark.parametrize("case", TOKENS)


def batches(case: str, module: int, rank: int) -> list[Tensor]:
    """[1, tokens, WIDTH] each; every other one is so large that a float64 sum of their float32 products rounds."""
    generator = torch.Generator().manual_seed(10 * module + rank)
    counts = TOKENS[case][module][rank]
    return [torch.randn(1, count, WIDTH, generator=generator) * (1, 1e5)[i % 2] for i, count in enumerate(counts)]


def executors(case: str, rank: int, world: World, dtype: torch.dtype = torch.float32) -> list[Executor]:
    """Of the two modules, which multiply by 1 and by 2."""
    found = []
    for module in (0, 1):
        hidden = [x.to(dtype) for x in batches(case, module, rank)]
        found.append(Executor(hidden, ({},), Placement(torch.device("cpu")), world, dtype))
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)
        nn.init.eye_(linear.weight).mul_(1 + module)
        found[-1].begin(nn.Sequential(nn.Identity(), linear))
    return found


def mean(executor: Executor) -> Tensor:
    """Of x^T x, where the module's linear reads it."""
    hessian = Hessian()
    executor.observe([("1", hessian.update)])
    return hessian.result(executor.world)


def work(world: World) -> dict[str, Tensor]:
    found = {}
    for case in TOKENS:
        given = executors(case, world.rank, world)
        before = [[given[module].hidden(index).clone() for index in given[module].batches] for module in (0, 1)]
        own = handed_out(given, world)
        found[f"{case}: numbers"] = torch.tensor([own.world.size, own.tokens, own.tokens_before, len(own.batches)])
        found |= {f"{case}: batch {index}": own.hidden(index).clone() for index in own.batches}
        found |= {f"{case}: output {index}": output.clone() for index, output in enumerate(own.outputs())}
        if own.batches:
            found[f"{case}: mean"] = mean(own)
        found[f"{case}: reduced"] = mean(given[1])
        kept = [torch.equal(given[module].hidden(i), x) for module in (0, 1) for i, x in enumerate(before[module])]
        found[f"{case}: stays"] = torch.tensor(all(kept))
        half = handed_out(executors(case, world.rank, world, torch.bfloat16), world)
        found |= {f"{case}: half {index}": half.hidden(index).clone() for index in half.batches}
    for position, (counts, dtype) in enumerate(ROWS):
        for rank in (0, 1):
            rows = torch.full((counts[world.rank], 2), 1.0 + world.rank, dtype=dtype)
            given_to = world.handed_to(rank, rows, counts)
            assert (given_to is None) == (rank != world.rank)
            found |= {f"rows {position} of {by}": each.clone() for by, each in enumerate(given_to or [])}
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return of_two_processes(work, tmp_path_factory.mktemp("handing"))


@each_case
def test_each_gets_the_batches_of_all_by_rank(both: list[dict[str, Tensor]], case: str) -> None:
    """Of the module of its own number, and without the others."""
    for rank, found in enumerate(both):
        expected = [x for by in (0, 1) for x in batches(case, rank, by)]
        tokens = sum(x.shape[1] for x in expected)
        assert found[f"{case}: numbers"].tolist() == [1, tokens, 0, len(expected)]
        for index, x in enumerate(expected):
            assert torch.equal(found[f"{case}: batch {index}"], x)
            assert torch.equal(found[f"{case}: output {index}"], (1 + rank) * x), "its own module"
            half = found[f"{case}: half {index}"]
            assert half.dtype == torch.bfloat16 and torch.equal(half, x.to(torch.bfloat16))
        assert found[f"{case}: stays"], "what a process has is its own all the same"


def of_one(case: str, module: int) -> Executor:
    """What one process with all tokens runs."""
    hidden = [x for rank in (0, 1) for x in batches(case, module, rank)]
    found = Executor(hidden, ({},), Placement(torch.device("cpu")), ONE)
    found.begin(nn.Sequential(nn.Identity(), nn.Linear(WIDTH, WIDTH, bias=False)))
    return found


def test_sums_are_those_of_one_process_to_the_last_bit(both: list[dict[str, Tensor]]) -> None:
    for rank, found in enumerate(both):
        assert torch.equal(found["both: mean"], mean(of_one("both", rank)))
        assert torch.equal(found["one: mean"], mean(of_one("one", rank)))
    reduced = both[0]["both: reduced"]
    assert not torch.equal(reduced, mean(of_one("both", 1))), "else the test would see nothing"


@pytest.mark.parametrize("position", range(len(ROWS)))
def test_rows_are_handed_to_one(both: list[dict[str, Tensor]], position: int) -> None:
    """Where some have none, and where all have none."""
    counts, dtype = ROWS[position]
    for found in both:
        for rank, count in enumerate(counts):
            assert torch.equal(found[f"rows {position} of {rank}"], torch.full((count, 2), 1.0 + rank, dtype=dtype))


def test_one_process_hands_itself_what_it_has() -> None:
    rows = torch.ones(3, 2)
    given = ONE.handed_to(0, rows, [3])
    assert given is not None and len(given) == 1 and given[0] is rows


def test_a_world_of_one_runs_by_itself() -> None:
    hidden = [torch.ones(1, 3, WIDTH)]
    executor = Executor(hidden, ({}, {"second": 1}), Placement(torch.device("cpu")), ONE)
    executor.begin(nn.Identity())
    executor.advance("first")
    block = nn.Sequential()
    executor.begin(block)
    own = executor.by_itself([torch.zeros(1, 2, WIDTH)])
    assert own.keywords == {"second": 1} and own.block is block and own.tokens == 2 and executor.tokens == 3
