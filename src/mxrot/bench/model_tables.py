"""The speed of whole models for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mxrot.bench.breakdown import KINDS, Breakdown, Part
from mxrot.bench.model import ModelRow

PACKED = "packed"


def model_table(rows: Sequence[ModelRow]) -> Table:
    """Times, and speed relative to the first model at the same work. With packed caches also their bytes, and their
    speed relative to the same model without them."""
    first = {row.work: row for row in reversed(rows)}
    unpacked = {(row.model, row.work): row for row in reversed(rows)}
    packed = {row.cache for row in rows if cache_name(row.cache) == PACKED}
    table = Table(title=f"{PACKED}: {', '.join(sorted(packed))}" if packed else None)
    table.add_column("model")
    table.add_column("work")
    table.add_column("ms", justify="right")
    if packed:
        table.add_column("x", justify="right")
        table.add_column("cache", no_wrap=True)
        for heading in ("MB", "of 16 bit", "x"):
            table.add_column(heading, justify="right")
    else:
        for heading in ("quartiles", "x"):
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        before = first[row.work]
        median = "LOGITS ARE NOT FINITE" if row.seconds is None else f"{1e3 * row.seconds.median:.2f}"
        if packed:
            cells = [_ratio(before, row), *_cache_cells(row, unpacked[row.model, row.work])]
        else:
            cells = [_quartiles(row), _ratio(before, row)]
        table.add_row(row.model, row.work, median, *cells)
    return table


def _quartiles(row: ModelRow) -> str:
    return "" if row.seconds is None else f"{1e3 * row.seconds.low:.2f} to {1e3 * row.seconds.high:.2f}"


def _cache_cells(row: ModelRow, before: ModelRow) -> list[str]:
    if row.cache_bytes is None or before.cache_bytes is None:
        return [cache_name(row.cache), "", "", ""]
    share = f"{row.cache_bytes / before.cache_bytes:.3f}"
    return [cache_name(row.cache), f"{row.cache_bytes / 1e6:.1f}", share, _ratio(before, row)]


def _ratio(before: ModelRow, row: ModelRow) -> str:
    if before.seconds is None or row.seconds is None:
        return ""
    return f"{before.seconds.median / row.seconds.median:.2f}"


def cache_name(cache: str) -> str:
    """PACKED in the place of the words that describe a packed cache, which are too long for a table."""
    return PACKED if " " in cache else cache


def model_lines(rows: Sequence[ModelRow]) -> list[str]:
    """The speed of each model relative to the first one, at the same work with the same cache, and the bytes of the
    linears of each model."""
    first: dict[tuple[str, str], ModelRow] = {}
    with_caches = len({row.cache for row in rows if row.cache}) > 1
    lines, linears = [], {row.model: row.linear_bytes for row in rows}
    for row in rows:
        ratio = _ratio(first.setdefault((row.work, row.cache), row), row)
        cache = f", {cache_name(row.cache)} cache" if with_caches and row.cache else ""
        if ratio and row.model != rows[0].model:
            lines.append(f"{row.model}, {row.work}{cache}: {ratio} times as fast as {rows[0].model}")
    for name, size in linears.items():
        share = "" if name == rows[0].model else f", {size / rows[0].linear_bytes:.3f} of those of {rows[0].model}"
        lines.append(f"{name}: linears of {size / 1e9:.3f} GB{share}")
    return lines


def breakdown_tables(rows: Sequence[ModelRow]) -> list[Table]:
    """Where the time goes: a table for each work and cache, with a column for each model. Microseconds of a step, and
    in brackets the kernels that are launched."""
    works: dict[tuple[str, str], list[tuple[ModelRow, Breakdown]]] = {}
    for row in rows:
        if row.breakdown is not None:
            works.setdefault((row.work, row.cache), []).append((row, row.breakdown))
    with_caches = len({cache for _, cache in works}) > 1
    return [
        _breakdown_table(f"{work}, {cache_name(cache)} cache" if with_caches else work, found)
        for (work, cache), found in works.items()
    ]


def _breakdown_table(work: str, found: Sequence[tuple[ModelRow, Breakdown]]) -> Table:
    table = Table(title=f"{work}, not compiled: us (launches)")
    table.add_column("part")
    for row, _ in found:
        table.add_column(row.model, justify="right")
    breakdowns = [breakdown for _, breakdown in found]
    for kind in KINDS:
        if any(kind in breakdown.parts for breakdown in breakdowns):
            table.add_row(kind, *(_part_cell(breakdown.parts.get(kind, Part())) for breakdown in breakdowns))
    table.add_row("idle", *(f"{1e6 * breakdown.idle:.1f}" for breakdown in breakdowns), end_section=True)
    table.add_row("the step", *(f"{1e6 * breakdown.step.median:.1f}" for breakdown in breakdowns))
    if any(row.seconds != breakdown.step for row, breakdown in found):
        compiled = [row.seconds for row, _ in found]
        table.add_row("the step, compiled", *("" if one is None else f"{1e6 * one.median:.1f}" for one in compiled))
    return table


def _part_cell(part: Part) -> str:
    return f"{1e6 * part.seconds:.1f} ({part.launches})" if part.launches else ""
