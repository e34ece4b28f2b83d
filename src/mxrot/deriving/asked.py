"""The family that a user requests by name."""

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
"""Derive the family from the model."""


def check_asked(family: str | None) -> None:
    """Raise ConfigError for a family that cannot be requested."""
    if family not in (None, AUTO):
        raise ConfigError(f"family: {not_known('value', str(family), [AUTO])}")


@contextmanager
def asked_family(family: str | None, place: Path, name: str) -> Iterator[Family | None]:
    """While open, the model whose config is at `place` has the requested family: "auto" for the derived one, which is
    returned; None for that of the registry.

    `name` is the model's name in errors. ConfigError for another word, FamilyError as for `derived_family`.
    """
    check_asked(family)
    found = None if family is None else derived_family(read_config(place), name)
    with given_family(found):
        yield found


def record_file(output: Path) -> Path:
    """The file for the record of a derived family, for review: beside the output folder."""
    return output.with_name(f"{output.name}.family.py")
