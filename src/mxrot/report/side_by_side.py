"""The table of a comparison, for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mxrot.report.rows import ComparedRow, Mean

WIDTH = 100
"""The most columns of a table."""
_AGREES = "top-1\n%"


def side_by_side(rows: Sequence[ComparedRow], title: str, columns: int = WIDTH) -> list[Table]:
    """The tables of a comparison, for a terminal with this many columns.

    It is one table if that fits. Otherwise the perplexities of the texts have tables of their own, and so has the
    agreement if necessary.
    """
    width = min(columns, WIDTH)
    texts = next((row.texts for row in rows if row.runs), [])
    whole = _table(rows, title, texts)
    if _width(whole) <= width:
        return [whole]
    tables, begin = [_table(rows, title, [])], 0
    if _width(tables[0]) > width:
        tables = [_table(rows, title, [], agrees=False), _of_agreement(rows)]
    for end in range(1, len(texts) + 1):
        if end == len(texts) or _width(_of_texts(rows, texts[begin : end + 1])) > width:
            tables.append(_of_texts(rows, texts[begin:end]))
            begin = end
    return tables


def remarks(rows: Sequence[ComparedRow]) -> list[str]:
    """Lines: the meaning of figures, what was not run, and the reasons for missing figures."""
    ran = [row for row in rows if row.runs and row.original is not None]
    lines = []
    if len(next((row.texts for row in rows if row.runs), [])) > 1:
        lines.append("ratio: the geometric mean over texts; KL and top-1: the mean over texts")
    apart = next((run for row in ran for run in row.runs if run.divergence), None)
    if apart is not None:
        text, found = next(iter(apart.divergence.items()))
        few = f", on the first {found.windows} windows" if found.windows < apart.perplexity[text].windows else ""
        lines.append(f"KL: KL(original || quantized), nats a token{few}")
        lines.append("top-1: positions where both expect the same token most")
    if any(row.size.transform_bits_per_weight for row in ran):
        lines.append("bits a weight: codes and scales, + transforms")
    if any(row.checkpoint is not None and row.quantize_seconds is not None for row in ran):
        lines.append("seconds and GB of a checkpoint: from its run.json, on the device that it was made on")
    caches = [row.cache for row in ran if row.cache]
    if caches:
        lines.append(
            f"x of 16 bit: bytes of a cache with {caches[0]['tokens']:,} tokens, measured, over those in 16 bits"
        )
    seeds = max((len(row.runs) for row in ran), default=0)
    if seeds > 1:
        lines.append(f"+- one standard error over {seeds} seeds")
    alike = [row for row in ran if row.is_alike]
    if alike:
        first = " and ".join(str(run.seed) for run in alike[0].runs)
        named = ", ".join(row.recipe for row in alike)
        said = f"seeds {first} gave the same figures to the last bit, and no others were run: {named}"
        lines += textwrap.wrap(said, WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return lines + [f"{row.recipe} has no figures: {row.reason}" for row in rows if row.reason is not None]


def csv_text(rows: Sequence[ComparedRow]) -> str:
    """One line per row, with every digit. Missing values are empty."""
    lines = [_flat(row.as_table()) for row in rows]
    columns = dict.fromkeys(column for line in sorted(lines, key=len, reverse=True) for column in line)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """The columns of a line of CSV: figures, with those of each text under its name, but no recipes or single runs."""
    line: dict[str, Any] = {}
    for key, value in table.items():
        if key in ("runs", "recipe_toml", "tasks"):
            continue
        if isinstance(value, dict):
            line |= {f"{key} {name}": figure for name, figure in value.items()}
        else:
            line[key] = " ".join(map(str, value)) if isinstance(value, list) else value
    for name, score in table.get("tasks", {}).items():
        line |= {f"{metric} {name}": score[metric] for metric in ("acc", "acc_norm") if score[metric] is not None}
    return line


def _table(rows: Sequence[ComparedRow], title: str, texts: Sequence[str], agrees: bool = True) -> Table:
    table = _empty(
        title,
        [*(f"perplexity\n{text}" for text in texts), "ratio", "KL", *([_AGREES] if agrees else []), "bits a\nweight"],
    )
    has_cache = any(row.cache for row in rows)
    for heading in ("bits a\nKV", *(("x of\n16 bit",) if has_cache else ()), "sec-\nonds", "peak\nGB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.reason is not None:
            table.add_row(row.recipe, *("-" for _ in (*texts, "ratio")))
            continue
        run, seconds, peak = row.runs[0], row.quantize_seconds, row.peak_bytes
        transforms = run.size.transform_bits_per_weight
        table.add_row(
            row.recipe,
            *(perplexity(row.mean_perplexity(text)) for text in texts),
            "1" if row.original is None else _shown(row.ratio(), 3 if row.ratio().error else 4),
            _kl(row.kl()),
            *([_percent(row.agreement())] if agrees else []),
            _plain(run.bits_per_weight) + (f" +{_short(transforms, 2)}" if transforms else ""),
            _plain(run.bits_per_kv_element),
            *([f"{row.cache['ratio']:.3f}" if row.cache else ""] if has_cache else []),
            "" if seconds is None else f"{seconds:.{1 if seconds < 1000 else 0}f}",
            "" if peak is None else f"{peak / 1e9:.2f}",
        )
    return table


def _of_agreement(rows: Sequence[ComparedRow]) -> Table:
    table = _empty("Top-1", [_AGREES])
    for row in rows:
        if row.reason is None:
            table.add_row(row.recipe, _percent(row.agreement()))
    return table


def _of_texts(rows: Sequence[ComparedRow], texts: Sequence[str]) -> Table:
    table = _empty("Perplexity on each text", texts)
    for row in rows:
        if row.reason is None:
            table.add_row(row.recipe, *(perplexity(row.mean_perplexity(text)) for text in texts))
    return table


def _empty(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.padding = (0, 0, 0, 1)
    table.add_column("recipe", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _width(table: Table) -> int:
    console = Console(width=1000, markup=False, emoji=False)
    return console.measure(table).maximum


def perplexity(mean: Mean) -> str:
    """The perplexity with two decimals. Fewer next to an error of a hundred or more, and for a broken model."""
    if mean.value >= 1e7:
        return f"{mean.value:.1e}"
    return _shown(mean, 1 if mean.error and mean.value >= 100 else 2)


def _kl(mean: Mean | None) -> str:
    """The KL, with one more decimal if it is small and there is room."""
    return "" if mean is None else _shown(mean, 4 if not mean.error or mean.value < 0.1 else 3)


def _percent(mean: Mean | None) -> str:
    """The percentage with one decimal."""
    return "" if mean is None else _shown(Mean(100 * mean.value, mean.error and 100 * mean.error), 1)


def _shown(mean: Mean, digits: int) -> str:
    """A figure, with its error if there is one other than 0."""
    digits = digits if abs(mean.value) < 1000 else 0
    shown = f"{mean.value:,.{digits}f}"
    return shown if not mean.error else f"{shown} +-{_short(mean.error, digits)}"


def _short(value: float, digits: int) -> str:
    """The number without the zero before the point."""
    shown = f"{value:.{digits}f}"
    return shown[1:] if shown.startswith("0.") else shown


def _plain(bits: float) -> str:
    return f"{bits:.0f}" if bits == round(bits) else f"{bits:.2f}"
