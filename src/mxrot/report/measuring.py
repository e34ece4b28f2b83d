"""Measures a checkpoint for a report: the work of `mxrot report`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import Tensor
from transformers import PreTrainedModel

from mxrot import api
from mxrot.checkpoint import is_checkpoint, read_run
from mxrot.checkpoint.metric import Metric
from mxrot.documents import read_text
from mxrot.environment import versions
from mxrot.errors import CheckpointError, ConfigError, DataError
from mxrot.evaluation import ActivationView, activation_views, weight_exponents, weight_values
from mxrot.layers.cache_size import CacheSize, cache_of
from mxrot.models import Family, find_family, find_model, read_config
from mxrot.nearest import brief, did_you_mean, listed
from mxrot.progress import Progress, silent
from mxrot.ranks import current
from mxrot.recipe import Recipe
from mxrot.report import Contents, metrics_of
from mxrot.report.passages import shown_passage
from mxrot.rules import Rules
from mxrot.scheme import Scheme
from mxrot.shell import command
from mxrot.text import Windows, load_texts

TOKENS_LOOKED_AT = 2048
"""The number of tokens for the activations, or one window if that has more."""

MOST_SITES = 12
"""The most sites with pictures of their own. Each takes up to 0.8 MB of a page that should stay below 10 MB."""


@dataclass(frozen=True)
class Request:
    """The contents that a report should have."""

    model: str
    """The checkpoint: a folder or a hub id."""
    against: str | None = None
    """The original."""
    texts: Sequence[str] = ("demo",)
    windows: int = 8
    seq_len: int = 512
    sites: Sequence[str] = ()
    """Patterns of full names of linears. If empty, the site with the largest outliers is taken for each kind."""
    results: dict[str, Any] | None = None
    """A table of `mxrot eval --json` that is shown instead of measuring."""
    baseline: dict[str, Any] | None = None
    """The same table of the original."""
    surface: bool = False
    """True to draw |x| as surfaces too."""
    folder: Path = Path()
    """The folder of the page. Links start there."""
    verify: bool | None = None
    """Whether to check the SHA-256 of the checkpoint's files first. None for the default by their size."""


def gather(request: Request, device: str | None = None, progress: Progress = silent) -> Contents | None:
    """Measure the checkpoint and collect the contents. ConfigError and CheckpointError, where possible before any
    weight is read.

    Joined processes (mxrot.ranks) share the measurements. Only the first one collects the activations, and the others
    return None.
    """
    world = current()
    if request.baseline is not None and request.results is None:
        raise ConfigError("the figures of the original need those of the checkpoint beside them")
    metrics = None if request.results is None else metrics_of(request.results, request.baseline)
    with world.first_goes_ahead():
        folder = find_model(request.model)
        run, recipe = read_records(folder)
        config = read_config(folder)
        family = find_family(config, request.model)
        chosen = sites_that_match(Rules(recipe, family, config.get_text_config().num_hidden_layers), request.sites)
        texts = load_texts(list(request.texts), "evaluation")
    if world.rank and metrics is not None:
        return None
    count = max(1, min(request.windows, TOKENS_LOOKED_AT // request.seq_len))
    looked_at = api.read_texts(folder, texts[0], windows=count, seq_len=request.seq_len)[0]
    windows = looked_at.ids
    read = None
    if metrics is None:
        read = api.read_texts(folder, texts, windows=request.windows, seq_len=request.seq_len, progress=progress)
    progress(0, 1, f"opening {request.model}")
    model, _ = api.open_model(folder, device, request.verify)
    original = None if request.against is None else api.open_model(request.against, device)[0]
    tokenizer = api.load_tokenizer(folder)
    if metrics is None:
        assert read is not None
        metrics = _measured(read, model, original, tokenizer, progress)
    if world.rank:
        return None
    before, after = _views(recipe, family, windows, model, original, progress)
    seen = {name: view for name, view in before.items() if name in after}
    for name in chosen:
        if name not in seen:
            raise DataError(f"{name}: no token of the text is sent to this expert; take a longer text (--windows)")
    progress(0, 1, "the worst passage, and how weights are spread")
    passage = None if original is None else shown_passage(model, original, tokenizer, looked_at)
    return Contents(
        run=run,
        recipe=recipe,
        family=family,
        metrics=metrics,
        measured=_how_measured(request),
        before=before,
        before_is_original=original is not None,
        after=after,
        chosen=chosen or sites_that_stick_out(family, seen),
        looked_at=f"The text is {looked_at.text.name}, {len(windows)} x {request.seq_len} tokens."
        + ("" if request.sites else " Of each kind of site, the one is shown whose blocks have the largest maxima."),
        exponents=weight_exponents(model, family),
        cache=CacheSize.of(config, family, cache_of(model)),
        commands=_commands(request, run),
        versions=versions(),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        links=_links(run, folder, request),
        tokens=[tokenizer.decode([number]) for number in windows.flatten().tolist()],
        weights=weight_values(model, family),
        original_weights={} if original is None else weight_values(original, family),
        passage=passage,
        has_surfaces=request.surface,
    )


def _links(run: dict[str, Any], folder: Path, request: Request) -> list[tuple[str, str]]:
    """Links to the original on the hub, if known, and to the checkpoint's files, relative to the page's folder."""
    found = []
    if run.get("revision"):
        address = f"https://huggingface.co/{run['model']}/tree/{run['revision']}"
        found.append(("the original on the hub", address))
    if Path(request.model).is_dir():
        near = os.path.relpath(folder.resolve(), request.folder.resolve())
        found += [(name, quote(f"{near}/{name}")) for name in ("README.md", "recipe.toml", "run.json")]
    return found


def read_records(folder: Path) -> tuple[dict[str, Any], Recipe]:
    """run.json and the recipe of a checkpoint. CheckpointError if mxrot has not written it."""
    if not is_checkpoint(folder):
        raise CheckpointError(f"{folder}: not a checkpoint written by mxrot")
    run = read_run(folder)
    return run, Recipe.from_toml(read_text(folder / "recipe.toml"), "recipe.toml")


def _measured(
    read: list[Windows], model: PreTrainedModel, original: PreTrainedModel | None, tokenizer: Any, progress: Progress
) -> list[Metric]:
    if original is None:
        scores = api.evaluate(model, read, tokenizer=tokenizer, progress=progress)
        return metrics_of({"perplexity": {name: vars(score) for name, score in scores.items()}}, None)
    apart = api.diverge(model, original, read, tokenizer=tokenizer, progress=progress)
    table = {
        "perplexity": {name: vars(found.perplexity) for name, found in apart.items()},
        "divergence": {name: vars(found) for name, found in apart.items()},
    }
    return metrics_of(table, None)


def _views(
    recipe: Recipe,
    family: Family,
    windows: Tensor,
    model: PreTrainedModel,
    original: PreTrainedModel | None,
    progress: Progress,
) -> tuple[dict[str, ActivationView], dict[str, ActivationView]]:
    """The inputs of every site before the transform and after it."""
    scheme = Scheme.of(recipe, family, model)
    before = activation_views(original or model, family, windows, scheme, progress=progress)
    return before, activation_views(model, family, windows, scheme, transformed=True, progress=progress)


def sites_that_match(rules: Rules, patterns: Sequence[str]) -> list[str]:
    """Sites, by the full names of their first linears, that match a pattern on that name or its end.

    ConfigError if a pattern matches none, or if there are more than MOST_SITES.
    """
    family = rules.family
    names = [
        f"{family.block_prefix(index)}.{site.linears[0]}"
        for index in range(rules.blocks)
        for site in rules.active_sites(index)
    ]
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in names):
            ends = [name.removeprefix(f"{family.blocks}.") for name in names]
            kinds = dict.fromkeys(end.partition(".")[2] for end in ends)
            near = did_you_mean(pattern, ends if pattern[:1].isdigit() else kinds) or did_you_mean(pattern, ends)
            raise ConfigError(
                f"no site matches {brief(pattern)};{near} sites go by their first linear, such as {names[0]}; their "
                f"ends are {listed(pattern, kinds, 8)}"
            )
    found = [name for name in names if any(_matches(name, pattern) for pattern in patterns)]
    if len(found) > MOST_SITES:
        raise ConfigError(f"{len(found)} sites match {', '.join(patterns)}; a page has room for {MOST_SITES}")
    return found


def sites_that_stick_out(family: Family, views: dict[str, ActivationView]) -> list[str]:
    """For each kind of site, the one whose block maxima are largest relative to their other values."""
    found: dict[str, str] = {}
    for name, view in views.items():
        kind = family.group_of(name)[1]
        if kind not in found or view.crest > views[found[kind]].crest:
            found[kind] = name
    return list(found.values())


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def _how_measured(request: Request) -> str:
    if request.results is not None:
        return "As `mxrot eval` has measured it."
    if request.against is None:
        return "Measured for this report. Without the original there is nothing to compare it with."
    return (
        "Measured for this report, on the same windows for both; a difference is given with its standard error over "
        "windows."
    )


def _calibration_texts(data: dict[str, Any]) -> list[str]:
    """The names of the texts. With several, their weights too."""
    texts = data.get("texts") or [{"name": data.get("text")}]
    if len(texts) < 2:
        return [str(text.get("name")) for text in texts]
    return [f"{text.get('name')}@{text.get('weight', 1.0):g}" for text in texts]


def _commands(request: Request, run: dict[str, Any]) -> list[tuple[str, str]]:
    """The command that made the checkpoint, as far as it is recorded, and the command that makes this report."""
    revision = f"@{run['revision']}" if run.get("revision") else ""
    again = ["mxrot", "quantize", run["model"] + revision, "--recipe", "recipe.toml", "--seed", str(run["seed"])]
    if data := run.get("data"):
        again += [word for text in _calibration_texts(data) for word in ("--calib", text)]
        asked = {"--samples": data.get("windows_asked"), "--seq-len": data.get("seq_len")}
        again += [word for option, value in asked.items() for word in (option, str(value))]
    report = ["mxrot", "report", request.model]
    report += [] if request.against is None else ["--against", request.against]
    report += [word for text in request.texts for word in ("--text", text)]
    report += ["--windows", str(request.windows), "--seq-len", str(request.seq_len)]
    report += [word for site in request.sites for word in ("--site", site)]
    report += ["--surface"] if request.surface else []
    return [
        ("The checkpoint; the original and the text go by the names that were on record:", command(*again)),
        ("This report:", command(*report)),
    ]
