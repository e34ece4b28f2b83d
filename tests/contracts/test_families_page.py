"""docs/families.md says what the records and the verdict on vLLM say."""

import pytest
from tests.contracts import families_page
from tests.contracts.families_page import BEGIN, END, PAGE, REAL, table

from mxrot.models import FAMILIES


def test_the_page_has_the_table_that_is_made() -> None:
    """`python -m tests.contracts.families_page` writes it anew."""
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0] == table()


def test_it_changes_with_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    before = table()
    monkeypatch.setattr(families_page, "RECIPES", ("rtn",))
    assert table() != before


def test_what_was_run_is_a_family_and_has_results() -> None:
    results = (PAGE.parent / "results.md").read_text(encoding="utf-8")
    assert set(REAL) <= set(FAMILIES) and all(name in results for name in REAL.values())
