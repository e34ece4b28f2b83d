"""A recipe composes formats, a transform, a rounding and a calibration. It is a TOML file.

A wrong recipe is refused here, before any weight is loaded. An unknown key, a value of the wrong type, or a combination
that cannot work is a ConfigError that names the key. A recipe with an `[[override]]` table applied is again a recipe,
for some sites, and is checked in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from mxrot import rounding, transforms
from mxrot.choice import Choice
from mxrot.contradictions import table_problems, tuning_problems
from mxrot.errors import ConfigError
from mxrot.formats import TensorQuantizer, get_format
from mxrot.nearest import brief
from mxrot.overrides import Override
from mxrot.recipe_files import BUILTIN_FOLDER as BUILTIN_FOLDER
from mxrot.recipe_files import builtin_recipes as builtin_recipes
from mxrot.recipe_files import recipe_text, tomllib
from mxrot.rounding import RoundingMethod
from mxrot.sections import (
    AttentionChoice,
    CacheChoice,
    CalibrationChoice,
    HeadChoice,
    PermutationChoice,
    QuantizerChoice,
    Refit,
    Rotation,
    Smoothing,
    Tuning,
)
from mxrot.tables import build, build_method, keys_of, misplaced, plain, section, write_toml
from mxrot.transforms import Sharing, StageSpec, TransformMethod
from mxrot.typed import check_fields, checked

Accumulation = Literal["exact", "fast"]


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model: formats, a transform, a rounding and a calibration.

    Example:
        >>> recipe = mxrot.Recipe.load("duquant++").changed({"transform.sharing": "block"})
        >>> recipe.sharing
        'block'
        >>> text = recipe.to_toml()  # what `mxrot quantize --recipe FILE` reads
    """

    name: str
    weights: QuantizerChoice
    transform: TransformMethod
    rounding: RoundingMethod
    summary: str = ""
    source: str = ""
    activations: QuantizerChoice | None = None
    """None: activations are not quantized."""
    sharing: Sharing = "site"
    rotation: Rotation | None = None
    """Rotations that are merged into the weights first; None: no rotation."""
    permutation: PermutationChoice | None = None
    """Orders of channels, applied after the rotations; None: the order is unchanged."""
    smoothing: Smoothing | None = None
    calibration: CalibrationChoice = field(default_factory=CalibrationChoice)
    choice: Choice | None = None
    """Changes of the recipe that are tried on the model first; None: nothing is tried."""
    refit: Refit | None = None
    tuning: Tuning | None = None
    """Training that follows the closed-form steps; None: no training."""
    attention: AttentionChoice | None = None
    """Formats of the operands in the products of attention; None: they are not quantized."""
    cache: CacheChoice | None = None
    """Formats of stored keys and values; None: they are not quantized."""
    head: HeadChoice | None = None
    """Format of the head, which then has weights of its own; None: it is not quantized."""
    ignore: tuple[str, ...] = ()
    """Shell-style patterns of linears that are not quantized. They match the full name or its last part."""
    accumulation: Accumulation = "exact"
    """How FP8 products are summed on matrix hardware: "exact", as accurately as bfloat16 products; "fast", in fewer
    bits."""
    override: tuple[Override, ...] = ()
    """Changes of the recipe for some sites. If two apply, the later one wins."""

    def __post_init__(self) -> None:
        check_fields(self, f"recipe {brief(self.name)}" if not isinstance(self.name, str) else f"recipe {self.name}")
        if not self.name.strip() or len(self.name.splitlines()) > 1:
            raise ConfigError(f"recipe {brief(self.name)}: a name is one line of text")
        weights = self._quantizer("weights", self.weights)
        self.rounding.check(weights.format, weights.rule)
        activations = None
        if self.activations is not None:
            activations = self._quantizer("activations", self.activations)
            self._require(activations.rule.dynamic, f"activations: rule {activations.rule.name!r} is for weights only")
        try:
            self.transform.check(weights.format, None if activations is None else activations.format)
        except ConfigError as error:
            raise ConfigError(f"recipe {self.name}: {error}") from error
        for problem in self._contradictions(weights):
            raise ConfigError(f"recipe {self.name}: {problem}")

    def _contradictions(self, weights: TensorQuantizer) -> Iterator[str]:
        """Tables that cannot be combined. Each override must also be a valid recipe by itself."""
        tuning = self.tuning
        if tuning is not None:
            yield from tuning_problems(tuning, self.activations, weights, self.transform, self.sharing, self.rounding)
        if self.refit is not None and not self.rounding.requirements.hessian:
            yield (
                f"refit fits transforms by the moments that rounding looks at, and rounding {self.rounding.name} looks "
                'at none; set rounding.method = "gptq", or refit = none'
            )
        yield from table_problems(self.rotation, tuning, self.attention, self.cache)
        yield from self._choice_problems()
        if self.rounding.requirements.folds != "none" and not self.calibration.held_out:
            yield "rounding: candidates are measured on held-out windows; set calibration.held_out, such as 0.125"
        kinds = {one.weights.quantizer().rule.sees_extremes_only for one in self.variants}
        if tuning is not None and tuning.moves == "levels" and len(kinds) > 1:
            yield (
                'tuning moves = "levels" learns equally spaced levels everywhere or nowhere; give all sites the same '
                "rule"
            )

    def _choice_problems(self) -> Iterator[str]:
        """Candidates that are not valid recipes, and steps that cannot come before or after a choice."""
        if self.choice is None:
            return
        yield from self.choice.problems(self.calibration.writes, self.trains_rotations, self.is_data_free)
        for candidate in self.choice.candidates:
            one = self.with_candidate(candidate)
            if one.calibration.generated > self.calibration.generated:
                yield (
                    f"choice: candidates: {candidate!r}: calibration.generated of the recipe, "
                    f"{self.calibration.generated:g}, is the most that there can be of it; raise that one"
                )

    def with_candidate(self, candidate: str) -> Recipe:
        """This recipe with one candidate of its choice, and without the choice. ConfigError if it is not valid."""
        return replace(self, choice=None).changed(Choice.changes_of(candidate))

    @cached_property
    def variants(self) -> tuple[Recipe, ...]:
        """The recipe without overrides, and the recipe with each override alone."""
        if not self.override:
            return (self,)
        alone = (self.overridden([number]) for number in range(len(self.override)))
        return (replace(self, override=()), *(found for found in alone if found is not None))

    def overridden(self, numbers: Sequence[int]) -> Recipe | None:
        """The recipe for sites with these overrides; None if the overrides leave the site unquantized.

        ConfigError if the overrides cannot be combined.
        """
        tables = [self.override[number] for number in numbers]
        of_weights = [one for one in tables if one.leaves or one.sets_weights]
        if of_weights and of_weights[-1].leaves:
            return None
        name = f"{self.name}, override {', '.join(str(number + 1) for number in numbers)}"
        table = tomllib.loads(replace(self, override=()).to_toml()) | ({"name": name} if numbers else {})
        for one in tables:
            if not one.leaves:
                one.apply(table)
        return Recipe.from_table(table, f"recipe {name}")

    def _quantizer(self, key: str, choice: QuantizerChoice) -> TensorQuantizer:
        try:
            return choice.quantizer()
        except ConfigError as error:
            raise ConfigError(f"recipe {self.name}: {key}: {error}") from error

    def _require(self, holds: bool, message: str) -> None:
        if not holds:
            raise ConfigError(f"recipe {self.name}: {message}")

    @property
    def is_data_free(self) -> bool:
        """True if the recipe works without calibration text."""
        looks_at_data = any(one.transform.needs or one.rounding.requirements.hessian for one in self.variants)
        learns = self.tuning is not None or self.trains_rotations or self.fits_cache or self.permutation is not None
        return self.smoothing is None and not learns and not looks_at_data

    @property
    def trains_rotations(self) -> bool:
        """True if rotations are learned before anything is quantized."""
        return self.rotation is not None and self.rotation.steps > 0

    @property
    def fits_cache(self) -> bool:
        """True if transforms of keys and values are fitted to the inputs of attention."""
        return self.cache is not None and self.cache.is_fitted

    @property
    def turns_values_for_cache(self) -> bool:
        """True if a Hadamard matrix is merged into the weights around the values only because of the cache."""
        return self.cache is not None and self.cache.turns_values(self.rotation)

    @property
    def rotates_weights(self) -> bool:
        """True if rotations are merged into the weights before all other steps."""
        return self.rotation is not None or self.turns_values_for_cache

    @property
    def changes_values(self) -> bool:
        """True if matrices are merged into the weights before and after the values of each head."""
        turns = self.rotation is not None and self.rotation.value_heads != "none"
        return turns or self.turns_values_for_cache or self.fits_cache

    @property
    def looks_at_original(self) -> bool:
        """True if the original model must run beside the quantized one, block by block."""
        return self.tunes_blocks or any(one.rounding.requirements.target != "own" for one in self.variants)

    @property
    def is_tuned(self) -> bool:
        """True if an optimizer takes steps on the quantized model."""
        return self.tuning is not None or self.trains_rotations

    @property
    def tunes_blocks(self) -> bool:
        """True if each block is tuned by itself."""
        return self.tuning is not None and self.tuning.scope == "block"

    @property
    def tunes_network(self) -> bool:
        """True if tuning needs all blocks at once."""
        return self.tuning is not None and self.tuning.scope == "network"

    @property
    def keeps_remainders(self) -> bool:
        """True if tuning starts from the remainders of rounding."""
        return self.tuning is not None and self.tuning.moves != "gains"

    @property
    def runs_whole_original(self) -> bool:
        """True if the whole original model runs at once."""
        return self.writes_text or self.holds_original

    @property
    def writes_text(self) -> bool:
        """True if the original model writes calibration text. It may then be spread over several devices."""
        return self.calibration.writes and not self.is_data_free

    @property
    def holds_original(self) -> bool:
        """True if the device must hold the whole original model."""
        return self.tunes_network or self.trains_rotations or self.choice is not None

    @property
    def has_transform(self) -> bool:
        """True if any site multiplies its inputs by a matrix at run time."""
        return any(one._stages for one in self.variants)

    @property
    def _stages(self) -> tuple[StageSpec, ...]:
        """The stages of the narrowest possible site, without overrides."""
        return self.transform.specs(self.transform.multiple, self.sharing, self.smoothing is not None)

    @property
    def formats(self) -> str:
        """The formats of weights and activations, in words."""
        weights = dict.fromkeys(one.weights.format for one in self.variants)
        inputs = dict.fromkeys("16-bit" if one.activations is None else one.activations.format for one in self.variants)
        operands = "" if self.attention is None else f"; attention's {self.attention.operands().spelled}"
        cache = "" if self.cache is None else f"; {self.cache.scheme().spelled} in the cache"
        head = "" if self.head is None else f"; {self.head.spelled} in the head"
        return f"{' and '.join(weights)} weights and {' and '.join(inputs)} activations{operands}{cache}{head}"

    @property
    def input_block(self) -> int:
        """The in_features of each quantized linear without an override must be a multiple of this number."""
        blocks = [get_format(self.weights.format).block or 1]
        if self.activations is not None:
            blocks.append(get_format(self.activations.format).block or 1)
        return math.lcm(*blocks, *(stage.multiple for stage in self._stages))

    def to_toml(self) -> str:
        """The recipe as TOML, with every field. `from_toml` reads it back to an equal recipe."""
        table: dict[str, Any] = {"name": self.name, "summary": self.summary, "source": self.source}
        table["ignore"] = list(self.ignore)
        table["accumulation"] = self.accumulation
        table["weights"] = plain(self.weights)
        if self.activations is not None:
            table["activations"] = plain(self.activations)
        if self.rotation is not None:
            table["rotation"] = plain(self.rotation)
        if self.permutation is not None:
            table["permutation"] = plain(self.permutation)
        if self.smoothing is not None:
            table["smoothing"] = plain(self.smoothing)
        table["transform"] = {
            "method": self.transform.name,
            "sharing": self.sharing,
            **plain(self.transform),
        }
        table["rounding"] = {"method": self.rounding.name, **plain(self.rounding)}
        table["calibration"] = plain(self.calibration)
        if self.choice is not None:
            table["choice"] = plain(self.choice)
        if self.refit is not None:
            table["refit"] = plain(self.refit)
        if self.tuning is not None:
            table["tuning"] = plain(self.tuning)
        if self.attention is not None:
            table["attention"] = plain(self.attention)
        if self.cache is not None:
            table["cache"] = plain(self.cache)
        if self.head is not None:
            table["head"] = plain(self.head)
        if self.override:
            table["override"] = [one.to_table() for one in self.override]
        return write_toml(table)

    @staticmethod
    def load(name_or_file: str | Path) -> Recipe:
        """Read a built-in recipe or a file.

        Args:
            name_or_file: The name of a built-in recipe (`mxrot recipes` lists them), or a TOML file.

        Returns:
            The recipe.

        Raises:
            ConfigError: There is no such recipe, or the file does not hold one.

        Example:
            >>> mxrot.Recipe.load("mxrot").calibration.samples
            128
        """
        return load_recipe(name_or_file)

    @staticmethod
    def from_toml(text: str, where: str) -> Recipe:
        """The recipe in a TOML text. ConfigError, which begins with `where`, if it is not a recipe."""
        try:
            table = tomllib.loads(text)
        except (ValueError, RecursionError) as error:  # RecursionError if arrays are nested a thousand levels deep
            raise ConfigError(f"{where}: not TOML: {str(error)[:200]}") from error
        return Recipe.from_table(table, where)

    @staticmethod
    def from_table(table: dict[str, Any], where: str) -> Recipe:
        """The recipe in a parsed TOML file. ConfigError, which begins with `where`, if it is not a recipe."""
        rest = {key: dict(value) if isinstance(value, dict) else value for key, value in table.items()}
        transform = section(rest, "transform", where, {"method": "identity"}, "method")
        rounds = section(rest, "rounding", where, {"method": "rtn"}, "method")
        sharing = checked(transform.pop("sharing", "site"), Sharing, f"{where}: transform.sharing")
        built: dict[str, Any] = {
            "sharing": sharing,
            "transform": build_method(
                transforms.METHODS, "transform", transform, f"{where}: transform", others=["sharing"]
            ),
            "rounding": build_method(rounding.METHODS, "rounding", rounds, f"{where}: rounding"),
        }
        for key, kind in _SECTIONS.items():
            if key in rest:
                built[key] = build(kind, section(rest, key, where, {}, keys_of(kind)[0]), f"{where}: {key}")
        for key, hint in _PLAIN_KEYS.items():
            if key in rest:
                built[key] = checked(rest.pop(key), hint, f"{where}: {key}")
        built["override"] = _overrides(rest.pop("override", []), where)
        if rest:
            raise ConfigError(f"{where}: {misplaced(min(rest), _top_keys(), _dotted_keys())}")
        for key in ("name", "weights"):
            if key not in built:
                raise ConfigError(f"{where}: {key!r} is missing")
        return Recipe(**built)

    def changed(self, changes: dict[str, Any]) -> Recipe:
        """Make a recipe with some keys changed. This recipe is not modified.

        The value "none" removes a section, such as {"activations": "none"}, or all overrides ({"override": "none"}). A
        new method starts from its own defaults; other keys of its section can be set together with it, in any order.

        Args:
            changes: Dotted keys and their values, such as {"transform.sharing": "block", "weights.rule": "mse"}.

        Returns:
            The changed recipe.

        Raises:
            ConfigError: Recipes do not have such a key or value.

        Example:
            >>> mxrot.Recipe.load("rtn").changed({"activations": "none"}).activations is None
            True
        """
        table = tomllib.loads(self.to_toml())
        for dotted in sorted(changes, key=lambda dotted: not dotted.endswith(".method")):
            *sections, key = dotted.split(".")
            target = table
            for name in sections:
                target = target.setdefault(name, {})
                if not isinstance(target, dict):
                    raise ConfigError(f"recipe {self.name}: unknown key {dotted!r}; {name!r} is not a table")
            if dotted in (*_SECTIONS, "override") and changes[dotted] == "none":
                table.pop(dotted, None)
                continue
            target[key] = changes[dotted]
            if dotted in ("transform.method", "rounding.method"):
                kept = {"method", "sharing"} & target.keys()
                table[sections[0]] = {name: target[name] for name in kept}
        return Recipe.from_table(table, f"recipe {self.name} with {', '.join(changes)}" if changes else self.name)


_SECTIONS: dict[str, type] = {
    "weights": QuantizerChoice,
    "activations": QuantizerChoice,
    "rotation": Rotation,
    "permutation": PermutationChoice,
    "smoothing": Smoothing,
    "calibration": CalibrationChoice,
    "choice": Choice,
    "refit": Refit,
    "tuning": Tuning,
    "attention": AttentionChoice,
    "cache": CacheChoice,
    "head": HeadChoice,
}
_PLAIN_KEYS: dict[str, Any] = {
    "name": str,
    "summary": str,
    "source": str,
    "ignore": tuple[str, ...],
    "accumulation": Accumulation,
}


def load_recipe(name_or_file: str | Path) -> Recipe:
    """A recipe by its built-in name, or from a TOML file."""
    path, text = recipe_text(name_or_file)
    return Recipe.from_toml(text, path.name)


def _overrides(tables: Any, where: str) -> tuple[Override, ...]:
    if not isinstance(tables, (list, tuple)):
        raise ConfigError(f"{where}: override: expected tables, got {brief(tables)}; write [[override]]")
    return tuple(Override.from_table(one, f"{where}: override {number}") for number, one in enumerate(tables, 1))


def _top_keys() -> list[str]:
    return [*_PLAIN_KEYS, *_SECTIONS, "transform", "rounding", "override"]


def _dotted_keys() -> list[str]:
    """Every key of every section, of all methods."""
    keys = [f"{section}.{key}" for section, kind in _SECTIONS.items() for key in keys_of(kind)]
    keys += ["transform.sharing", "transform.method", "rounding.method"]
    for name, methods in (("transform", transforms.METHODS), ("rounding", rounding.METHODS)):
        keys += [f"{name}.{key}" for kind in methods.values() for key in keys_of(kind)]
    return list(dict.fromkeys(keys))
