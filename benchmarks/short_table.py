"""The table of the README: three models, four recipes of mxrot and three published methods, from result files.

    python benchmarks/short_table.py compare_untuned_nvidia-h200_2026-11-28.json ...

Files lie in benchmarks/results. Of a figure that several files have, the last file's counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import everywhere_tables
from everywhere_rows import geometric_mean, summaries

RESULTS = Path(__file__).parent / "results"
BASE = "duquant++-gptq"
PEERS = ("quarot", "mr-gptq", BASE)
OWN = ("mxrot-vllm", "mxrot", "mxrot-light", "mxrot-tuned")
MODELS = {"demo": "SmolLM2-135M", "gemma": "Gemma 3 270M", "qwen": "Qwen2.5-Coder-1.5B"}


def main() -> None:
    print(table([json.loads((RESULTS / name).read_text(encoding="utf-8")) for name in sys.argv[1:]]))


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a recipe: perplexity of the demo model on WikiText-2, then for each model KL times that of BASE, the
    geometric mean over the four texts of its file. A cell is empty where nothing was measured."""
    found: dict[str, dict[str, str]] = {}
    for result in results:
        for recipe, figures in read(result).items():
            found.setdefault(recipe, {}).update(figures)
    heads = ["recipe", f"{MODELS['demo']}: perplexity", *(f"{name}: KL" for name in MODELS.values())]
    lines = [[shown(recipe), *(found[recipe].get(key, "") for key in ("ppl", *MODELS))] for recipe in rows(found)]
    return everywhere_tables.piped([heads, *lines])


def rows(found: dict[str, dict[str, str]]) -> list[str]:
    """The recipes of the table, of which each must be in some file."""
    wanted = ["FP16", *PEERS, *OWN]
    if missing := [recipe for recipe in wanted if recipe not in found]:
        raise SystemExit(f"no result for {', '.join(missing)}")
    return wanted


def shown(recipe: str) -> str:
    """How the table names it."""
    return "as it was, FP16" if recipe == "FP16" else f"`{recipe}`"


def read(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The figures of one file, by recipe and column."""
    if result.get("kind") == "everywhere":
        return of_other_models(result)
    if "label" in result["rows"][0]:
        return {row["label"]: {"ppl": f"{row['means']['wikitext']:.2f}"} for row in result["rows"]}
    return of_demo(result)


def of_demo(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of a file of `mxrot compare`. KL stands for itself only over four texts."""
    measured = {row["recipe"]: row for row in result["rows"] if row["reason"] is None}
    base = measured[BASE]["kl_of_text"]
    found = {}
    for recipe, row in measured.items():
        wikitext = next(text for text in row["perplexity"] if text.startswith("wikitext"))
        found[recipe] = {"ppl": f"{row['perplexity'][wikitext]:.2f}"}
        if len(base) == 4 and row["kl_of_text"]:
            ratio = geometric_mean([row["kl_of_text"][text] / base[text] for text in base])
            found[recipe]["demo"] = "1" if recipe == BASE else f"{ratio:.2f}"
    return found


def of_other_models(result: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Of a file of benchmarks/everywhere.py."""
    names = everywhere_tables.models(result["rows"])
    found: dict[str, dict[str, str]] = {BASE: dict.fromkeys(names, "1")}
    for one in summaries(result["rows"], BASE):
        found[one["recipe"]] = {name: f"{mean['geometric_mean']:.2f}" for name, mean in one["of_model"].items()}
    return found


if __name__ == "__main__":
    main()
