"""Shell completion for options that take a name."""

from __future__ import annotations

from mxrot.recipe_files import descriptions


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """The built-in recipes, each with its description. After a comma, the next recipe of a list."""
    before, comma, begun = incomplete.rpartition(",")
    return [(before + comma + known.name, known.summary) for known in descriptions() if known.name.startswith(begun)]
