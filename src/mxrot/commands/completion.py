"""What a shell completes for options that take a name."""

from __future__ import annotations

from mxrot.recipe_files import descriptions


def complete_recipe(incomplete: str) -> list[tuple[str, str]]:
    """Recipes that come with mxrot, each with what it does. After a comma, the next of several."""
    before, comma, begun = incomplete.rpartition(",")
    return [(before + comma + known.name, known.summary) for known in descriptions() if known.name.startswith(begun)]
