"""The `quantization_config` of a checkpoint: the compressed-tensors layout, with mxrot's marker.

Layout `mxfp4-pack-quantized` of compressed-tensors, and its transform schemes. A scheme's matrix is stored as
sqrt(32) T under the type "random-hadamard", because both compressed-tensors and vLLM divide matrices of that
type by sqrt(32) when they load them; vLLM does so for every type, compressed-tensors only for the Hadamard ones.
"""

from __future__ import annotations

import re
from typing import Any

from mxrot.checkpoint.installed import FORMAT_VERSION, Installed
from mxrot.errors import CheckpointError, ConfigError
from mxrot.marker import MARKER, METHOD
from mxrot.models import Family
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.surgery import scheme_name


def check_exportable(recipe: Recipe) -> None:
    """ConfigError if no hardware or no loader could read what this recipe makes."""
    weights = recipe.weights.quantizer()
    choices = [("weights", weights)]
    if recipe.activations is not None:
        choices.append(("activations", recipe.activations.quantizer()))
    for part, quantizer in choices:
        if not quantizer.rule.is_power_of_two:
            raise ConfigError(
                f"recipe {recipe.name}: {part}: scales of rule {quantizer.rule.name!r} are not E8M0 and cannot be "
                "exported; use `compare`, which keeps the model in memory, or another rule"
            )
        if quantizer.format.compressed_tensors is None or quantizer.format is not weights.format:
            raise ConfigError(
                f"recipe {recipe.name}: {part}: checkpoints of format {quantizer.format.name} with weights in "
                f"{weights.format.name} are not written; use `compare`, which keeps the model in memory"
            )


def quantization_config(recipe: Recipe, family: Family, blocks: int, ignored: list[str]) -> dict[str, Any]:
    """The `quantization_config` for a model of `blocks` decoder blocks; `ignored` are full names of linears."""
    return _layout(Installed.by(recipe, tuple(ignored)), family, blocks, recipe.ignore)


def check_layout(quantization: dict[str, Any], installed: Installed, family: Family, blocks: int) -> None:
    """CheckpointError unless a `quantization_config` is the one that is written for what it has `installed`.

    Fields of other programs may stand beside ours.
    """
    expected = _layout(installed, family, blocks, installed.ignored)
    marker = expected[MARKER] | {key: value for key, value in quantization[MARKER].items() if key in expected[MARKER]}
    found = {key: quantization.get(key) for key in expected} | {MARKER: marker}
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


def _layout(installed: Installed, family: Family, blocks: int, left: tuple[str, ...]) -> dict[str, Any]:
    """`left` are names or patterns of the linears that have no transform."""
    format = installed.format
    arguments = _quantization_arguments(format.bits, format.block)
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": None if installed.rule is None else {**arguments, "dynamic": True, "observer": None},
        "output_activations": None,
        "format": format.compressed_tensors,
    }
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": format.compressed_tensors,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [family.head, *installed.ignored],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        MARKER: {
            "format_version": FORMAT_VERSION,
            "activation_rule": installed.rule,
            "sharing": installed.sharing,
            "accumulation": installed.accumulation,
        },
    }
    if installed.has_transform:
        schemes = {
            scheme_name(index, site): _transform_scheme(family.block_prefix(index), site.linears)
            for index in range(blocks)
            for site in family.active_sites(index, left)
        }
        config["transform_config"] = {"config_groups": schemes}
    return config


def _quantization_arguments(bits: int, block: int | None) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "float",
        "strategy": "group",
        "symmetric": True,
        "dynamic": False,
        "group_size": block,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
        "actorder": None,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
    }


def _transform_scheme(prefix: str, linears: tuple[str, ...]) -> dict[str, Any]:
    names = "|".join(re.escape(name) for name in linears)
    target = f"re:(?:.*\\.)?{re.escape(prefix)}\\.(?:{names})$"
    apply = [
        {"targets": [target], "location": location, "inverse": inverse, "ignore": []}
        for location, inverse in (("input", False), ("weight_input", True))
    ]
    return {
        "type": "random-hadamard",
        "apply": apply,
        "randomize": False,
        "requires_grad": False,
        "head_dim": TRANSFORM_BLOCK,
        "precision": "torch.bfloat16",
    }
