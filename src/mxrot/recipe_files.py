"""The recipes that come with mxrot, as files. They can be listed without torch, which a Recipe needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from mxrot.errors import ConfigError
from mxrot.nearest import brief, did_you_mean, listed
from mxrot.shell import expanded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUILTIN_FOLDER = Path(__file__).parent / "recipes"


class Description(NamedTuple):
    """The description in the file of a recipe."""

    name: str
    summary: str
    source: str


def builtin_recipes() -> dict[str, Path]:
    """The names and files of the recipes that come with mxrot."""
    return {path.stem: path for path in sorted(BUILTIN_FOLDER.glob("*.toml"))}


def descriptions() -> list[Description]:
    """The descriptions of all these recipes, sorted by name."""
    tables = [tomllib.loads(path.read_text(encoding="utf-8")) for path in builtin_recipes().values()]
    return [Description(table["name"], table["summary"], table["source"]) for table in tables]


def recipe_text(name_or_file: str | Path) -> tuple[Path, str]:
    """The file of a recipe, given by its built-in name or as a file, and its contents.

    ConfigError, with the known names, if there is no such file, or if it is not text.
    """
    known = builtin_recipes()
    name = str(name_or_file)
    path = known.get(name, expanded(name))
    try:
        if not path.is_file():
            meant = did_you_mean(path.stem, known)
            raise ConfigError(f"no recipe {brief(name)}: not a file, and not one of {listed(path.stem, known)}.{meant}")
        return path, path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise ConfigError(f"recipe {brief(name)}: cannot be read ({error.strerror})") from error
