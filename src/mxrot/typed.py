"""Records that users fill in: each field has its declared type, or a ConfigError names the field."""

from __future__ import annotations

import types
from collections.abc import Hashable
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from mxrot.errors import ConfigError
from mxrot.nearest import brief, listed


def check_fields(record: Any, where: str) -> None:
    """Check the fields of a dataclass, which may be frozen. Converted values (`checked`) replace the original ones.

    Call it in `__post_init__`, so that `dataclasses.replace` is checked too.
    """
    for key, hint in _hints(cast(Hashable, type(record))).items():
        value = getattr(record, key)
        found = checked(value, hint, f"{where}.{key}" if where else key)
        if found is not value:
            object.__setattr__(record, key, found)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in fields(kind)}


def checked(value: Any, hint: Any, where: str) -> Any:
    """`value` if it has the type `hint`. An integer is converted to a float, and a list to a tuple.

    ConfigError, with `where`, for any other type.
    """
    if get_origin(hint) is Literal:
        if isinstance(value, str) and value in get_args(hint):
            return value
        raise ConfigError(f"{where}: {brief(value)} is not one of {listed(str(value), get_args(hint))}")
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not types.NoneType]
        return None if value is None else checked(value, options[0], where)
    if hint == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(_text(item, where) for item in value)
        raise ConfigError(f"{where}: expected a list of strings, {_as_list(value)}got {brief(value)}")
    if hint == tuple[float, ...]:
        if isinstance(value, (list, tuple)):
            return tuple(checked(item, float, where) for item in value)
        raise ConfigError(f"{where}: expected a list of numbers, got {brief(value)}")
    if get_origin(hint) is tuple:
        kinds = tuple(get_origin(kind) or kind for kind in get_args(hint) if kind is not ...)
        if isinstance(value, tuple) and all(isinstance(item, kinds) for item in value):
            return value
        raise ConfigError(f"{where}: expected {hint}, got {brief(value)}")
    if hint is str and isinstance(value, str):
        return _text(value, where)
    number = _number(value, hint)
    if number is not None:
        return number
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {brief(value)}")
    return value


def _number(value: Any, hint: Any) -> int | float | None:
    """`value` as the wanted type of number. None if it is not a number, or too large."""
    if isinstance(value, bool):
        return None
    if hint is int and isinstance(value, Integral):
        return int(value)
    if hint is float and isinstance(value, Real):
        try:
            return float(value)
        except OverflowError:
            return None
    return None


def _text(value: str, where: str) -> str:
    """ConfigError for a text that no file could hold."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: {brief(value)} holds half of a surrogate pair, which no text has") from error
    return value


def _as_list(value: Any) -> str:
    """How one string is written as a list. A shell removes the quotation marks of a string that was meant as a list."""
    if not isinstance(value, str) or len(value) > 100:
        return ""
    items = [item.strip().strip("\"'") for item in value.strip("[]").split(",")]
    return f"such as {[item for item in items if item]!r} (quotation marks included), ".replace("'", '"')
