"""Figures of benchmarks/serving.py from what its processes have measured, and the table of them. Pure arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from paired import exp_of_mean_difference

from mxrot.evaluation.perplexity import Perplexity, perplexity_of_means

BASELINE, PLUGIN = "bf16", "plugin W4A4"
"""Columns that others are compared with; the latter by those with a quantized head."""


def window_mean(prompt_logprobs: Sequence[Mapping[int, Any] | None], ids: Sequence[int]) -> float:
    """Mean negative log-likelihood, nats a token, of a window's tokens but the first, from vLLM's `prompt_logprobs`.

    These are one table a token, of tokens to objects with a `logprob`; the token itself is always in its table, and the
    first token has none. ValueError for another number of tables.
    """
    if len(prompt_logprobs) != len(ids):
        raise ValueError(f"{len(prompt_logprobs)} log-probabilities of {len(ids)} tokens")
    found = []
    for table, token in list(zip(prompt_logprobs, ids, strict=True))[1:]:
        assert table is not None
        found.append(-float(table[token].logprob))
    return math.fsum(found) / len(found)


def perplexity_of(means: Sequence[float], seq_len: int) -> Perplexity:
    """The record that `mxrot eval` makes of windows with these means."""
    return perplexity_of_means(torch.tensor(means, dtype=torch.float64), torch.empty(len(means), seq_len))


def equal_tokens(found: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> list[int]:
    """Of each text how many tokens are the same before the first that differs."""
    return [
        next((place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))
        for one, other in zip(found, expected, strict=True)
    ]


def late_kernels(log: str) -> list[str]:
    """Kernels that were compiled while requests waited, as vLLM's monitor of them says: by name, each once."""
    return list(dict.fromkeys(re.findall(r" during inference: ([^\s(]*[^\s(.])", log)))


def merged(found: Sequence[tuple[str, str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By way, what all its processes have measured; `error` and `errors` begin with the kind of process.

    When an engine was ready, and what computes it, is kept of the one that was timed.
    """
    ways: dict[str, dict[str, Any]] = {}
    kinds = {way: {kind for one, kind, _ in found if one == way} for way, *_ in found}
    for way, kind, own in found:
        whole = ways.setdefault(way, {})
        faults = dict(own.get("errors", {})) | ({"": own["error"]} if "error" in own else {})
        for name, fault in faults.items():
            whole.setdefault("errors", {})[f"{kind} {name}".strip()] = fault
        kept = {key: value for key, value in own.items() if key not in ("error", "errors", "is_done")}
        if kind != "speed" and "speed" in kinds[way]:
            kept = {key: value for key, value in kept.items() if key not in ("start_seconds", "kernel", "head")}
        if own.get("late_kernels"):
            kept["late_kernels"] = list(dict.fromkeys([*whole.get("late_kernels", []), *own["late_kernels"]]))
        whole |= kept
    return ways


def table(ways: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Rows of cells, the headings first: a row for each figure, a column for each way; speed-ups over bf16 in brackets.

    Of a way in which something failed, the first row says what.
    """
    rows = [["", *ways]]

    def add(name: str, cells: Mapping[str, str]) -> None:
        if any(cells.values()):
            rows.append([name, *(cells.get(way, "") for way in ways)])

    add("failed", {way: ", ".join(found["errors"]) for way, found in ways.items() if found.get("errors")})
    add("linears by", {way: found.get("kernel", "") for way, found in ways.items()})
    add("head by", {way: found.get("head", "") for way, found in ways.items()})
    add("compiled late", {way: " ".join(found.get("late_kernels", [])) for way, found in ways.items()})
    add("start, s", {way: f"{found['start_seconds']:.0f}" for way, found in ways.items() if "start_seconds" in found})
    add("perplexity", {way: _perplexity(way, ways) for way in ways})
    headed = [way for way in ways if way.startswith(f"{PLUGIN}, ")]
    add(f"perplexity over {PLUGIN}", {way: _ratio(way, ways, PLUGIN, 4) for way in headed})
    add("by mxrot eval", {way: _own_perplexity(found) for way, found in ways.items()})
    add("greedy tokens as bf16", {way: _equal(way, ways) for way in ways})
    for kind, name, unit in (
        ("decode", "{} requests, tokens/s", False),
        ("first_token", "first token of {}, ms", True),
        ("mixed", "mixed batch, tokens/s", False),
    ):
        for key in dict.fromkeys(key for found in ways.values() for key in found.get(kind, {})):
            add(name.format(key), {way: _timed(ways, way, kind, key, unit) for way in ways})
    return rows


def _perplexity(way: str, ways: Mapping[str, Mapping[str, Any]]) -> str:
    found = ways[way].get("nlls")
    if not found:
        return ""
    ppl, ratio = perplexity_of(found, 2).ppl, _ratio(way, ways, BASELINE, 3)
    return f"{ppl:.3f} ({ratio})" if ratio and way != BASELINE else f"{ppl:.3f}"


def _ratio(way: str, ways: Mapping[str, Mapping[str, Any]], base: str, digits: int) -> str:
    """The perplexity of a way over that of another one, on the same windows; empty without both."""
    found, other = (ways.get(name, {}).get("nlls") for name in (way, base))
    if not found or not other or len(found) != len(other):
        return ""
    ratio = exp_of_mean_difference(found, other)
    return f"{ratio.value:.{digits}f}" + ("" if ratio.error is None else f" +- {ratio.error:.{digits}f}")


def _own_perplexity(found: Mapping[str, Any]) -> str:
    """By mxrot itself; in brackets the engine's over it, on the same windows."""
    own, engine = found.get("eval_nlls"), found.get("nlls")
    if not own:
        return ""
    ppl = perplexity_of(own, 2).ppl
    if not engine or len(engine) != len(own):
        return f"{ppl:.3f}"
    ratio = exp_of_mean_difference(engine, own)
    error = "" if ratio.error is None else f" +- {ratio.error:.4f}"
    return f"{ppl:.3f} ({ratio.value:.4f}{error})"


def _equal(way: str, ways: Mapping[str, Mapping[str, Any]]) -> str:
    found, base = ways[way].get("greedy"), ways.get(BASELINE, {}).get("greedy")
    return "" if way == BASELINE or not found or not base else " ".join(map(str, equal_tokens(found, base)))


def _timed(ways: Mapping[str, Mapping[str, Any]], way: str, kind: str, key: str, is_time: bool) -> str:
    """Seconds as milliseconds, or tokens a second; and how many times as fast as bf16."""
    value, base = (ways.get(name, {}).get(kind, {}).get(key) for name in (way, BASELINE))
    if value is None:
        return ""
    shown = f"{1e3 * value:.1f}" if is_time else f"{value:.0f}"
    if way == BASELINE or not base:
        return shown
    return f"{shown} ({base / value if is_time else value / base:.2f})"


def text_of(rows: Sequence[Sequence[str]]) -> str:
    """The table in columns."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for first, *cells in rows:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)
