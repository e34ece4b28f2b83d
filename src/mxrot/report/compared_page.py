"""The page of a comparison. `elements` describes what it loads and runs.

Text from a checkpoint or a command line is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mxrot.report.drawing import Picture
from mxrot.report.elements import Cell, Drawn, Section, command_words, details, drawn_for_page, figure, page_of, table
from mxrot.report.far import FAR
from mxrot.report.rows import ComparedRow, Mean
from mxrot.report.side_by_side import remarks
from mxrot.report.texts import text_lines

_CAPTIONS = {
    "ratio": "What a bit buys: lower and further left is better.",
    "kl": "Lower is better.",
    "agreement": "Higher is better.",
    "weight_errors": "What rounding does to the weights: relative error in the Frobenius norm, mean over linears.",
    "output_errors": "What all of it does to the outputs, on the calibration text; without one there is no line.",
}


@dataclass(frozen=True)
class Comparison:
    """The contents of a page of a comparison."""

    model: str
    rows: Sequence[ComparedRow]
    texts: Sequence[dict[str, Any]]
    """The windows that were read of each text (`Windows.as_table`)."""
    command: str
    device: str
    versions: dict[str, str]
    made: str
    """The time, in UTC."""


def compared_page(found: Comparison, pictures: dict[str, Picture]) -> str:
    """The HTML; `pictures` are those of `compared_plots.compared_pictures`."""
    drawn = drawn_for_page(pictures)
    ran = [row for row in found.rows if row.reason is None]
    heading = (
        f"<h1>{escape(found.model)}</h1>\n"
        f'<p class="soft">Compared with mxrot: {len(ran) - 1} beside the original. {escape(found.made)}, '
        f"{escape(found.device)}.</p>"
    )
    sections = [
        Section("Side by side", _side_by_side(found.rows)),
        Section("Pictures", _pictures(drawn)),
        Section("Recipes", _recipes(found.rows)),
        Section("How it was measured", _measured(found)),
    ]
    return page_of(f"{found.model}, compared", heading, sections)


def _side_by_side(rows: Sequence[ComparedRow]) -> str:
    texts = next((row.texts for row in rows if row.runs), [])
    headings = [
        "recipe",
        *(f"perplexity, {text}" for text in texts),
        "ratio",
        "KL",
        "top-1 %",
        "bits, with transforms",
        "bits a KV",
    ]
    best = min((row.ratio().value for row in rows if row.reason is None and row.original is not None), default=1.0)
    lines = [_line(row, texts, 1 + FAR * (best - 1)) for row in rows]
    said = "".join(f"<p>{escape(line)}</p>" for line in remarks(rows))
    return (
        f'{table([*headings, "seconds", "GB"], lines, is_sortable=True)}\n{said}\n<p><span class="far">Far off</span> '
        f"is a ratio whose distance from 1 is more than {FAR:g} times that of the best.</p>"
    )


def _line(row: ComparedRow, texts: Sequence[str], far: float) -> list[str | Cell]:
    name = escape(row.recipe) + (f"<small>{escape(row.checkpoint)}</small>" if row.checkpoint else "")
    if row.reason is not None:
        return [name, *("" for _ in range(len(texts) + 7))]
    run, ratio, agreement, peak = row.runs[0], row.ratio(), row.agreement(), row.peak_bytes
    share = None if agreement is None else Mean(100 * agreement.value, agreement.error and 100 * agreement.error)
    return [
        name,
        *(_mean(row.mean_perplexity(text), 3) for text in texts),
        _mean(ratio, 4, row.original is not None and ratio.value > max(far, 1.0)),
        _mean(row.kl(), 4),
        _mean(share, 2),
        _mean(Mean(run.bits_per_weight + (run.size.transform_bits_per_weight or 0.0), None), 3),
        _mean(Mean(run.bits_per_kv_element, None), 2),
        _mean(None if row.quantize_seconds is None else Mean(row.quantize_seconds, None), 1),
        _mean(None if peak is None else Mean(peak / 1e9, None), 2),
    ]


def _mean(mean: Mean | None, digits: int, is_far: bool = False) -> Cell:
    if mean is None:
        return Cell("")
    error = f"<small>± {mean.error:.{digits}f}</small>" if mean.error else ""
    shown = f"{mean.value:,.{digits}f}" if mean.value < 1e7 else f"{mean.value:.1e}"
    return Cell(shown + error, mean.value, is_far)


def _pictures(drawn: Drawn) -> str:
    cards = [f'<div class="card">{figure(each, _CAPTIONS.get(name, ""))}</div>' for name, each in drawn.items()]
    return f'<div class="pairs">{"".join(cards)}</div>' if cards else ""


def _recipes(rows: Sequence[ComparedRow]) -> str:
    return "".join(
        details(row.recipe, f"<pre>{escape(row.recipe_toml)}</pre>") for row in rows if row.recipe_toml is not None
    )


def _measured(found: Comparison) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in text_lines(found.texts))
    facts = [(str(text["name"]), f"SHA-256 {text['sha256']}") for text in found.texts if text.get("sha256")]
    facts += [
        ("device", found.device),
        ("versions", ", ".join(f"{name} {each}" for name, each in found.versions.items())),
    ]
    rows = [[escape(name), escape(value)] for name, value in facts]
    return f"{lines}<pre>{command_words(found.command)}</pre>\n{table(('', ''), rows, is_text=True)}"
