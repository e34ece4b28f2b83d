"""Checks that the files of a checkpoint agree: the scheme in config.json, the scheme that recipe.toml would install,
and, for version 1, what only the tensors show.

recipe.toml records how a checkpoint was made. If it contradicts config.json about what runs, one of the two was edited,
and the checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mxrot.checkpoint.config import (
    FORMAT_VERSION,
    THEIR_BLOCK,
    compressed_tensors_config,
    native_config,
    scheme_table,
)
from mxrot.checkpoint.layout import Layout
from mxrot.errors import CheckpointError
from mxrot.marker import MARKER
from mxrot.models import Family
from mxrot.scheme import Scheme, transform_name
from mxrot.transforms.stages import BlockDiagonalSpec


def check_layout(quantization: dict[str, Any], layout: Layout, scheme: Scheme, family: Family) -> None:
    """CheckpointError unless a `quantization_config` is the one that is written for `scheme`."""
    dtype = layout.dtype or torch.float32
    write = native_config if layout.is_native or not scheme.has_transform else compressed_tensors_config
    if layout.version > 1:
        _check_spelling(quantization, write(scheme, family, dtype))
        return
    one_matrix = {  # version 1 did not say whether there is one matrix for all blocks or one for each
        name: replace(one, stages=one.stages and (BlockDiagonalSpec(THEIR_BLOCK, "site"),))
        for name, one in scheme.linears.items()
    }
    expected = compressed_tensors_config(replace(scheme, linears=one_matrix), family, dtype)
    for group in expected["config_groups"].values():
        group["format"] = expected["format"]
    _check_spelling(quantization, expected | {MARKER: dict(quantization[MARKER])})


def _check_spelling(quantization: dict[str, Any], expected: dict[str, Any]) -> None:
    """CheckpointError unless a `quantization_config` has the `expected` fields and values.

    Fields of other programs may stand beside them.
    """
    marker = expected[MARKER] | {key: value for key, value in quantization[MARKER].items() if key in expected[MARKER]}
    found = {key: quantization.get(key) for key in expected} | {MARKER: marker}
    if "transform_config" not in expected and "transform_config" in quantization:
        raise CheckpointError("config.json: quantization_config: 'transform_config' is not expected")
    if difference := _first_difference(expected, found, "quantization_config"):
        raise CheckpointError(f"config.json: {difference}; it contradicts the rest, or the file is damaged")


def _first_difference(expected: Any, found: Any, place: str) -> str | None:
    if not (isinstance(expected, dict) and isinstance(found, dict)):
        is_same = type(expected) is type(found) and expected == found
        return None if is_same else f"{place}: expected {_shortly(expected)}, got {_shortly(found)}"
    for key in sorted(expected.keys() | found.keys(), key=str):
        if key not in found or key not in expected:
            return f"{place}: {key!r} is {'missing' if key not in found else 'not expected'}"
        if difference := _first_difference(expected[key], found[key], f"{place}.{key}"):
            return difference
    return None


def _shortly(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def settled(layout: Layout, scheme: Scheme, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Scheme:
    """The scheme of a checkpoint of version 1, with as many matrices as its file holds. Its config did not say how
    many."""
    if layout.version > 1:
        return scheme
    linears = dict(scheme.linears)
    blocks = {int(name.removeprefix(f"{family.blocks}.").partition(".")[0]) for name in linears}
    for index in blocks:
        for site in scheme.active_sites(family, index):
            shape = shapes.get(f"{transform_name(family, index, site)}.weight", ())
            for name in site.linears:
                own = linears[f"{family.block_prefix(index)}.{name}"]
                if own.stages and len(shape) == 2:
                    own = replace(own, stages=(BlockDiagonalSpec(THEIR_BLOCK, "site"),))
                linears[f"{family.block_prefix(index)}.{name}"] = own
    return replace(scheme, linears=linears)


def check_recipe(said: Scheme, scheme: Scheme, family: Family, version: int = FORMAT_VERSION) -> None:
    """CheckpointError if a recipe would install another scheme. `said` is the scheme that it installs in this model."""
    if said.attention != scheme.attention:
        words = ("none" if one.attention is None else one.attention.spelled for one in (said, scheme))
        raise CheckpointError(
            "recipe.toml and config.json contradict each other: attention: {} in recipe.toml, {} in config.json; take "
            "both from one run of `mxrot quantize`".format(*words)
        )
    if said.cache != scheme.cache:
        words = ("none" if one.cache is None else one.cache.spelled for one in (said, scheme))
        raise CheckpointError(
            "recipe.toml and config.json contradict each other: cache: {} in recipe.toml, {} in config.json; take both "
            "from one run of `mxrot quantize`".format(*words)
        )
    if said.head != scheme.head:
        words = ("as it was" if one.head is None else one.head.spelled for one in (said, scheme))
        raise CheckpointError(
            "recipe.toml and config.json contradict each other: head: {} in recipe.toml, {} in config.json; take both "
            "from one run of `mxrot quantize`".format(*words)
        )
    prefix = f"{family.blocks}."
    for name in [name for name in {**said.linears, **scheme.linears} if name.startswith(prefix)]:
        one, other = said.linears.get(name), scheme.linears.get(name)
        if one is None or other is None:
            raise CheckpointError(
                f"recipe.toml and config.json contradict each other: {name} is unquantized in "
                f"{'recipe.toml' if one is None else 'config.json'} only; take both from one run of `mxrot quantize`"
            )
        if version == 1:  # version 1 did not name the rule of weights
            one = replace(one, weights=other.weights if one.weights.format is other.weights.format else one.weights)
        for what in ("weights", "activations", "transform", "accumulation"):
            a, b = scheme_table(one)[what], scheme_table(other)[what]
            if a != b:
                raise CheckpointError(
                    f"recipe.toml and config.json contradict each other: {name}: {what} {_said(a)} in recipe.toml, "
                    f"{_said(b)} in config.json; take both from one run of `mxrot quantize`"
                )


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(map(str, value.values()))
    return ("none" if not value else " then ".join(map(_said, value))) if isinstance(value, list) else str(value)
