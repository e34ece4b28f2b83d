"""The family that a user asks for by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mxrot.deriving.derive import derived_family
from mxrot.errors import ConfigError
from mxrot.models import Family, read_config
from mxrot.models.given import given_family
from mxrot.nearest import not_known

AUTO = "auto"
"""Derived from the model itself."""


def check_asked(family: str | None) -> None:
    """ConfigError for a family that cannot be asked for."""
    if family not in (None, AUTO):
        raise ConfigError(f"family: {not_known('value', str(family), [AUTO])}")


@contextmanager
def asked_family(family: str | None, place: Path, name: str) -> Iterator[Family | None]:
    """While open, the model whose config is at `place` is of the family that is asked for: "auto" for the one that is
    derived from it, which is handed out; None for what the registry says.

    `name` is what errors call the model. ConfigError for another word, FamilyError as of `derived_family`.
    """
    check_asked(family)
    found = None if family is None else derived_family(read_config(place), name)
    with given_family(found):
        yield found


def record_file(output: Path) -> Path:
    """Where the record of a derived family is written for review: beside the output folder."""
    return output.with_name(f"{output.name}.family.py")
