"""Derive a family for a model without a written one: its sites from a forward pass, everything else by proof.

A small random model of transformers' own class is run once. Linears that read the same tensor are a site. The other
claims of a record are tested on that model in float64 (`proofs`). Those that fail are left out: then nothing is
smoothed, permuted or rotated there. A required claim that fails is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from mxrot.deriving.outside import (
    check_alike,
    check_outside,
    check_passes,
    find_attention,
    find_blocks,
    find_final_norm,
    find_rotary,
    find_windows,
    name_of,
)
from mxrot.deriving.proofs import Trial
from mxrot.deriving.site_names import with_site_names
from mxrot.deriving.small import TOKENS, small_model
from mxrot.deriving.trace import Calls, block_linears, traced
from mxrot.errors import FamilyError, MxrotError
from mxrot.models import Family, Site, build_skeleton, value_heads
from mxrot.models.family_table import OBSTACLE


def derived_family(config: Any, where: str) -> Family:
    """The family of a model from its config. It does not depend on the weights, and is the same each time.

    `where` is the model's name in errors. FamilyError, with the reason, for an unsupported model: its decoder blocks
    differ, a linear is not reached by a pass or its weight is used by something else, the blocks contain other weights,
    such as those of experts, or the modules around the blocks are not embedding, final norm and head.
    """
    if getattr(config, "text_config", None) is not None:
        raise FamilyError(f"{where}: a model of more than text; no family is derived for it")
    skeleton = build_skeleton(config)
    architecture = type(skeleton).__name__
    if architecture not in (getattr(config, "architectures", None) or ()):
        raise FamilyError(
            f"{where}: config.json calls its architecture {', '.join(config.architectures or ()) or 'nothing'}, and "
            f"transformers builds a {architecture}; no family is derived for it"
        )
    blocks = find_blocks(skeleton, where)
    check_alike(skeleton, blocks, where)
    for index in range(config.num_hidden_layers):
        block_linears(skeleton.get_submodule(f"{blocks}.{index}"), f"{where}: {blocks}.{index}")
    whole = small_model(config, where, keeps_blocks=True)
    few = small_model(config, where)
    for model in (whole, few):
        _check_same_class(model, skeleton, f"{blocks}.0", where)
    try:
        family = _named(whole, _with_sites(whole, blocks, architecture, where), where)
        return with_site_names(_with_proofs(few, family), few)
    except MxrotError:
        raise
    except Exception as error:  # from transformers' own code, in an unusual model
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise FamilyError(
            f"{where}: a small model of its class does not run as it is called here ({said}); its family must be "
            "written by hand (docs/add-a-family.md)"
        ) from error


def _check_same_class(model: PreTrainedModel, skeleton: PreTrainedModel, block: str, where: str) -> None:
    """Raise FamilyError unless a block of both models consists of the same modules."""
    names = [[(n, type(m)) for n, m in one.get_submodule(block).named_modules()] for one in (model, skeleton)]
    if names[0] != names[1]:
        raise FamilyError(f"{where}: a small model of its class has other modules; no family is derived for it")


def _ids(model: PreTrainedModel) -> torch.Tensor:
    """Two windows of tokens without repetition."""
    return torch.arange(2 * TOKENS).view(2, TOKENS) % model.config.vocab_size


def _with_sites(model: PreTrainedModel, blocks: str, architecture: str, where: str) -> Family:
    """The family with what a pass shows: the sites, and the modules around the blocks."""
    ids = _ids(model)
    body = name_of(model, model.get_decoder(), "decoder", where)
    embedding = name_of(model, model.get_input_embeddings(), "embedding", where)
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise FamilyError(f"{where}: its head is no nn.Linear")
    return Family(
        name=str(model.config.model_type),
        architectures=(architecture,),
        sites=_sites(model, blocks, ids, where),
        body=body,
        blocks=blocks,
        embedding=embedding,
        final_norm=find_final_norm(model, body, blocks, ids, where),
        head=name_of(model, head, "head", where),
        rotary=find_rotary(model, embedding, where),
        rotation_obstacle=OBSTACLE,
        values="",
        values_read_by="",
    )


def _named(model: PreTrainedModel, family: Family, where: str) -> Family:
    """The family with its attention and windows, if its blocks, run one by one, equal the model."""
    ids = _ids(model)
    check_outside(model, family, where)
    check_passes(model, family, ids, where)
    family = replace(family, attention=find_attention(model, family, ids, where))
    return replace(family, windows=find_windows(model, family, ids, where))


def _sites(model: PreTrainedModel, blocks: str, ids: torch.Tensor, where: str) -> tuple[Site, ...]:
    """The linears of each site. The module that computes their input is entered as the norm until that is proven."""
    children = [(f"{blocks}.{name}", block) for name, block in model.get_submodule(blocks).named_children()]
    calls = traced(model, children, ids)
    found = [
        own.linears_by_input(block_linears(block, full)) for own, (full, block) in zip(calls, children, strict=True)
    ]
    for index, sites in enumerate(found):
        if sites != found[0]:
            raise FamilyError(
                f"{where}: the linears of decoder block {index} read their inputs otherwise together than those of "
                "block 0; its family must be written by hand (docs/add-a-family.md)"
            )
    return tuple(
        Site(f"site_{number}", linears, norm=_made_by(calls, linears[0])) for number, linears in enumerate(found[0])
    )


def _made_by(calls: list[Calls], linear: str) -> str | None:
    """The innermost module that computes the input of a linear in every block; None if there is none."""
    common = set.intersection(*(set(own.makers(linear)) for own in calls))
    return max(common, key=lambda name: (name.count("."), name), default=None)


def _with_proofs(model: PreTrainedModel, family: Family) -> Family:
    """The family with the proven norms, producers and orders of channels."""
    trial = Trial(model, family, _ids(model))
    family = replace(family, sites=tuple(_with_norm(trial, site) for site in family.sites))
    for number in range(len(family.sites)):
        if family.sites[number].norm is None:
            family = _with_values(trial, family, number)
            family = _with_producer(trial, family, number)
    return _with_inner_rows(trial, family)


def _with_norm(trial: Trial, site: Site) -> Site:
    """The site with its norm if that is a module of the block itself and takes scales, otherwise without."""
    if site.norm is not None and "." not in site.norm:
        for adds_one in (False, True):
            named = replace(site, norm_adds_one=adds_one)
            if trial.folds(named):
                return named
    return replace(site, norm=None)


def _with_values(trial: Trial, family: Family, number: int) -> Family:
    """The family with the linear that makes values, if site `number` reads them head after head."""
    site, config = family.sites[number], trial.model.config
    heads, width = value_heads(config)
    if (
        family.names_values
        or len(site.linears) > 1
        or trial.inputs(site.linears[0]) != config.num_attention_heads * width
    ):
        return family
    for name in _before(family, number):
        named = replace(family, values=name, values_read_by=site.linears[0])
        if trial.outputs(name) >= heads * width and trial.turns_heads(named):
            fed = replace(site, producer=name, producer_is_value=True)
            return _with_site(named, number, fed) if trial.folds(fed) else named
    return family


def _with_producer(trial: Trial, family: Family, number: int) -> Family:
    """The family in which site `number` names the linear whose rows are its channels, up to factors, if there is
    one."""
    site = family.sites[number]
    if site.producer is not None or len(site.linears) > 1:
        return family
    for name in _before(family, number):
        fed = replace(site, producer=name)
        named = _with_site(family, number, fed)
        if trial.outputs(name) == trial.inputs(site.linears[0]) and trial.folds(fed) and trial.permutes(named, number):
            return named
    return family


def _with_inner_rows(trial: Trial, family: Family) -> Family:
    """The family with the linear whose rows, or halves of them, are the channels of the last site one by one, if that
    site names no producer and there is one."""
    number, last = len(family.sites) - 1, family.sites[-1]
    if last.producer is not None or len(last.linears) > 1:
        return family
    width = trial.inputs(last.linears[0])
    for name in _before(family, number):
        named = replace(family, inner_rows=name)
        if trial.outputs(name) in (width, 2 * width) and trial.permutes(named, number):
            return named
    return family


def _before(family: Family, number: int) -> Iterator[str]:
    """The linears that compute before site `number`, the nearest first."""
    for site in reversed(family.sites[:number]):
        yield from reversed(site.linears)


def _with_site(family: Family, number: int, site: Site) -> Family:
    return replace(family, sites=(*family.sites[:number], site, *family.sites[number + 1 :]))
