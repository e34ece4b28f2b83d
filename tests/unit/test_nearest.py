from __future__ import annotations

from mxrot.nearest import brief, did_you_mean, listed, nearest, not_known

KNOWN = ("method", "damping", "sharing")


def test_the_nearest_come_first() -> None:
    assert nearest("sharng", KNOWN) == ["sharing"]
    assert listed("sharng", KNOWN) == "sharing, method, damping"
    assert listed("colour", KNOWN) == "method, damping, sharing"


def test_case_does_not_count() -> None:
    assert nearest("SHARING", KNOWN) == ["sharing"]
    assert nearest("dampin", ["Damping"]) == ["Damping"]


def test_what_is_said() -> None:
    assert not_known("key", "sharng", KNOWN) == (
        "unknown key 'sharng'; did you mean 'sharing'? known: sharing, method, damping"
    )
    assert not_known("key", "colour", KNOWN) == "unknown key 'colour'; known: method, damping, sharing"
    assert not_known("key", "a", ()) == "unknown key 'a'; known: none"
    assert did_you_mean("sharing_", ["sharing", "sharing2"]) == " did you mean 'sharing' or 'sharing2'?"


def test_messages_are_bounded() -> None:
    many = [f"name{index}" for index in range(1000)]
    said = not_known("key", "x" * 5000, many)
    assert len(said) < 500 and said.endswith(" and 976 more")
    assert brief("ab") == "'ab'" and len(brief("x" * 5000)) < 70
