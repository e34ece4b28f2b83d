"""TOML tables: read into records, with every key and type checked, and written as text."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_type_hints

from mxrot.errors import ConfigError
from mxrot.nearest import brief, listed, nearest, not_known
from mxrot.recipe_files import tomllib
from mxrot.typed import checked

T = TypeVar("T")


def section(table: dict[str, Any], key: str, where: str, default: dict[str, Any], example: str) -> dict[str, Any]:
    """Take the table called `key` out of another table. ConfigError, with an example of a key, if it is not a table."""
    value = table.pop(key, default)
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where}: {key!r} must be a table, got {brief(value)}; set its keys, such as {key}.{example}"
        )
    return dict(value)


def keys_of(kind: type) -> list[str]:
    """The valid keys of a table for a dataclass."""
    return [item.name for item in fields(kind)]


def build(kind: type[T], values: dict[str, Any], where: str, others: Iterable[str] = ()) -> T:
    """A record from a table. ConfigError names a key that is unknown, missing or of the wrong type.

    `others` are keys of the same table that have already been taken out. They count as known.
    """
    hints = get_type_hints(kind)
    for key in values:
        if key not in keys_of(kind):
            raise ConfigError(f"{where}: {not_known('key', key, [*others, *keys_of(kind)])}")
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{where}: {item.name!r} is missing")
    return kind(**{key: checked(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def build_method(
    methods: Mapping[str, type[T]], what: str, values: dict[str, Any], where: str, others: Iterable[str] = ()
) -> T:
    """An instance of the method that a table names, built from the rest of the table."""
    if "method" not in values:
        raise ConfigError(f"{where}: 'method' is missing; methods are {', '.join(methods)}")
    name = checked(values.pop("method"), str, f"{where}.method")
    if name not in methods:
        raise ConfigError(f"{where}.method: {not_known(what, name, methods)}")
    own = keys_of(methods[name])
    for key in values:
        having = [other for other, kind in methods.items() if key in keys_of(kind)]
        if key not in own and having:
            known = listed(key, ["method", *others, *own])
            raise ConfigError(
                f"{where}: unknown key {key!r}; method {name!r} has none, {' and '.join(map(repr, having))} "
                f"ha{'s' if len(having) == 1 else 've'}; known: {known}"
            )
    return build(methods[name], values, where, ["method", *others])


def misplaced(key: str, here: Iterable[str], everywhere: Iterable[str]) -> str:
    """The message about a key that is not among `here`. It suggests one of the dotted keys `everywhere`."""
    here, everywhere = list(here), list(everywhere)
    inside = {dotted.rpartition(".")[2] for dotted in everywhere}
    near = nearest(key, {*here, *inside})
    meant = [name for name in here if name in near] + [d for d in everywhere if d.rpartition(".")[2] in near]
    meant.sort(key=lambda name: near.index(name if name in near else name.rpartition(".")[2]))
    asked = f" did you mean {' or '.join(map(repr, meant[:3]))}?" if meant else ""
    return f"unknown key {brief(key)};{asked} known: {listed(key, here)}"


def key_and_value(text: str, where: str) -> tuple[str, Any]:
    """The key and the value of "KEY=VALUE". The value is read as TOML if possible, otherwise as a string. ConfigError
    without an =."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{where} {text!r}: expected KEY=VALUE")
    try:
        table = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):  # RecursionError if arrays are nested a thousand levels deep
        return key, value
    return key, table["value"] if len(table) == 1 else value


def write_toml(table: dict[str, Any]) -> str:
    """A table as TOML. It may hold plain values, tables of plain values, and lists of tables.

    Tables inside those of a list are written with dotted keys.
    """
    plain_values = {key: value for key, value in table.items() if not (isinstance(value, dict) or _is_tables(value))}
    text = "".join(f"{key} = {_spelled(value)}\n" for key, value in plain_values.items())
    sections = (f"\n[{key}]\n{write_toml(value)}" for key, value in table.items() if isinstance(value, dict))
    lists = (
        f"\n[[{key}]]\n{write_toml(_dotted(one))}" for key, value in table.items() if _is_tables(value) for one in value
    )
    return text + "".join(sections) + "".join(lists)


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _dotted(table: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= {f"{key}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {key: value}
    return found


def _spelled(value: Any) -> str:
    """A plain value in TOML. This is JSON, except for values that JSON cannot write."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_spelled(item) for item in value)}]"
    # TOML requires every control character to be escaped; JSON leaves DEL as it is.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def plain(record: Any) -> dict[str, Any]:
    """The fields of a dataclass as plain TOML values."""
    values = {item.name: getattr(record, item.name) for item in fields(record)}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
