"""The command `mxrot recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mxrot.commands.completion import complete_recipe
from mxrot.commands.options import show
from mxrot.recipe_files import builtin_recipes, descriptions, recipe_text

Name = Annotated[str | None, typer.Argument(help="Print this recipe as TOML", autocompletion=complete_recipe)]
Defaults = Annotated[bool, typer.Option("--defaults", help="Also print the keys with default values")]


def recipes(name: Name = None, defaults: Defaults = False) -> None:
    """List the built-in recipes, or print one."""
    if name is not None:
        print(_as_toml(name, defaults), end="")
        return
    from rich.table import Table

    table = Table("recipe", "what it does", "source", title="Recipes", title_justify="left")
    for known in descriptions():
        table.add_row(*known)
    show(table)


def _as_toml(name: str, defaults: bool) -> str:
    """The file of a built-in recipe, or the recipe of a given file. With `defaults` every key is written out."""
    _, text = recipe_text(name)
    if name in builtin_recipes() and not defaults:
        return text
    from mxrot.recipe import load_recipe

    return load_recipe(name).to_toml()
