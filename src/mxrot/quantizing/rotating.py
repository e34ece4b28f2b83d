"""The rotations that a recipe merges into a model before quantizing, and the source of the rotated model.

Everything else is read from this source, including the original model that runs in parallel and the one that writes
text.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mxrot.errors import ConfigError
from mxrot.models import Family, Source, value_heads
from mxrot.recipe import Recipe
from mxrot.surgery import Rotated, RotatedHeads, Rotations, Untied
from mxrot.surgery.fold_norms import rotation_problem
from mxrot.transforms import generator_for
from mxrot.transforms.base import random_orthogonal
from mxrot.transforms.orders import factors_of, multiply_by_hadamard, random_hadamard


def rotation_problems(config: Any, family: Family, recipe: Recipe, where: str) -> Iterator[ConfigError]:
    """The reasons why the rotations of `recipe` cannot be merged into a model of this config."""
    wanted = recipe.rotation
    is_refused = recipe.cache is not None and family.heads_obstacle is not None  # reported with the cache's problems
    if not family.names_values and recipe.changes_values and not is_refused:
        yield ConfigError(
            f"{where}: recipe {recipe.name} changes values inside of their heads (rotation.value_heads or "
            f"cache.transform), and family {family.name} names no linear that makes them, head after head; take a "
            "recipe that does not"
        )
    if wanted is None:
        return
    if wanted.residual != "none":
        obstacle = rotation_problem(family, where)
        if obstacle is not None:
            yield obstacle
    widths = {"residual": (wanted.residual, config.get_text_config().hidden_size, "the hidden size")}
    widths["value_heads"] = (wanted.value_heads, value_heads(config)[1], "the width of a head")
    for key, (kind, width, what) in widths.items():
        if kind == "hadamard":
            try:
                factors_of(width)
            except ConfigError as error:
                yield ConfigError(
                    f'recipe {recipe.name}: rotation.{key}: {error}, which {what} is; take "orthogonal", or '
                    "Hadamard matrices over blocks of 128 (transform.method = hadamard, transform.block = 128)"
                )


def config_after(config: Any, recipe: Recipe) -> Any:
    """The config of the quantized model: the same object, unless its head gets its own weights."""
    if not (unties(recipe) and config.tie_word_embeddings):
        return config
    found = deepcopy(config)
    found.tie_word_embeddings = False
    return found


def unties(recipe: Recipe) -> bool:
    """True if the head needs its own weights."""
    return recipe.head is not None or (recipe.rotation is not None and recipe.rotation.residual != "none")


def drawn_rotations(config: Any, recipe: Recipe, seed: int, device: torch.device | str) -> Rotations:
    """The rotations that `recipe` asks for in a model of this config, on `device`; the same for the same seed.

    They are random, except for the values of a cache with the Hadamard transform.
    """
    config, wanted = config.get_text_config(), recipe.rotation
    if wanted is None:
        return Rotations(value_heads=_of_cache(config, device) if recipe.turns_values_for_cache else None)
    names = {"residual": ["rotation of the residual stream"]}
    names["value_heads"] = [f"rotation of the value heads of block {i}" for i in range(config.num_hidden_layers)]
    width = value_heads(config)[1]
    return Rotations(
        residual=None
        if wanted.residual == "none"
        else _drawn(wanted.residual, config.hidden_size, seed, names["residual"], device)[0],
        value_heads=(_of_cache(config, device) if recipe.turns_values_for_cache else None)
        if wanted.value_heads == "none"
        else _drawn(wanted.value_heads, width, seed, names["value_heads"], device),
    )


def _of_cache(config: Any, device: torch.device | str) -> Tensor:
    """The Hadamard matrix of the head's width, for the values of each block: [blocks, D, D]."""
    _, width = value_heads(config)
    matrix: Tensor = multiply_by_hadamard(torch.eye(width, dtype=torch.float64, device=device), False)
    return matrix.expand(config.get_text_config().num_hidden_layers, -1, -1)


def _drawn(kind: str, size: int, seed: int, names: list[str], device: torch.device | str) -> Tensor:
    """One matrix for each name: [count, size, size]."""
    generators = [generator_for(seed, name) for name in names]
    if kind == "hadamard":
        return torch.stack([random_hadamard(size, generator, device) for generator in generators])
    return torch.cat([random_orthogonal(1, size, generator, device) for generator in generators])


def rotated_source(source: Source, rotations: Rotations, unties_head: bool = False) -> Source:
    """The source with these rotations merged into its weights, each rounded once. The head gets its own weights if the
    rotations, or `unties_head`, require it."""
    if (unties_head or rotations.residual is not None) and source.config.tie_word_embeddings:
        source = Untied(source)
    if rotations.value_heads is not None:
        source = RotatedHeads(source, rotations.value_heads, rounds=rotations.residual is None)
    if rotations.residual is not None:
        source = Rotated(source, rotations.residual)
    return source
