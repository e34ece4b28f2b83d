from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from mxrot.errors import ConfigError
from mxrot.typed import check_fields


@dataclass(frozen=True)
class Thing:
    size: float = 1.0
    count: int = 1
    is_new: bool = True
    kind: Literal["one", "other"] = "one"
    names: tuple[str, ...] = ()
    beside: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "thing")


def test_what_is_converted() -> None:
    found = replace(Thing(), size=2, names=["a"])
    assert type(found.size) is float and found.names == ("a",) and hash(found) == hash(Thing(2.0, names=("a",)))


@pytest.mark.parametrize(
    "change",
    [
        {"size": "1"},
        {"size": True},
        {"size": 10**400},
        {"count": 1.0},
        {"count": None},
        {"is_new": 1},
        {"kind": "ohter"},
        {"kind": ["one"]},
        {"names": "a"},
        {"names": [None]},
        {"names": ("\ud800",)},
        {"beside": 3},
    ],
    ids=str,
)
def test_what_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^thing\.{next(iter(change))}: "):
        replace(Thing(), **change)
