"""Rows of benchmarks/everywhere.py: what its measurements say.

A row is one recipe on one model after one calibration, with figures for each text. The mean over models and texts of
ratios of KL is geometric: a recipe that halves one and doubles another has gained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paired import (
    Figure,
    apart,
    error_of_geometric_mean,
    exp_of_mean_difference,
    geometric_mean,
    mean,
    mean_over_seeds,
    ratio,
)

from mxrot.evaluation import standard_error

Row = dict[str, Any]
Measures = dict[str, list[float]]
"""By name, one value for each window: what one seed has given on a text."""


def row_of(labels: dict[str, str], runs: dict[int, Row], base: dict[int, Row]) -> Row:
    """One row, from what each seed has given; ratios are to the base on the same model after the same calibration."""
    seconds = [run["seconds"] for run in runs.values()]
    peaks = [run["peak_gpu_bytes"] for run in runs.values() if run["peak_gpu_bytes"]]
    texts = next(iter(runs.values()))["texts"]
    return {
        **labels,
        "seeds": sorted(runs),
        "seconds": sum(seconds) / len(seconds),
        "peak_gpu_bytes": max(peaks, default=None),
        "texts": {
            text: figures(
                {seed: run["texts"][text] for seed, run in sorted(runs.items())},
                {seed: run["texts"][text] for seed, run in sorted(base.items())},
            )
            for text in texts
        },
    }


def figures(seeds: dict[int, Measures], base: dict[int, Measures]) -> Row:
    """Of one text: each measure a mean over seeds and windows, errors over windows, at the end of each window KL
    and what `apart` says of it beside the base."""
    kl, agreement, nll, original = (
        mean_over_seeds([seed[measure] for seed in seeds.values()])
        for measure in ("kl", "agreement", "nll", "original_nll")
    )
    worse = exp_of_mean_difference(nll, original)
    short: Row = {"kl_by_window": rounded(kl)}
    found: Row = {
        **told("kl", mean(kl)),
        "perplexity": math.exp(sum(nll) / len(nll)),
        "original_perplexity": math.exp(sum(original) / len(original)),
        **told("perplexity_ratio", worse),
        **told("agreement", mean(agreement)),
        "windows": len(kl),
    }
    if base:
        whole = mean_over_seeds([seed["kl"] for seed in base.values()])
        pairs = {seed: ratio(values["kl"], base.get(seed, {"kl": whole})["kl"]).value for seed, values in seeds.items()}
        found |= {**told("kl_ratio", ratio(kl, whole)), "kl_ratio_of_seed": list(pairs.values())}
        if found["kl_ratio"]:
            short["apart_by_window"] = rounded(apart(kl, whole))
    return found | short


def rounded(values: Sequence[float]) -> list[float]:
    """To the digits that a float32 has."""
    return [float(f"{value:.7g}") for value in values]


def told(name: str, figure: Figure) -> Row:
    """As JSON has it, which has no NaN."""
    return {name: figure.value if math.isfinite(figure.value) else None, f"{name}_error": figure.error}


def summaries(rows: Sequence[Row], base: str) -> list[Row]:
    """Of each recipe but the base, after each calibration and after all of them, its mean ratio and the largest."""
    measured = [row for row in rows if "error" not in row and row["recipe"] != base]
    calibrations = list(dict.fromkeys(row["calibration"] for row in measured))
    found = []
    for chosen in [[one] for one in calibrations] + ([calibrations] if len(calibrations) > 1 else []):
        for recipe in dict.fromkeys(row["recipe"] for row in measured):
            mine = [row for row in measured if row["recipe"] == recipe and row["calibration"] in chosen]
            if mine:
                found.append({"calibration": " and ".join(chosen), "recipe": recipe} | summary(mine))
    return found


def summary(rows: Sequence[Row]) -> Row:
    """The geometric mean over all models, calibrations and texts of these rows, of each model's, and the largest."""
    cases = [
        {**{key: row[key] for key in ("model", "calibration")}, "text": text, **one}
        for row in rows
        for text, one in row["texts"].items()
        if one.get("kl_ratio") is not None
    ]
    if not cases:
        return {"cases": 0}
    names = list(dict.fromkeys(case["model"] for case in cases))
    of_seeds = zip(*(case["kl_ratio_of_seed"] for case in cases), strict=False)
    most = max(cases, key=lambda case: float(case["kl_ratio"]))
    return {
        "cases": len(cases),
        **told("geometric_mean", mean_ratio(cases)),
        "error_over_seeds": standard_error([geometric_mean(ratios) for ratios in of_seeds]),
        "of_model": {
            name: told("geometric_mean", mean_ratio([case for case in cases if case["model"] == name]))
            for name in names
        },
        "largest": {key: most[key] for key in ("model", "calibration", "text", "kl_ratio", "kl_ratio_error")},
        "below_one": sum(case["kl_ratio"] < 1 for case in cases),
    }


def mean_ratio(cases: Sequence[Row]) -> Figure:
    """The geometric mean of their ratios of KL; NaN if one is not positive."""
    value = geometric_mean([case["kl_ratio"] for case in cases])
    if math.isnan(value):
        return Figure(value, None)
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for case in cases:
        groups.setdefault((case["model"], case["text"]), []).append(case["apart_by_window"])
    return Figure(value, error_of_geometric_mean(value, list(groups.values())))
