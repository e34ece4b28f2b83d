"""The codes of calibrated methods, as they were."""

import json

import pytest
import torch
from tests.golden.codes import CASES, FILE, spelled
from torch import Tensor

MOVED = 1e-6
"""Relative; float32 is exact to 6e-8, and what float64 computes here to 1e-12."""


@pytest.mark.parametrize("case", CASES)
def test_the_very_same_codes(case: str) -> None:
    expected, found = json.loads(FILE.read_text())[case], spelled(CASES[case](lambda x: x))
    changed = [
        f"{part}, row {row}: {old} became {new}"
        for part in expected
        for row, (old, new) in enumerate(zip(expected[part], found[part], strict=True))
        if old != new
    ]
    assert not changed, (
        f"{case}: {'; '.join(changed)}. If that is meant, write it under Numerics in CHANGELOG.md, then run "
        "`python -m tests.golden.codes`."
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_no_position_is_near_a_tie(case: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def move(x: Tensor) -> Tensor:
        return x * (1 + MOVED * torch.randn(x.shape, dtype=torch.float64, generator=generator))

    assert spelled(CASES[case](move)) == spelled(CASES[case](lambda x: x))


def test_every_case_is_on_file_and_is_another() -> None:
    table = json.loads(FILE.read_text())
    assert table.keys() == CASES.keys()
    assert len({json.dumps(value) for value in table.values()}) == len(table)
