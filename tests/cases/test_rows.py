"""Every row of rows.toml has a test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent


def rows() -> dict[str, str]:
    """What is right, by row."""
    kinds = tomllib.loads((HERE / "rows.toml").read_text(encoding="utf-8"))
    return {name: right for kind in kinds.values() for name, right in kind.items()}


def shown() -> set[str]:
    """The rows that tests carry."""
    sources = "".join(path.read_text(encoding="utf-8") for path in HERE.glob("test_*.py"))
    return {
        name for marks in re.findall(r"pytest\.mark\.case\(([^)]*)\)", sources) for name in re.findall(r"\w+", marks)
    }


def test_every_row_has_a_test() -> None:
    assert sorted(rows().keys() - shown()) == []


def test_no_test_carries_a_row_that_is_not_there() -> None:
    assert sorted(shown() - rows().keys()) == []
