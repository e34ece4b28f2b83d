"""Measured figures in a model card, between two marker lines that Markdown does not show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from mxrot.checkpoint.files import write_bytes, write_json
from mxrot.checkpoint.markdown import cell
from mxrot.checkpoint.metric import Metric
from mxrot.errors import CheckpointError

ACCURACY = ("<!-- accuracy, written by mxrot report --card -->", "<!-- end of accuracy -->")
"""The marker lines before and after the figures."""


def write_metrics(folder: Path, metrics: Sequence[Metric]) -> None:
    """Replace the measured figures in the card of a checkpoint, and write the card's new SHA-256 into run.json.
    CheckpointError if the card has no place for them."""
    path = folder / "README.md"
    card = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, start, rest = card.partition(ACCURACY[0])
    _, end, after = rest.partition(ACCURACY[1])
    if not start or not end:
        raise CheckpointError(f"{path}: has no lines {ACCURACY[0]} and {ACCURACY[1]} to put figures between")
    data = f"{before}{start}\n{metrics_table(metrics)}{end}{after}".encode()
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run["files"][path.name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    write_bytes(path, data)
    write_json(folder / "run.json", run)


def metrics_table(metrics: Sequence[Metric]) -> str:
    """Figures as a Markdown table."""
    rows = [("", "measure", "original", "quantized", "difference", "on"), ("---",) * 6]
    rows += [metric.cells for metric in metrics]
    return "".join("| " + " | ".join(map(cell, row)) + " |\n" for row in rows)
