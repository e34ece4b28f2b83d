"""The recipes and seeds of a comparison."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mxrot.commands.completion import complete_recipe
from mxrot.commands.options import chosen_recipe
from mxrot.errors import ConfigError
from mxrot.nearest import did_you_mean
from mxrot.recipe_files import builtin_recipes

Recipes = Annotated[
    str | None,
    typer.Option(
        "--recipes",
        help="Names or TOML files, comma-separated; all: those of mxrot; untuned: those without optimizer steps; none "
        "(default: rtn,duquant++; with --checkpoints: none)",
        autocompletion=complete_recipe,
    ),
]
Without = Annotated[
    str, typer.Option("--without", metavar="NAMES", help="Recipes to leave out", autocompletion=complete_recipe)
]
Checkpoints = Annotated[
    str, typer.Option("--checkpoints", metavar="DIRS", help="Checkpoints of this model, comma-separated")
]
Seeds = Annotated[
    str | None, typer.Option("--seeds", metavar="N", help="Number of seeds from --seed on, or a list: 0,1,2")
]
MOST_SEEDS = 100
USUAL = "rtn,duquant++"
"""The recipes that are compared by default."""


def chosen_checkpoints(names: str) -> list[str]:
    """The folders or ids of `--checkpoints`."""
    return _split(names)


def chosen_recipes(names: str, without: str, changes: list[str]) -> list[Any]:
    """The recipes that `--recipes` names and `--without` does not, each once, with the changes of `--set`.

    "none" alone selects no recipe. ConfigError for an unknown name, or if nothing is left.
    """
    if names.strip() == "none":
        return []
    wanted = _split(names)
    left_out = _split(without)
    found: dict[str, Any] = {}
    for name in wanted:
        for each in builtin_recipes() if name in ("all", "untuned") else (name,):
            if each in found or each in left_out:
                continue
            recipe = chosen_recipe(each, changes)
            if name != "untuned" or not recipe.is_tuned:
                found[each] = recipe
    for name in left_out:
        if name not in builtin_recipes() and name not in wanted:
            raise ConfigError(f"--without {name}: not one of the recipes;{did_you_mean(name, builtin_recipes())}")
    if not found:
        raise ConfigError("--recipes: name at least one that --without does not leave out")
    return list(found.values())


def chosen_seeds(first: int, text: str | None) -> list[int]:
    """The seeds of `--seeds`, a count or a list, otherwise that of `--seed`."""
    if text is None:
        return [first]
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds {text}: expected a number of seeds, or a list such as 0,1,2") from error
    if len(numbers) == 1:
        if not 1 <= numbers[0] <= MOST_SEEDS:
            raise ConfigError(f"--seeds {text}: expected 1 to {MOST_SEEDS}; one seed alone is --seed {text}")
        return list(range(first, first + numbers[0]))
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text}: names a seed twice")
    return numbers


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
