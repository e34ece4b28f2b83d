"""The `quantization_config` of a checkpoint: the compressed-tensors layout, with mxrot's marker.

Layout `mxfp4-pack-quantized` of compressed-tensors, and its transform schemes. A scheme's matrix is stored as
sqrt(32) T under the type "random-hadamard", because both compressed-tensors and vLLM divide matrices of that
type by sqrt(32) when they load them; vLLM does so for every type, compressed-tensors only for the Hadamard ones.
"""

from __future__ import annotations

import re
from typing import Any

from mxrot.errors import CheckpointError, ConfigError
from mxrot.formats import get_format
from mxrot.models import Family
from mxrot.recipe import TRANSFORM_BLOCK, Recipe
from mxrot.surgery import scheme_name

FORMAT_VERSION = 1
MARKER = "mxrot"
METHOD = "compressed-tensors"
ON_LOAD = "mxrot"


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
    format = get_format(recipe.weights.format)
    arguments = _quantization_arguments(format.element.bits, format.block)
    inputs = None
    if recipe.activations is not None:
        inputs = {**arguments, "dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": arguments,
        "input_activations": inputs,
        "output_activations": None,
        "format": format.compressed_tensors,
    }
    activation_rule = None if recipe.activations is None else recipe.activations.quantizer().rule.name
    config: dict[str, Any] = {
        "quant_method": METHOD,
        "format": format.compressed_tensors,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [family.head, *ignored],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        MARKER: {
            "format_version": FORMAT_VERSION,
            "activation_rule": activation_rule,
            "sharing": recipe.sharing,
            "accumulation": recipe.accumulation,
        },
    }
    if recipe.has_transform:
        schemes = {
            scheme_name(index, site): _transform_scheme(family.block_prefix(index), site.linears)
            for index in range(blocks)
            for site in family.active_sites(index, recipe.ignore)
        }
        config["transform_config"] = {"config_groups": schemes}
    return config


def check_marker(config: dict[str, Any], where: str) -> dict[str, Any]:
    """mxrot's marker in the contents of a config.json; CheckpointError if it is missing or of another version."""
    quantization = config.get("quantization_config")
    marker = quantization.get(MARKER) if isinstance(quantization, dict) else None
    if not isinstance(marker, dict):
        raise CheckpointError(f"{where}: config.json has no {MARKER!r} marker; not a checkpoint written by mxrot")
    if marker.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: checkpoint format version {marker.get('format_version')!r}; "
            f"this mxrot reads version {FORMAT_VERSION}"
        )
    return marker


def _quantization_arguments(bits: int, block: int) -> dict[str, Any]:
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
