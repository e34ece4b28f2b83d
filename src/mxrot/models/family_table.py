"""A family as a table of plain values, as config.json of a checkpoint holds one that was derived."""

from __future__ import annotations

import re
from typing import Any, get_args

from mxrot.errors import FamilyError
from mxrot.models.family import Family, Site, Windows

DERIVED = "mxrot_family"
"""The key of config.json."""
OBSTACLE = "its record was derived, and deriving does not look at what the residual stream passes"
"""Why no rotation of the residual stream is merged into a model whose family was derived."""
_NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
_SITE_NAME = re.compile(r"[a-z0-9_]+")
_MODULES = ("body", "blocks", "embedding", "final_norm", "head", "attention")
_OPTIONAL = ("rotary", "inner_rows")
_VALUES = ("values", "values_read_by")
_SITE_KEYS = {"name", "linears", "norm", "norm_adds_one", "producer", "producer_is_value"}
_KEYS = {"name", "architectures", "windows", "sites", *_MODULES, *_OPTIONAL, *_VALUES}


def family_table(family: Family) -> dict[str, Any]:
    """All that is derived of a family; `family_of_table` is its inverse."""
    sites = [{key: _plain(getattr(site, key)) for key in sorted(_SITE_KEYS)} for site in family.sites]
    return {key: _plain(getattr(family, key)) for key in sorted(_KEYS - {"sites"})} | {"sites": sites}


def derived_table(config: Any) -> dict[str, Any] | None:
    """The table in a config whose family was derived; None in others."""
    table: dict[str, Any] | None = getattr(config, DERIVED, None)
    return table


def family_of_table(table: Any, where: str) -> Family:
    """The family that a config holds; FamilyError names what is not as `family_table` writes it."""
    where = f"{where}: config.json: {DERIVED}"
    _check_keys(table, _KEYS, where)
    for key in ("name", *_MODULES):
        _check_name(table[key], f"{where}.{key}")
    for key in _OPTIONAL:
        if table[key] is not None:
            _check_name(table[key], f"{where}.{key}")
    for key in _VALUES:
        if table[key] != "":
            _check_name(table[key], f"{where}.{key}")
    _check_names(table["architectures"], f"{where}.architectures")
    if table["windows"] not in get_args(Windows):
        raise FamilyError(f"{where}.windows: expected one of {', '.join(get_args(Windows))}, got {table['windows']!r}")
    if not isinstance(table["sites"], list) or not table["sites"]:
        raise FamilyError(f"{where}.sites: expected a list of sites")
    sites = tuple(_site(each, f"{where}.sites.{number}") for number, each in enumerate(table["sites"]))
    linears = [linear for site in sites for linear in site.linears]
    if len(set(linears)) != len(linears) or len({site.name for site in sites}) != len(sites):
        raise FamilyError(f"{where}.sites: two sites have one name or one linear")
    plain = {key: value for key, value in table.items() if key not in ("architectures", "sites")}
    return Family(**plain, architectures=tuple(table["architectures"]), sites=sites, rotation_obstacle=OBSTACLE)


def _site(table: Any, where: str) -> Site:
    _check_keys(table, _SITE_KEYS, where)
    if not isinstance(table["name"], str) or not _SITE_NAME.fullmatch(table["name"]):
        raise FamilyError(f"{where}.name: expected lower-case letters, digits and underscores, got {table['name']!r}")
    _check_names(table["linears"], f"{where}.linears")
    for key in ("norm", "producer"):
        if table[key] is not None:
            _check_name(table[key], f"{where}.{key}")
    for key in ("norm_adds_one", "producer_is_value"):
        if type(table[key]) is not bool:
            raise FamilyError(f"{where}.{key}: expected true or false, got {table[key]!r}")
    return Site(**table | {"linears": tuple(table["linears"])})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_keys(table: Any, keys: set[str], where: str) -> None:
    if not isinstance(table, dict) or table.keys() != keys:
        raise FamilyError(f"{where}: expected a table of {', '.join(sorted(keys))}")


def _check_name(value: Any, where: str) -> None:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise FamilyError(f"{where}: expected the name of a module, got {value!r}")


def _check_names(values: Any, where: str) -> None:
    if not isinstance(values, list) or not values:
        raise FamilyError(f"{where}: expected a list of names, got {values!r}")
    for value in values:
        _check_name(value, where)
