"""The order of the lines of `mxrot inspect`, the number shown, and names without their common prefix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mxrot.errors import ConfigError
from mxrot.nearest import not_known

if TYPE_CHECKING:
    from mxrot.evaluation.inspection import SiteMaxima

OF_SITES = ("ratio", "largest", "median")
OF_ERRORS = ("weights", "output")
KEYS = ("model", *OF_SITES, *OF_ERRORS)
"""The values of `--sort`: the order of the model, or a column, the largest first."""


def check_sort(key: str) -> None:
    """ConfigError if the key is not a column."""
    if key not in KEYS:
        raise ConfigError(f"--sort: {not_known('column', key, list(KEYS))}")


def first_sites(sites: Sequence[SiteMaxima], key: str, top: int | None, prefix: str) -> list[SiteMaxima]:
    """The sites to show. With `top` and a key of the other table, the largest ratios. Names lose `prefix`."""
    by = key if key in OF_SITES else "ratio" if top is not None and key != "model" else None
    shown = list(sites) if by is None else sorted(sites, key=lambda site: -float(getattr(site, by)))
    return [replace(site, site=site.site.removeprefix(prefix)) for site in shown[:top]]


def first_errors(blocks: Sequence[dict[str, Any]], key: str, top: int | None, prefix: str) -> list[dict[str, Any]]:
    """The blocks of a run.json with the linears to show. If they are sorted, they form one block, with the worst expert
    of each name."""
    by = key if key in OF_ERRORS else "output" if top is not None and key != "model" else None
    if by is None:
        return [{"linears": list(_short(block["linears"], prefix))} for block in _cut(blocks, top)]
    every = [linear for block in blocks for linear in block["linears"]]
    every.sort(key=lambda linear: -_error(linear, by))
    named = {re.sub(r"\.experts\.\d+\.", ".experts.*.", linear["name"]): linear for linear in reversed(every)}
    return [{"linears": list(_short(list(reversed(named.values()))[:top], prefix))}]


def _cut(blocks: Sequence[dict[str, Any]], top: int | None) -> list[dict[str, Any]]:
    """The first `top` linears of all blocks."""
    if top is None:
        return list(blocks)
    left, found = top, []
    for block in blocks:
        found.append({"linears": block["linears"][:left]})
        left -= len(found[-1]["linears"])
    return found


def _short(linears: Iterable[dict[str, Any]], prefix: str) -> Iterable[dict[str, Any]]:
    return ({**linear, "name": linear["name"].removeprefix(prefix)} for linear in linears)


def _error(linear: dict[str, Any], key: str) -> float:
    value = linear["output_error"] if key == "output" else linear["weight_error"]
    return float(linear["weight_error"] if value is None else value)
