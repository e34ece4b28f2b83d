"""The results of `mxrot eval --json` as the rows of one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mxrot.checkpoint.metric import Metric
from mxrot.errors import ConfigError, DataError

_TASK_MEASURES = {"acc": "stderr", "acc_norm": "acc_norm_stderr"}
"""The measures of a task, and their standard errors."""


def read_results(path: Path) -> dict[str, Any]:
    """The table in a file of `mxrot eval --json`. DataError if it is not one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(table, dict) or not {"perplexity", "tasks"} & table.keys():
        raise DataError(f"{path}: not what `mxrot eval --json` writes: no perplexity and no tasks")
    try:
        metrics_of(table, None)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not what `mxrot eval --json` writes: {type(error).__name__} {error}") from error
    return table


def metrics_of(results: dict[str, Any], baseline: dict[str, Any] | None) -> list[Metric]:
    """The metrics of a model. `baseline` holds those of the original.

    ConfigError if the two were measured on different windows or questions.
    """
    baseline = baseline or {}
    found = []
    for name, score in (results.get("perplexity") or {}).items():
        apart = (results.get("divergence") or {}).get(name)
        found.append(_perplexity(name, score, apart, (baseline.get("perplexity") or {}).get(name)))
        if apart is not None:
            found += _divergence(name, apart)
    for name, score in (results.get("tasks") or {}).items():
        found += _task(name, score, (baseline.get("tasks") or {}).get(name))
    return found


def _perplexity(
    name: str, score: dict[str, Any], apart: dict[str, Any] | None, original: dict[str, Any] | None
) -> Metric:
    counted = f"{int(score['windows'])} x {int(score['seq_len'])} tokens"
    if apart is not None:
        expected, error = float(apart["original_ppl"]), float(apart["ppl_error"])
        return Metric(name, "perplexity", float(score["ppl"]), None, expected, error, counted)
    if original is None:
        return Metric(name, "perplexity", float(score["ppl"]), counted=counted)
    _check_same(name, score, original, ("windows", "seq_len", "tokens"))
    return Metric(name, "perplexity", float(score["ppl"]), None, float(original["ppl"]), None, counted)


def _divergence(name: str, apart: dict[str, Any]) -> list[Metric]:
    kl, agreement = "KL from the original, nats a token", "same top token as the original"
    return [
        Metric(name, kl, float(apart["kl"]), float(apart["kl_error"]), digits=4),
        Metric(name, agreement, float(apart["agreement"]), float(apart["agreement_error"]), is_share=True),
    ]


def _task(name: str, score: dict[str, Any], original: dict[str, Any] | None) -> list[Metric]:
    if original is not None:
        _check_same(name, score, original, ("n", "sha256"))
    found = []
    for measure, error_key in _TASK_MEASURES.items():
        if score.get(measure) is None:
            continue
        error = score.get(error_key)
        expected = None if original is None else original.get(measure)
        found.append(
            Metric(
                name,
                measure,
                float(score[measure]),
                None if error is None else float(error),
                None if expected is None else float(expected),
                counted=f"{int(score['n'])} questions" if score.get("n") is not None else "",
                is_share=True,
            )
        )
    return found


def _check_same(name: str, score: dict[str, Any], original: dict[str, Any], keys: tuple[str, ...]) -> None:
    for key in keys:
        if score.get(key) != original.get(key):
            raise ConfigError(
                f"{name}: measured on {score.get(key)} {key} here and on {original.get(key)} for the original; "
                "measure both with the same options"
            )
