"""The recipe for a server: the most accurate of a few whose checkpoint it can run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
    """A recipe that stock vLLM can run."""

    recipe: str
    lines: tuple[str, ...]
    """The reasons for this recipe, and against those before it."""


def recipe_for_vllm(model: str, config_path: Path) -> Servable:
    """The first of FOR_VLLM that stock vLLM can run for this model. No weight is read.

    ConfigError if there is none, with the obstacles of the last one. FamilyError as in `make_plan`.
    """
    config = read_config(config_path)
    family = find_family(config, model)
    skeleton = build_apart(config)
    passed: list[str] = []
    reason = ""
    for name in FOR_VLLM:
        recipe, _ = suited(load_recipe(name), family, config)
        serving = plan_for_vllm(skeleton, family, recipe).stock
        if not serving.stops:
            return Servable(name, (f"for vLLM: recipe {name}, {_runs(serving)}", *passed))
        reason = serving.stops[0]
        passed.append(f"  not {name}: {reason}")
    raise ConfigError(f"--for vllm: stock vLLM {VERSION} runs {model} with none of {', '.join(FOR_VLLM)}: {reason}")


def _runs(serving: Serving) -> str:
    how = "what `mxrot export --to vllm -o` writes of it" if serving.needs_export else "the folder as it is"
    return f"because vLLM {VERSION} runs {how} (tensor parallel {', '.join(map(str, serving.tensor_parallel))})"
