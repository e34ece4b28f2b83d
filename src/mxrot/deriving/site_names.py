"""Names for the sites of a derived family, by their places, like those of families written by hand."""

from __future__ import annotations

import re
from dataclasses import replace

from transformers import PreTrainedModel

from mxrot.models import Family, Site


def with_site_names(family: Family, model: PreTrainedModel) -> Family:
    """The family with the names qkv, o, gate_up or up, and down. Other sites get the name of their first linear.

    Nothing else depends on the names, except recipes that treat a site specially, as QuaRot's do with `down`.
    """
    names: dict[int, str] = {}
    inside = [number for number, site in enumerate(family.sites) if _count_inside(family, site)]
    outside = [number for number in range(len(family.sites)) if number not in inside]
    if outside:
        names[outside[-1]] = "down"
    if len(outside) > 1:
        names[outside[0]] = _up(family, model, family.sites[outside[0]].linears, family.sites[outside[-1]].linears[0])
    if len(inside) > 1:
        names[inside[-1]] = "o"
    if inside:
        linears = family.sites[inside[0]].linears
        beside = [name for name in linears if not name.startswith(f"{family.attention}.")]
        down = family.sites[outside[-1]].linears[0] if outside else linears[0]
        names[inside[0]] = f"qkv_{_up(family, model, tuple(beside), down)}" if beside else "qkv"
    found: list[Site] = []
    for number, site in enumerate(family.sites):
        name = names.get(number) or re.sub(r"[^a-z0-9_]", "_", site.linears[0].rpartition(".")[2].lower())
        is_free = name not in {other.name for other in found} and name not in names.values()
        found.append(replace(site, name=name if number in names or is_free else f"{name}_{number}"))
    return replace(family, sites=tuple(found))


def _count_inside(family: Family, site: Site) -> int:
    return sum(name.startswith(f"{family.attention}.") for name in site.linears)


def _up(family: Family, model: PreTrainedModel, linears: tuple[str, ...], down: str) -> str:
    """gate_up for two linears, or for one with twice the rows that the last one reads; else up."""
    block = model.get_submodule(family.block_prefix(0))
    rows = sum(int(block.get_submodule(name).get_parameter("weight").shape[0]) for name in linears)
    return "gate_up" if rows == 2 * block.get_submodule(down).get_parameter("weight").shape[1] else "up"
