"""The recipe for a server: the most accurate of a few whose checkpoint it can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mxrot.errors import ConfigError
from mxrot.layers import build_apart
from mxrot.models import find_family, read_config
from mxrot.recipe import load_recipe
from mxrot.suited import suited
from mxrot.vllm.devices import VERSION
from mxrot.vllm.verdict import Serving, plan_for_vllm

FOR_VLLM = ("mxrot", "mxrot-vllm", "w4a16", "rtn")
"""From the most to the least accurate."""


@dataclass(frozen=True)
class Servable:
    """A recipe that vLLM can run."""

    recipe: str
    lines: tuple[str, ...]
    """The reasons for this recipe, and against those before it."""


def recipe_for_vllm(model: str, config_path: Path, head: dict[str, Any] | None = None) -> Servable:
    """The first of FOR_VLLM that stock vLLM can run for this model. No weight is read.

    `head` holds changes of the table `head` of each recipe. A quantized head needs mxrot installed beside vLLM, so the
    recipe is then the first that runs there. ConfigError if there is none, with the obstacles of the last one.
    FamilyError as in `make_plan`.
    """
    config = read_config(config_path)
    family = find_family(config, model)
    skeleton = build_apart(config)
    passed: list[str] = []
    reason = runner = ""
    for name in FOR_VLLM:
        recipe, _ = suited(load_recipe(name).changed(head or {}), family, config)
        report = plan_for_vllm(skeleton, family, recipe)
        serving, runner = report.stock, f"vLLM {VERSION}"
        if recipe.head is not None:
            serving, runner = report.plugin, f"vLLM {VERSION} with mxrot installed"
        if not serving.stops:
            return Servable(name, (f"for vLLM: recipe {name}, because {runner} {_runs(serving)}", *passed))
        reason = serving.stops[0]
        passed.append(f"  not {name}: {reason}")
    raise ConfigError(f"--for vllm: {runner} runs {model} with none of {', '.join(FOR_VLLM)}: {reason}")


def _runs(serving: Serving) -> str:
    how = "what `mxrot export --to vllm -o` writes of it" if serving.needs_export else "the folder as it is"
    return f"runs {how} (tensor parallel {', '.join(map(str, serving.tensor_parallel))})"
