"""The choices that a site can be raised to: formats of its weights and of its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mxrot.errors import ConfigError
from mxrot.formats import get_format
from mxrot.overrides import Override
from mxrot.recipe import Recipe


@dataclass(frozen=True, order=True)
class Choice:
    """Format names."""

    weights: str
    inputs: str | None
    """None if the recipe does not quantize inputs."""

    @property
    def spelled(self) -> str:
        """One name if both are equal, otherwise "WEIGHTS/INPUTS"."""
        return self.weights if self.inputs in (None, self.weights) else f"{self.weights}/{self.inputs}"

    @property
    def in_words(self) -> str:
        """The choice in words: "weights in mxfp4, inputs in mxfp8_e4m3"."""
        if self.inputs is None:
            return f"weights in {self.weights}"
        both = self.weights == self.inputs
        return self.weights if both else f"weights in {self.weights}, inputs in {self.inputs}"

    def changes(self, base: Choice) -> tuple[tuple[str, Any], ...]:
        """The fields that an override changes in a recipe with formats `base`. A named format has its default rule."""
        weights, inputs = self.weights != base.weights, self.inputs != base.inputs
        if self.inputs is None or (weights and inputs and self.weights == self.inputs):
            return (("format", self.weights),)
        named = [("activations.format", self.inputs)] if inputs else []
        return tuple(named + ([("weights.format", self.weights)] if weights else []))


def base_choice(recipe: Recipe) -> Choice:
    """The formats of the recipe, where no override applies."""
    return Choice(recipe.weights.format, None if recipe.activations is None else recipe.activations.format)


def parse_choices(text: str, recipe: Recipe, inputs_only: bool) -> tuple[Choice, ...]:
    """The choices that `text` names, each once, without the recipe's own formats.

    A name stands for weights and inputs, "WEIGHTS/INPUTS" names both separately. With `inputs_only` a name stands for
    the inputs, and weights stay as they are. ConfigError for an unknown format, and if no choice is left.
    """
    base = base_choice(recipe)
    if base.inputs is None and (inputs_only or "/" in text):
        raise ConfigError(f"--choices {text}: recipe {recipe.name} does not quantize inputs, which could be raised")
    found: dict[Choice, None] = {}
    for name in (part.strip() for part in text.split(",")):
        if not name:
            continue
        weights, slash, inputs = name.partition("/")
        if slash and inputs_only:
            raise ConfigError(f"--choices {name}: with --inputs-only each choice is one format, that of inputs")
        for one in (weights, inputs) if slash else (weights,):
            try:
                get_format(one)
            except ConfigError as error:
                raise ConfigError(f"--choices {name}: {error}") from error
        if inputs_only:
            choice = replace(base, inputs=weights)
        else:
            choice = Choice(weights, None if base.inputs is None else (inputs or weights))
        found[choice] = None
    found.pop(base, None)
    if not found:
        raise ConfigError(
            f"--choices {text}: names nothing but what recipe {recipe.name} has already; name other formats"
        )
    return tuple(found)


def with_overrides(recipe: Recipe, tables: Sequence[Override]) -> Recipe:
    """The recipe with these tables after its own. They take precedence."""
    return replace(recipe, override=(*recipe.override, *tables))


def everywhere(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe with all sites raised."""
    return with_overrides(recipe, [Override(tuple(sorted(choice.changes(base_choice(recipe)))))])
