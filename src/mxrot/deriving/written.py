"""A derived family as Python source for models/families, for review."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mxrot.models import Family, Site

WIDTH = 120


def record_text(family: Family) -> str:
    """Python text that makes the record, with a first line on its origin."""
    lines = [
        f'"""{family.name}: derived by `--family auto` from a small random model of its class.',
        "",
        'What is not named (a norm, a producer, values) did not hold in float64, or was not looked at."""',
        "",
        "from mxrot.models.family import Family, Site",
        "",
        "FAMILY = Family(",
        f"    {family.name!r},".replace("'", '"'),
        f"    {_text(family.architectures)},",
        "    (",
        *(f"        {_site(site)}," for site in family.sites),
        "    ),",
        *(f"    {key}={_text(getattr(family, key))}," for key in _set(family, ("name", "architectures", "sites"))),
        ")",
    ]
    return "\n".join(lines) + "\n"


def _set(record: Any, positional: tuple[str, ...]) -> list[str]:
    """The fields that differ from their defaults."""
    return [
        field.name
        for field in fields(record)
        if field.name not in positional and getattr(record, field.name) != field.default
    ]


def _site(site: Site) -> str:
    named = "".join(f", {key}={_text(getattr(site, key))}" for key in _set(site, ("name", "linears")))
    whole = f"Site({_text(site.name)}, {_text(site.linears)}{named})"
    if len(whole) < WIDTH - 8:
        return whole
    inner = [_text(site.name), _text(site.linears), *(one for one in named.split(", ") if "=" in one)]
    return "Site(\n" + "".join(f"            {one},\n" for one in inner) + "        )"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        inner = ", ".join(_text(one) for one in value)
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return f'"{value}"' if isinstance(value, str) else repr(value)
