"""A family that the user has asked for in place of what the registry says, while a context is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from mxrot.models.family import Family

_GIVEN: ContextVar[Family | None] = ContextVar("mxrot_family", default=None)


@contextmanager
def given_family(family: Family | None) -> Iterator[None]:
    """While open, models of the architectures of `family` are of this family; None changes nothing."""
    token = _GIVEN.set(family)
    try:
        yield
    finally:
        _GIVEN.reset(token)


def family_given(architectures: tuple[str, ...]) -> Family | None:
    """The family that was asked for, where it describes one of these."""
    family = _GIVEN.get()
    return family if family is not None and set(architectures) & set(family.architectures) else None
