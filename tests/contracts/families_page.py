"""The table of docs/families.md, from the records: `python -m tests.contracts.families_page` writes it."""

from __future__ import annotations

from pathlib import Path

from tests.contracts.tiny_configs import config_of

from mxrot.layers import build_apart
from mxrot.models import FAMILIES, Family, find_family
from mxrot.recipe import load_recipe
from mxrot.suited import suited
from mxrot.surgery import permutable_linears
from mxrot.vllm.verdict import plan_for_vllm

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- families -->\n", "<!-- end -->\n"
HEAD = (
    "| family | sites | merged into its weights | vLLM as it comes | vLLM with mxrot | run on real weights |\n"
    "|---|---|---|---|---|---|\n"
)
RECIPES = ("rtn", "hadamard", "mxrot-vllm", "mxrot")
REAL = {"llama": "SmolLM2-135M", "gemma3": "Gemma 3 270M", "qwen2": "Qwen2.5-Coder-1.5B"}
"""What was quantized and measured with weights that are not random (docs/results.md)."""


def table() -> str:
    """One row for each family."""
    return HEAD + "".join(row(find_family(config_of(family), name)) for name, family in FAMILIES.items())


def row(family: Family) -> str:
    """The row of a family, with the sites of the experts of its tiny config."""
    sites = dict.fromkeys(site.group for index in range(len(family.kinds) or 2) for site in family.sites_of(index))
    cells = [family.name, ", ".join(sites), _merged(family), *_served(family), REAL.get(family.name, "")]
    return f"| {' | '.join(cells)} |\n".replace("|  |", "| |")


def _merged(family: Family) -> str:
    has_order = any(permutable_linears(family, index) for index in range(len(family.kinds) or 2))
    found = {"rotations": family.is_rotatable, "order in MLPs": has_order, "order in heads": family.names_values}
    return ", ".join(name for name, can_be in found.items() if can_be)


def _served(family: Family) -> tuple[str, str]:
    """The recipes whose checkpoints vLLM runs, by its code: without mxrot beside it, and with it."""
    config = config_of(family)
    reports = {
        name: plan_for_vllm(build_apart(config), family, suited(load_recipe(name), family, config)[0])
        for name in RECIPES
    }
    stock = [f"`{name}`" for name, report in reports.items() if not report.stock.stops]
    plugin = [f"`{name}`" for name, report in reports.items() if not report.plugin.stops]
    return ", ".join(stock) or "no", ", ".join(plugin) or "no"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
