"""The `quantization_config` of a checkpoint: what is installed, in the words of compressed-tensors and in mxrot's
marker.

Each distinct scheme is one config group. The marker is a separate table, and adds to each group what compressed-tensors
cannot express. There are two forms. The compressed-tensors form names its layout, and gives transforms as
compressed-tensors does. The native form is the same if compressed-tensors would run the same model by it. If it would
not, because of a transform or a format without a layout, every format is called "mxrot", and weights and inputs are in
mxrot's words. Programs that would run another model must refuse it: compressed-tensors, and so transformers, refuses
that format in a group. vLLM does not read the format, but refuses the words.

A transform's matrix is stored as sqrt(32) T under the type "random-hadamard", because both compressed-tensors and vLLM
divide matrices of that type by sqrt(32) when they load them. vLLM does so for every type, compressed-tensors only for
the Hadamard types.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from mxrot.errors import ConfigError
from mxrot.formats import AttentionOperands, CacheScheme, Format, TensorQuantizer
from mxrot.formats.grid import Uniform
from mxrot.marker import MARKER, METHOD, NATIVE
from mxrot.models import Family
from mxrot.recipe import Recipe
from mxrot.scheme import Scheme, SiteScheme, scheme_name
from mxrot.transforms.stages import BlockDiagonalSpec

FORMAT_VERSION = 5
"""The newest version: the head is quantized."""
WITH_CACHE = 4
"""The version that is written if keys and values of attention are quantized, and the head is not."""
WITH_OPERANDS = 3
"""The version that is written if the operands of attention products are quantized."""
PLAIN = 2
"""The version that is written if attention is not quantized. Programs that know no newer version read it."""
EVERY = ["Linear"]
"""The targets of a scheme of all linears that are not ignored."""
HEAD = "head"
"""The group of a quantized head, which is its only target."""
THEIR_BLOCK = 32
"""Channels of a block for which the layout and arithmetic of compressed-tensors were tested."""
_MIXED = "mixed-precision"
"""What compressed-tensors calls the format of a checkpoint whose groups have different formats."""


def check_exportable(recipe: Recipe) -> None:
    """ConfigError if the weights that this recipe makes cannot be stored."""
    for one in recipe.variants:
        quantizer = one.weights.quantizer()
        for part in quantizer.format.grid.parts(quantizer.rule):
            if part.dtype.is_floating_point and part.bits < 8 * part.dtype.itemsize:
                raise ConfigError(
                    f"recipe {one.name}: weights: scales of rule {quantizer.rule.name!r} are {part.bits}-bit levels "
                    f"that exist as {str(part.dtype).removeprefix('torch.')} only, and cannot be exported; use "
                    "`compare`, which keeps the model in memory, or another rule"
                )


def native_config(scheme: Scheme, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` that a checkpoint is written with. `dtype` is the type of tensors that are not
    quantized."""
    return _config(scheme, family, dtype, NATIVE if is_native(scheme) else None)


def is_native(scheme: Scheme) -> bool:
    """True if the checkpoint is written in the form that only mxrot reads."""
    return scheme.has_transform or why_unfaithful(scheme) is not None


def compressed_tensors_config(scheme: Scheme, family: Family, dtype: torch.dtype) -> dict[str, Any]:
    """The config by which stock vLLM runs the scheme, in the words of compressed-tensors. ConfigError if it has none.

    With transforms, a group's format is "mxrot" here, too. vLLM applies transforms, and does not read the format.
    transformers would leave them out, and refuses it.
    """
    if (reason := why_unfaithful(scheme)) is not None:
        raise ConfigError(f"compressed-tensors: {reason}")
    config = _config(scheme, family, dtype, None)
    if scheme.has_transform:
        config["transform_config"] = {"config_groups": _transform_schemes(scheme, family)}
        for group in config["config_groups"].values():
            group["format"] = NATIVE
    return config


def why_unfaithful(scheme: Scheme) -> str | None:
    """Why compressed-tensors cannot express a scheme. None if it can.

    The scale rule of inputs and the summation of products do not count, because runtimes choose these themselves. But
    no runtime clips inputs. Weights may be clipped: their scales are stored, whatever rule chose them.
    """
    if scheme.cache is not None:
        return "keys and values of attention are quantized"
    if scheme.attention is not None:
        return "the operands of attention's products are quantized"
    if scheme.head is not None:
        return "the head is quantized"
    for one in scheme.distinct:
        if _layout_of(one) is None:
            inputs = "" if one.activations is None else f" with inputs in {one.activations.format.name}"
            return f"it has no layout for weights in {one.weights.format.name}{inputs}"
        if one.activations is not None and one.activations.rule.is_clipped:
            return f"it has no word for inputs that are clipped ({one.activations.spelled})"
        if one.stages and not _is_one_matrix(one):
            return "it has one matrix for all blocks of a site, and this checkpoint has others"
    return None


def _layout_of(scheme: SiteScheme) -> str | None:
    """What compressed-tensors calls the layout of a site's weights, if the inputs fit it."""
    inputs, weights = scheme.activations, scheme.weights
    fits = inputs is None or (inputs.format is weights.format and inputs.rule.is_power_of_two)
    return weights.format.compressed_tensors if fits and weights.rule.is_power_of_two else None


def _is_one_matrix(scheme: SiteScheme) -> bool:
    return scheme.stages == (BlockDiagonalSpec(THEIR_BLOCK, "site"),)


def _config(scheme: Scheme, family: Family, dtype: torch.dtype, called: str | None) -> dict[str, Any]:
    """The config. `called` is the name of every format, None for the names of compressed-tensors."""
    targets = _targets(scheme, family)
    parts = [(f"group_{number}", one, targets[one]) for number, one in enumerate(scheme.distinct)]
    if scheme.head is not None:
        parts.append((HEAD, scheme.head, [family.head]))
    groups, schemes, formats = {}, {}, []
    for name, one, covered in parts:
        formats.append(called or _layout_of(one))
        own = scheme_table(one)
        words = own if called == NATIVE else _words(one)
        groups[name] = {
            "targets": covered,
            "weights": words["weights"],
            "input_activations": words["activations"],
            "output_activations": None,
            "format": formats[-1],
        }
        schemes[name] = own
    cache, attention = scheme.cache, scheme.attention
    marker: dict[str, Any] = {
        "format_version": _version(scheme),
        "dtype": str(dtype).removeprefix("torch."),
        "schemes": schemes,
    }
    if attention is not None:
        marker["attention"] = attention_table(attention)
    return {
        "quant_method": METHOD,
        "format": formats[0] if len(set(formats)) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*([family.head] if scheme.head is None else []), *scheme.left],
        "kv_cache_scheme": None if cache is None else cache_table(cache),
        "sparsity_config": {},
        MARKER: marker,
    }


def _version(scheme: Scheme) -> int:
    """The oldest version that can express a scheme."""
    if scheme.head is not None:
        return FORMAT_VERSION
    if scheme.cache is not None:
        return WITH_CACHE
    return PLAIN if scheme.attention is None else WITH_OPERANDS


def scheme_table(scheme: SiteScheme) -> dict[str, Any]:
    """The table of a scheme in the marker."""
    return {
        "weights": _quantizer_table(scheme.weights),
        "activations": None if scheme.activations is None else _quantizer_table(scheme.activations),
        "transform": [stage.to_table() for stage in scheme.stages],
        "accumulation": scheme.accumulation,
    }


def attention_table(attention: AttentionOperands) -> dict[str, Any]:
    """The table of the operands of attention products in the marker."""
    return {name: one and _quantizer_table(one) for name, one in attention.by_name.items()}


def cache_table(cache: CacheScheme) -> dict[str, Any]:
    """The table `kv_cache_scheme`, in mxrot's words."""
    return {name: _quantizer_table(one) for name, one in cache.by_name.items()} | {
        name: getattr(cache, name) for name in ("first", "last", "key_transform", "value_transform")
    }


def _quantizer_table(quantizer: TensorQuantizer) -> dict[str, Any]:
    """A quantizer's table. It has a key for the clip only if there is one, so that other checkpoints stay as before."""
    table: dict[str, Any] = {"format": quantizer.format.name, "rule": quantizer.rule.name}
    return table | {"clip": quantizer.rule.clip} if quantizer.rule.is_clipped else table


def _words(scheme: SiteScheme) -> dict[str, Any]:
    """Weights and inputs in the words of compressed-tensors."""
    inputs = None if scheme.activations is None else _arguments(scheme.activations.format)
    return {
        "weights": _arguments(scheme.weights.format),
        "activations": None if inputs is None else {**inputs, "dynamic": True, "observer": None},
    }


def _arguments(format: Format) -> dict[str, Any]:
    """A format in the words of compressed-tensors."""
    parts = {part.name: part for part in format.grid.parts(format.rule())}
    is_integer = isinstance(format.grid, Uniform) and "int" in format.element.name
    return {
        "num_bits": format.bits,
        "type": "int" if is_integer else "float",
        "strategy": "channel" if format.block is None else "group",
        "symmetric": "zero_point" not in parts,
        "dynamic": False,
        "group_size": format.longest_block or format.block,
        "scale_dtype": str(parts["scale"].dtype) if "scale" in parts else None,
        "zp_dtype": "torch.uint8",
        "actorder": None,
        "block_structure": None,
        "observer": "memoryless_minmax",
        "observer_kwargs": {},
    }


def _targets(scheme: Scheme, family: Family) -> dict[SiteScheme, list[str]]:
    """The linears of each distinct scheme: all that are not ignored, or regular expressions. Linears outside the text
    model never belong to them, and a quantized head has its own group."""
    if len(scheme.distinct) == 1 and family.beside is None and scheme.head is None:
        return {scheme.distinct[0]: EVERY}
    left = [name for name in scheme.left if name.removeprefix(f"{family.blocks}.").partition(".")[0].isdecimal()]
    count = 1 + max(_place(name, family)[0] for name in (*scheme.linears, *left))  # others in `left` are refused
    blocks: dict[tuple[SiteScheme, str], list[int]] = defaultdict(list)
    for name, one in scheme.linears.items():
        index, inner = _place(name, family)
        blocks[one, inner].append(index)
    inners: dict[tuple[SiteScheme, tuple[int, ...]], list[str]] = defaultdict(list)
    for (one, inner), indices in blocks.items():
        inners[one, tuple(indices)].append(inner)
    found: dict[SiteScheme, list[str]] = {one: [] for one in scheme.distinct}
    for (one, where), names in inners.items():
        found[one].append(_target(family, names, None if len(where) == count else where))
    return found


def _place(linear: str, family: Family) -> tuple[int, str]:
    """The block in the full name of a linear, and its name within the block."""
    number, _, inner = linear.removeprefix(f"{family.blocks}.").partition(".")
    return int(number), inner


def _target(family: Family, linears: Iterable[str], blocks: Iterable[int] | None) -> str:
    """A regular expression for linears, given by their names in a block, of these blocks. None stands for all
    blocks."""
    numbers = r"\d+" if blocks is None else "|".join(map(str, blocks))
    numbers = f"(?:{numbers})" if "|" in numbers else numbers
    names = "|".join(_inner_patterns(family, list(linears)))
    return rf"re:(?:.*\.)?{re.escape(family.blocks)}\.{numbers}\.(?:{names})$"


def _inner_patterns(family: Family, linears: list[str]) -> list[str]:
    """Regular expressions for names in a block, with one expression for the same linear of all experts."""
    known = Counter(map(_without_numbers, family.linears))
    here = Counter(map(_without_numbers, linears))
    patterns = []
    for name in linears:
        alike = _without_numbers(name)
        whole = here[alike] == known[alike] and here[alike] > 1
        patterns.append(re.escape(alike).replace(r"\#", "#").replace("#", r"\d+") if whole else re.escape(name))
    return list(dict.fromkeys(patterns))


def _without_numbers(linear: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "#", linear)


def _transform_schemes(scheme: Scheme, family: Family) -> dict[str, Any]:
    found = {}
    for index in sorted({_place(name, family)[0] for name in scheme.linears}):
        for site in scheme.active_sites(family, index):
            own = scheme.linears[f"{family.block_prefix(index)}.{site.linears[0]}"]
            if own.stages:
                target = _target(family, site.linears, [index])
                found[scheme_name(index, site)] = _transform_scheme(target)
    return found


def _transform_scheme(target: str) -> dict[str, Any]:
    apply = [
        {"targets": [target], "location": location, "inverse": inverse, "ignore": []}
        for location, inverse in (("input", False), ("weight_input", True))
    ]
    return {
        "type": "random-hadamard",
        "apply": apply,
        "randomize": False,
        "requires_grad": False,
        "head_dim": THEIR_BLOCK,
        "precision": "torch.bfloat16",
    }
