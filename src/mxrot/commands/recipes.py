"""The command `mxrot recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mxrot.commands.options import console


def recipes(name: Annotated[str | None, typer.Argument(help="Print this recipe as TOML")] = None) -> None:
    """List the built-in recipes, or print one."""
    from mxrot.recipe import builtin_recipes, load_recipe

    if name is not None:
        print(load_recipe(name).to_toml(), end="")
        return
    from rich.table import Table

    table = Table("recipe", "what it does", "source", title="Recipes", title_justify="left")
    for known in sorted(builtin_recipes()):
        recipe = load_recipe(known)
        table.add_row(recipe.name, recipe.summary, recipe.source)
    console().print(table)
