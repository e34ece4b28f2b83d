"""What a `quantization_config` says is installed. It alone decides what runs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch

from mxrot.checkpoint.config import (
    EVERY,
    FORMAT_VERSION,
    HEAD,
    NATIVE,
    THEIR_BLOCK,
    scheme_table,
)
from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import FORMATS, AttentionOperands, TensorQuantizer
from mxrot.marker import MARKER
from mxrot.models import Family
from mxrot.recipe import Accumulation
from mxrot.scheme import CacheScheme, Scheme, SiteScheme
from mxrot.sections import check_head_quantizer
from mxrot.transforms import Sharing
from mxrot.transforms.stages import BlockDiagonalSpec, spec_from_table

_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Group:
    """A config group."""

    targets: tuple[str, ...]
    """Names, "re:" with a regular expression that matches from the start of the name, or "Linear" for all."""
    scheme: SiteScheme

    @cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        return [re.compile(one.removeprefix("re:")) for one in self.targets if one.startswith("re:")]

    def covers(self, linear: str) -> bool:
        """True if the group covers a linear, given by its full name."""
        if linear in self.targets or list(self.targets) == EVERY:
            return True
        return any(pattern.match(linear) for pattern in self._patterns)


@dataclass(frozen=True)
class Layout:
    """The contents of a `quantization_config`, without comparing them with a model."""

    version: int
    is_native: bool
    """True if the format of its groups is "mxrot"."""
    groups: tuple[Group, ...]
    """The groups of the linears of decoder blocks."""
    head: str
    left: tuple[str, ...]
    """Full names of linears of decoder blocks that are not quantized."""
    dtype: torch.dtype | None
    """The type of tensors that are not quantized. None if the config is of version 1, which does not say."""
    cache: CacheScheme | None = None
    attention: AttentionOperands | None = None
    head_scheme: SiteScheme | None = None
    """None: the head is not quantized."""

    def scheme_of(self, linear: str) -> SiteScheme | None:
        """The scheme of a linear, given by its full name. None if it is not quantized.

        CheckpointError if the config does not say this, or says it twice.
        """
        if linear in self.left or linear == self.head:
            return None
        found = [group.scheme for group in self.groups if group.covers(linear)]
        if len(found) != 1:
            said = "no config group" if not found else f"{len(found)} config groups"
            raise CheckpointError(f"{_WHERE}: {said} and `ignore` say what {linear} is")
        return found[0]

    def scheme(self, family: Family, blocks: int) -> Scheme:
        """The scheme of a model with this number of decoder blocks. CheckpointError as for `scheme_of`."""
        found = {name: self.scheme_of(name) for name in linears_of(family, blocks)}
        linears = {name: one for name, one in found.items() if one is not None}
        return Scheme(linears, self.left, self.cache, self.attention, self.head_scheme)


def linears_of(family: Family, blocks: int) -> list[str]:
    """Full names of the linears of all sites, in the order of the model."""
    return [
        f"{family.block_prefix(index)}.{linear}"
        for index in range(blocks)
        for site in family.sites_of(index)
        for linear in site.linears
    ]


def check_marker(quantization: Any, where: str) -> dict[str, Any]:
    """mxrot's marker in a `quantization_config`. CheckpointError if it is missing or has an unknown version."""
    marker = quantization.get(MARKER) if isinstance(quantization, dict) else None
    if not isinstance(marker, dict):
        raise CheckpointError(f"{where}: config.json has no {MARKER!r} marker; not a checkpoint written by mxrot")
    version = marker.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: checkpoint format version {version!r}; this mxrot reads versions 1 to {FORMAT_VERSION}"
        )
    return marker


def read_layout(quantization: Any, where: str = "the checkpoint") -> Layout:
    """The layout in a `quantization_config`. CheckpointError names a field that is missing or unknown.

    `check_layout` checks whether the fields fit each other and the model.
    """
    marker = check_marker(quantization, where)
    format = quantization.get("format")
    known = {NATIVE, *(one.compressed_tensors for one in FORMATS.values() if one.compressed_tensors is not None)}
    if not isinstance(format, str) or format not in known:
        raise CheckpointError(f"{_WHERE}: format {format!r} is not known; known: {', '.join(sorted(known))}")
    version, given = marker["format_version"], quantization.get("config_groups")
    coded = given.get(HEAD) if version >= FORMAT_VERSION and isinstance(given, dict) else None
    ignore = quantization.get("ignore")
    names = isinstance(ignore, list) and all(isinstance(name, str) for name in ignore)
    if not names or not (ignore or coded):
        raise CheckpointError(f"{_WHERE}: ignore: expected the names of the head and of linears, got {ignore!r}")
    head, *left = ignore if coded is None else [_only_target(coded), *ignore]
    if version == 1:
        groups = (Group(tuple(EVERY), _scheme_of_version_1(quantization, marker, format)),)
        return Layout(1, False, groups, head, tuple(left), None)
    groups_by_name = _groups(given, marker.get("schemes"))
    of_head = None if coded is None else _checked_head(groups_by_name.pop(HEAD).scheme)
    return Layout(
        version,
        format == NATIVE,
        tuple(groups_by_name.values()),
        head,
        tuple(left),
        _dtype(marker.get("dtype")),
        _cache(quantization.get("kv_cache_scheme")),
        _attention(marker.get("attention")),
        of_head,
    )


def _only_target(group: Any) -> str:
    """The head that a group is for, by its name."""
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(targets, list) or len(targets) != 1 or not isinstance(targets[0], str):
        raise CheckpointError(f"{_WHERE}: config_groups.{HEAD}.targets: expected the name of the head, got {targets!r}")
    return targets[0]


def _checked_head(scheme: SiteScheme) -> SiteScheme:
    """The scheme of the head. CheckpointError if its weights or inputs have a format that a head cannot have."""
    for key, quantizer in (("weights", scheme.weights), ("activations", scheme.activations)):
        if quantizer is None:
            continue
        try:
            check_head_quantizer(quantizer, f"{_WHERE}: {MARKER}.schemes.{HEAD}.{key}")
        except ConfigError as error:
            raise CheckpointError(str(error)) from error
    return scheme


def _groups(groups: Any, schemes: Any) -> dict[str, Group]:
    if not isinstance(groups, dict) or not isinstance(schemes, dict) or not groups or groups.keys() != schemes.keys():
        raise CheckpointError(f"{_WHERE}: config_groups and {MARKER}.schemes are not tables of the same groups")
    found = {}
    for key, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not targets or not all(isinstance(one, str) for one in targets):
            raise CheckpointError(f"{_WHERE}: config_groups.{key}.targets: expected names of linears, got {targets!r}")
        where = f"{_WHERE}: {MARKER}.schemes.{key}"
        try:
            found[key] = Group(tuple(targets), _scheme(schemes[key], where))
            _ = found[key]._patterns
        except re.error as error:
            raise CheckpointError(f"{_WHERE}: config_groups.{key}.targets: {error}") from error
    return found


def _scheme(table: Any, where: str) -> SiteScheme:
    stages = table.get("transform") if isinstance(table, dict) else None
    if not isinstance(stages, list) or not all(isinstance(one, dict) for one in stages):
        raise CheckpointError(f"{where}: expected weights, activations, transform and accumulation, got {table!r}")
    try:
        transform = tuple(spec_from_table(one) for one in stages)
    except ConfigError as error:
        raise CheckpointError(f"{where}.transform: {error}") from error
    inputs = table.get("activations")
    found = SiteScheme(
        _quantizer(table.get("weights"), f"{where}.weights"),
        None if inputs is None else _input_quantizer(inputs, f"{where}.activations"),
        transform,
        _one_of(Accumulation, table.get("accumulation"), f"{where}.accumulation"),
    )
    if scheme_table(found) != table:
        raise CheckpointError(f"{where}: expected {scheme_table(found)!r}, got {table!r}")
    return found


def _quantizer(table: Any, where: str) -> TensorQuantizer:
    name, rule = (table.get("format"), table.get("rule")) if isinstance(table, dict) else (None, None)
    if not (isinstance(name, str) and isinstance(rule, str) and rule):
        raise CheckpointError(f"{where}: expected a format and a rule, got {table!r}")
    clip = table.get("clip", 1.0)
    if not isinstance(clip, float):
        raise CheckpointError(f"{where}: expected a number for the clip, got {clip!r}")
    try:
        return TensorQuantizer.of(name, rule, clip)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _input_quantizer(table: Any, where: str) -> TensorQuantizer:
    found = _quantizer(table, where)
    if not found.rule.dynamic:
        raise CheckpointError(f"{where}: rule {found.rule.name!r} does not apply to inputs")
    return TensorQuantizer(found.format, found.rule.for_rows())


def _dtype(name: Any) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise CheckpointError(f"{_WHERE}: {MARKER}.dtype: expected a type such as bfloat16, got {name!r}")
    return found


def _cache(table: Any) -> CacheScheme | None:
    if table is None:
        return None
    names = ("keys", "values", "first", "last", "key_transform", "value_transform")
    where = f"{_WHERE}: kv_cache_scheme"
    if not isinstance(table, dict) or table.keys() != set(names):
        raise CheckpointError(f"{where}: expected {', '.join(names)}, got {table!r}")
    keys, values = (_input_quantizer(table[key], f"{where}.{key}") for key in ("keys", "values"))
    try:
        return CacheScheme(keys, values, *(table[name] for name in names[2:]))
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _attention(table: Any) -> AttentionOperands | None:
    if table is None:
        return None
    names = ("queries_keys", "probabilities_values")
    where = f"{_WHERE}: {MARKER}.attention"
    if not isinstance(table, dict) or table.keys() != set(names):
        raise CheckpointError(f"{where}: expected {' and '.join(names)}, got {table!r}")
    own = (None if table[name] is None else _input_quantizer(table[name], f"{where}.{name}") for name in names)
    try:
        return AttentionOperands(*own)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _scheme_of_version_1(quantization: dict[str, Any], marker: dict[str, Any], layout: str) -> SiteScheme:
    """The only scheme of version 1. Weights have their format's default rule, since version 1 did not name the rule."""
    formats = [one for one in FORMATS.values() if one.compressed_tensors == layout]
    if not formats:
        raise CheckpointError(f"{_WHERE}: format {layout!r} is not one of version 1")
    weights = TensorQuantizer(formats[0], formats[0].rule())
    if "activation_rule" not in marker:
        raise CheckpointError(f"{_WHERE}: {MARKER}.activation_rule is missing")
    rule, where = marker["activation_rule"], f"{_WHERE}: {MARKER}.activation_rule"
    inputs = None if rule is None else _input_quantizer({"format": formats[0].name, "rule": rule}, where)
    if inputs is not None and not inputs.rule.is_power_of_two:
        raise CheckpointError(f"{where} {rule!r} does not apply to inputs")
    sharing = _one_of(Sharing, marker.get("sharing"), f"{_WHERE}: {MARKER}.sharing")
    stages = (BlockDiagonalSpec(THEIR_BLOCK, sharing),) if "transform_config" in quantization else ()
    # The first checkpoints had no such field.
    accumulation = _one_of(Accumulation, marker.get("accumulation", "exact"), f"{_WHERE}: {MARKER}.accumulation")
    return SiteScheme(weights, inputs, stages, accumulation)


def _one_of(hint: Any, value: Any, where: str) -> Any:
    known = get_args(hint)
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{where} {value!r} is not one of {', '.join(known)}")
    return value
