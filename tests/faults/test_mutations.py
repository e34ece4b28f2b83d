"""A damaged checkpoint is refused in one line, or is the same model; never another one, and never a traceback.

    pytest -m nightly tests/faults/test_mutations.py -s

tries 2,400 mutations and prints what came of them; a sample of 100 runs with the other tests.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.faults.originals import Original, write_originals
from tests.faults.outcomes import Tally, tried

SAMPLE = 100
MUTATIONS = 2400


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> list[Original]:
    return write_originals(tmp_path_factory.mktemp("few"), every=False)


def test_a_sample_of_mutations(few: list[Original], tmp_path: Path) -> None:
    tally = Tally()
    for seed in range(SAMPLE):
        tried(few[seed % len(few)], seed, tmp_path, tally)
    assert tally.wrong == []
    assert min(tally.counts["right"], tally.counts["clean"]) > 0


@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_many_mutations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    originals = write_originals(tmp_path / "originals")
    tally = Tally()
    for seed in range(SAMPLE, SAMPLE + MUTATIONS):
        tried(originals[seed % len(originals)], seed, tmp_path, tally)
    with capsys.disabled():
        print(f"\nmutations {MUTATIONS}; {tally}")
    assert tally.wrong == []
