"""What a checkpoint has installed: read from the `quantization_config` of its config.json, which alone decides.

recipe.toml tells how a checkpoint came about. Where it says something else about what runs, one of the two was edited,
and neither is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import FORMATS, Format
from mxrot.layers import TensorQuantizer
from mxrot.marker import MARKER
from mxrot.models import Family
from mxrot.models.family import is_ignored
from mxrot.recipe import Accumulation, Recipe
from mxrot.transforms import Sharing

FORMAT_VERSION = 1
_WHERE = "config.json: quantization_config"


@dataclass(frozen=True)
class Installed:
    """What runs."""

    format: Format
    """Of the weights, and of the inputs where these are quantized."""
    rule: str | None
    """The scale rule of the inputs; None where they are left as they are."""
    has_transform: bool
    sharing: Sharing
    accumulation: Accumulation
    ignored: tuple[str, ...]
    """Full names of the linears of decoder blocks that are left as they are."""

    @property
    def weights(self) -> TensorQuantizer:
        return TensorQuantizer(self.format, self.format.rule())

    @property
    def activations(self) -> TensorQuantizer | None:
        return None if self.rule is None else TensorQuantizer(self.format, self.format.rule(self.rule))

    @staticmethod
    def by(recipe: Recipe, ignored: tuple[str, ...]) -> Installed:
        """What a recipe installs that leaves these linears as they are."""
        weights = recipe.weights.quantizer()
        rule = None if recipe.activations is None else recipe.activations.quantizer().rule.name
        return Installed(weights.format, rule, recipe.has_transform, recipe.sharing, recipe.accumulation, ignored)


def check_marker(quantization: Any, where: str) -> dict[str, Any]:
    """mxrot's marker in a `quantization_config`; CheckpointError if it is missing or of another version."""
    marker = quantization.get(MARKER) if isinstance(quantization, dict) else None
    if not isinstance(marker, dict):
        raise CheckpointError(f"{where}: config.json has no {MARKER!r} marker; not a checkpoint written by mxrot")
    version = marker.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: checkpoint format version {version!r}; this mxrot reads version {FORMAT_VERSION}"
        )
    return marker


def read_installed(quantization: Any, where: str = "the checkpoint") -> Installed:
    """What a `quantization_config` says; CheckpointError names a field that is missing or not known.

    Whether its fields fit one another and the model is for `config.check_layout`.
    """
    marker = check_marker(quantization, where)
    format = _format(quantization.get("format"))
    if "activation_rule" not in marker:
        raise CheckpointError(f"{_WHERE}: {MARKER}.activation_rule is missing")
    rule = marker["activation_rule"]
    if rule is not None:
        _check_rule(format, rule)
    ignore = quantization.get("ignore")
    if not isinstance(ignore, list) or not ignore or not all(isinstance(name, str) for name in ignore):
        raise CheckpointError(f"{_WHERE}: ignore: expected the names of the head and of linears, got {ignore!r}")
    return Installed(
        format,
        rule,
        "transform_config" in quantization,
        _one_of(Sharing, marker.get("sharing"), "sharing"),
        _one_of(Accumulation, marker.get("accumulation", "exact"), "accumulation"),  # the first ones had no such field
        tuple(ignore[1:]),
    )


def _format(name: Any) -> Format:
    known = {format.compressed_tensors: format for format in FORMATS.values() if format.compressed_tensors is not None}
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(f"{_WHERE}: format {name!r} is not known; known: {', '.join(known)}")
    return known[name]


def _check_rule(format: Format, rule: Any) -> None:
    try:
        found = format.rule(rule) if isinstance(rule, str) and rule else None
    except ConfigError as error:
        raise CheckpointError(f"{_WHERE}: {MARKER}.activation_rule: {error}") from error
    if found is None or not (found.dynamic and found.is_power_of_two):
        raise CheckpointError(f"{_WHERE}: {MARKER}.activation_rule {rule!r} is none that inputs can have")


def _one_of(hint: Any, value: Any, key: str) -> Any:
    known = get_args(hint)
    if not isinstance(value, str) or value not in known:
        raise CheckpointError(f"{_WHERE}: {MARKER}.{key} {value!r} is not one of {', '.join(known)}")
    return value


def check_recipe(recipe: Recipe, installed: Installed, family: Family, blocks: int) -> None:
    """CheckpointError if a recipe installs something else in a model of `blocks` decoder blocks."""
    left = tuple(name for name in _linears(family, blocks) if is_ignored(name, recipe.ignore))
    said = Installed.by(recipe, left)
    for what, one, other in (
        ("format of weights", said.format.name, installed.format.name),
        ("rule of activations", said.rule, installed.rule),
        ("transform", _presence(said.has_transform), _presence(installed.has_transform)),
        ("sharing", said.sharing, installed.sharing),
        ("accumulation", said.accumulation, installed.accumulation),
    ):
        if one != other:
            raise CheckpointError(
                f"recipe.toml and config.json contradict each other: {what} {one} in recipe.toml, {other} in "
                "config.json; take both from one run of `mxrot quantize`"
            )
    known = set(_linears(family, blocks)) if set(said.ignored) ^ set(installed.ignored) else set()
    if differing := sorted((set(said.ignored) ^ set(installed.ignored)) & known):
        raise CheckpointError(
            f"recipe.toml and config.json contradict each other: {differing[0]} is left as it is in "
            f"{'recipe.toml' if differing[0] in said.ignored else 'config.json'} only; take both from one run of "
            "`mxrot quantize`"
        )


def _linears(family: Family, blocks: int) -> list[str]:
    return [
        f"{family.block_prefix(index)}.{linear}"
        for index in range(blocks)
        for site in family.sites
        for linear in site.linears
    ]


def _presence(is_there: bool) -> str:
    return "one a site" if is_there else "none"
