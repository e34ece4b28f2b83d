"""Reasons why a model cannot be quantized, found from its config and the recipe before any weight is read.

`quantize` stops at the first problem; `plan` lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from mxrot.calibration.spreading import Room, check_spreads, spread_over
from mxrot.calibration.writing_sizes import WritingSizes
from mxrot.errors import ConfigError, FamilyError, MxrotError
from mxrot.models import Family, Source, linear_problems, quantized_by, value_heads
from mxrot.nearest import brief, did_you_mean, listed
from mxrot.quantizing.choosing import choice_problems
from mxrot.quantizing.head import head_problems
from mxrot.quantizing.patterns import matches_nothing
from mxrot.quantizing.rotating import rotation_problems
from mxrot.quantizing.site import smoothed_sites
from mxrot.quantizing.trained_rotations import training_problems
from mxrot.recipe import Recipe
from mxrot.rules import Rules
from mxrot.suited import suited
from mxrot.transforms.orders import factors_of


def find_problems(
    model: PreTrainedModel, family: Family, recipe: Recipe, where: str, source: Source | None = None
) -> Iterator[MxrotError]:
    """The reasons why `recipe` cannot quantize `model`, a skeleton of `family`, on any machine; none if it can.

    Without a `source` only the config is checked.
    """
    yield from weight_problems(model, where, source)
    yield from ignore_problems(model, family, recipe)
    recipe, _ = suited(recipe, family, model.config)
    rules = Rules(recipe, family, model.config.get_text_config().num_hidden_layers)
    wrong = list(rules.problems())
    yield from wrong
    if wrong:
        return
    yield from expert_problems(rules)
    yield from rotation_problems(model.config, family, recipe, where)
    yield from training_problems(rules)
    yield from smoothing_problems(rules)
    yield from linear_problems(model, family, rules.input_block)
    yield from attention_problems(model, family, recipe)
    yield from cache_problems(model, family, recipe)
    yield from head_problems(model, family, recipe)
    found = list(stage_problems(model, rules))
    yield from found
    if not found:
        yield from choice_problems(model, family, recipe)


def weight_problems(model: PreTrainedModel, where: str, source: Source | None) -> Iterator[MxrotError]:
    """The reasons why no recipe can quantize the weights."""
    key = quantized_by(model.config)
    if key is not None:
        yield FamilyError(f"{where}: is quantized already ({key} in config.json); give the original")
    elif source is not None:
        yield from source.problems(model)


def ignore_problems(model: PreTrainedModel, family: Family, recipe: Recipe) -> Iterator[MxrotError]:
    """Patterns of `ignore` that match nothing, and a recipe that quantizes nothing."""
    if not recipe.ignore:
        return
    modules = dict(model.named_modules())
    linears = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    for pattern in recipe.ignore:
        problem = matches_nothing(pattern, linears, modules)
        if problem is not None:
            yield ConfigError(f"recipe {recipe.name}: ignore: {problem}")
    blocks = range(model.config.get_text_config().num_hidden_layers)
    if not any(family.active_sites(index, recipe.ignore) for index in blocks):
        yield ConfigError(
            f"recipe {recipe.name}: ignore = {brief(list(recipe.ignore))} leaves every linear as it is; "
            "nothing would be quantized"
        )


def expert_problems(rules: Rules) -> Iterator[MxrotError]:
    """Unsupported settings for experts."""
    recipe, family = rules.recipe, rules.family
    if family.experts is None:
        return
    if recipe.tuning is not None:
        yield ConfigError(
            f"recipe {recipe.name}: experts, as in family {family.name}, are not tuned; set tuning = none, or take "
            "recipe mxrot"
        )
    if any("mean" in one.transform.needs for one in rules.in_use):
        yield ConfigError(
            f'recipe {recipe.name}: transform sample = "mean" is over windows, and experts, as in family '
            f'{family.name}, see single tokens; set transform.sample = "peaks"'
        )


def smoothing_problems(rules: Rules) -> Iterator[MxrotError]:
    """Sites named by smoothing that do not exist, and those whose scales cannot be folded."""
    recipe, family = rules.recipe, rules.family
    if recipe.smoothing is None:
        return
    known = dict.fromkeys(site.group for site in family.sites)
    for name in recipe.smoothing.skip:
        if name not in known:
            yield ConfigError(
                f"recipe {recipe.name}: smoothing.skip: family {family.name} has no site {brief(name)};"
                f"{did_you_mean(name, known)} its sites are {listed(name, known)}"
            )
    smoothed = {
        site.name: site
        for index in range(rules.blocks)
        for site in smoothed_sites(rules, index)
        if rules.of(index, site.name).sharing == "site"
    }
    for site in smoothed.values():
        if site.norm is None and site.producer is None:
            yield ConfigError(
                f"recipe {recipe.name}: site {site.name!r} of family {family.name} has nothing before it that can "
                'take smoothing scales; list it under smoothing.skip, or set transform.sharing = "block"'
            )


def heads_problem(where: str, family: Family, remedy: str) -> ConfigError:
    """The error that keys, values and products of a family cannot be quantized."""
    return ConfigError(
        f"{where}: in family {family.name} keys and values are not quantized: {family.heads_obstacle}; {remedy}"
    )


def attention_problems(model: PreTrainedModel, family: Family, recipe: Recipe) -> Iterator[MxrotError]:
    """Problems of quantized attention operands: attention that does more than its two products, and unsuitable head
    widths."""
    if recipe.attention is None:
        return
    config = model.config.get_text_config()
    if family.heads_obstacle is not None:
        yield heads_problem(f"recipe {recipe.name}: attention", family, "leave out the table [attention]")
        return
    kinds = set(getattr(config, "layer_types", None) or ())
    by_kind = family.windows == "by kind" and "sliding_attention" in kinds
    window = getattr(config, "sliding_window", None)
    found = []
    if getattr(config, "attn_logit_softcapping", None) is not None:
        found.append("soft caps (attn_logit_softcapping)")
    if by_kind or (family.windows == "all" and window is not None):
        found.append(f"windows (sliding_window {window})")
    if found:
        yield ConfigError(
            f"recipe {recipe.name}: attention: products with quantized operands know no {' and no '.join(found)}, "
            f"which this model of family {family.name} has; leave out the table [attention]"
        )
    width, block = value_heads(config)[1], recipe.attention.operands().head_block
    if width % block:
        yield ConfigError(
            f"recipe {recipe.name}: attention: queries_keys: heads are {width} wide, which is not a multiple of the "
            f"block size {block} of {recipe.attention.queries_keys}; set attention.queries_keys to another format, or "
            "leave it out"
        )


def cache_problems(model: PreTrainedModel, family: Family, recipe: Recipe) -> Iterator[MxrotError]:
    """Problems of a quantized cache: heads whose width does not hold whole blocks or has no Hadamard matrix, and a
    family without support for it."""
    if recipe.cache is None:
        return
    if family.heads_obstacle is not None:
        yield heads_problem(f"recipe {recipe.name}: cache", family, "leave out the table [cache]")
        return
    width, block = value_heads(model.config.get_text_config())[1], recipe.cache.scheme().head_block
    if width % block:
        names = " and ".join(dict.fromkeys((recipe.cache.keys, recipe.cache.values)))
        yield ConfigError(
            f"recipe {recipe.name}: cache: heads are {width} wide, which is not a multiple of {block}, as {names} "
            "need; set cache.keys and cache.values to other formats, such as int4_row_asym, or leave out the table "
            "[cache]"
        )
    if recipe.cache.transform != "none":
        try:
            factors_of(width)
        except ConfigError as error:
            yield ConfigError(
                f"recipe {recipe.name}: cache.transform: {error}, which the width of a head is; set cache.transform to "
                '"none"'
            )


def stage_problems(model: PreTrainedModel, rules: Rules) -> Iterator[MxrotError]:
    """Stages that do not exist for the widths of the model, once for each kind and width."""
    told = set()
    for index, block in enumerate(model.get_submodule(rules.family.blocks).children()):
        modules = dict(block.named_modules())
        for site in rules.active_sites(index):
            linear = modules.get(site.linears[0])
            if not isinstance(linear, nn.Linear):
                continue
            recipe, width = rules.of(index, site.name), linear.in_features
            for spec in recipe.transform.specs(width, recipe.sharing, rules.smooths(site)):
                if width % spec.multiple or (spec, width) in told:  # the former is reported for each linear
                    continue
                told.add((spec, width))
                try:
                    spec.check(width)
                except ConfigError as error:
                    place = f"{rules.family.block_prefix(index)}.{site.linears[0]}"
                    yield ConfigError(f"{place}: {error}; listed under `ignore` it is left as it is")


def memory_problem(
    recipe: Recipe, writing: WritingSizes, device: torch.device | str, room: Room | None
) -> MxrotError | None:
    """The problem if `recipe` runs the whole original and `room` is too small. None if there is no problem, or if the
    room is unknown.

    To write text, as `writing` counts it, the original may be spread over the devices of `room`. Otherwise `device`
    must hold it.
    """
    if room is None or not recipe.runs_whole_original:
        return None
    needed, free = writing.weights, room.free[0]
    cannot_write = writing_problem(recipe, writing, room)
    if not recipe.holds_original or needed < free:
        return cannot_write
    tuning = recipe.tuning
    remedies = {
        "calibration.generated = 0": recipe.calibration.generated > 0 and cannot_write is not None,
        "calibration.own = 0 (--calib with a text)": recipe.calibration.own > 0 and cannot_write is not None,
        "tuning.generated = 0": tuning is not None and tuning.generated > 0,
        "tuning.rollouts = 0": tuning is not None and tuning.rollouts > 0,
        "tuning.light_steps = 0": tuning is not None and tuning.light_steps > 0,
        "tuning.polish_steps = 0": tuning is not None and tuning.polish_steps > 0,
        'tuning.scope = "block"': recipe.tunes_network,
        "rotation.steps = 0": recipe.trains_rotations,
        "choice = none": recipe.choice is not None,
    }
    return ConfigError(
        f"recipe {recipe.name} runs the whole original model on {device}: that takes {needed / 1e9:.1f} GB, "
        f"and {free / 1e9:.1f} GB are free; set {' and '.join(key for key, helps in remedies.items() if helps)}"
    )


def writing_problem(recipe: Recipe, writing: WritingSizes, room: Room) -> MxrotError | None:
    """The reason why the original cannot write the text of `recipe`, on any number of devices."""
    if not recipe.writes_text:
        return None
    try:
        if spread_over(writing, room) is not None:
            check_spreads()
    except ConfigError as error:
        return ConfigError(f"recipe {recipe.name}: {error}")
    return None


def free_memory(device: torch.device) -> int | None:
    """The free bytes on a GPU; None if that is unknown."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
